"""The queue between rooms as a Ray actor: it holds references, payloads live in the object store.

The queue re-puts what it is given, so that an entry survives its producer; readers get the queue's references.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any

import ray

from deltal.errors import DeadlineError, DeltalError
from deltal.monitor.http import serve_metrics
from deltal.monitor.metrics import QueueMetrics
from deltal.queues.lease_queue import LeaseQueue
from deltal.types import GroupId, Lease

Boxed = list[ray.ObjectRef]
PAYLOAD_SECONDS = 60.0
"""How long a producer may take to hand over what it puts."""


class ObjectQueue:
    """Async Ray actor around `LeaseQueue`. Soft state: a restart begins empty, reconcile refills it."""

    def __init__(self, *, run: str, name: str, lease_seconds: float, host: str, token: str | None) -> None:
        self._queue: LeaseQueue[Boxed] = LeaseQueue(lease_seconds=lease_seconds, incarnation=uuid.uuid4().hex[:8])
        self._arrived = asyncio.Event()
        self._metrics = QueueMetrics(run, name)
        self._server = serve_metrics(self._metrics.registry, host=host, token=token)
        self._counted = (0, 0, 0)

    async def metrics_port(self) -> int:
        """Port of this actor's metrics."""
        return self._server.port

    async def put(self, entries: list[tuple[GroupId, Boxed]]) -> int:
        """Append entries given as (key, [reference]); known keys are left alone. Returns how many were new."""
        owned = []
        for key, box in entries:
            value = await asyncio.wait_for(box[0], PAYLOAD_SECONDS)
            owned.append((key, [ray.put(value)]))
        new = self._queue.put(owned, now=time.monotonic())
        self._arrived.set()
        self._observe()
        return new

    async def lease(self, count: int, wait_seconds: float = 0.0) -> list[Lease[Boxed]]:
        """Up to `count` leases; waits at most `wait_seconds` for the first one."""
        deadline = time.monotonic() + wait_seconds
        while True:
            leases = self._queue.lease(count, now=time.monotonic())
            left = deadline - time.monotonic()
            if leases or left <= 0:
                self._observe()
                return leases
            self._arrived.clear()
            # Wakes at least each second: an expired lease makes an entry available without a put.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), min(left, 1.0))

    async def renew(self, held: list[tuple[str, GroupId]]) -> list[GroupId]:
        """Extend leases; returns the keys that were removed. See `LeaseQueue.renew`."""
        return self._queue.renew(held, now=time.monotonic())

    async def ack(self, tokens: list[str]) -> None:
        """End leases for good."""
        self._queue.ack(tokens)
        self._observe()

    async def give_back(self, tokens: list[str]) -> None:
        """Return leases unread."""
        self._queue.give_back(tokens, now=time.monotonic())
        self._arrived.set()

    async def remove(self, keys: list[GroupId]) -> None:
        """Forget entries that have their fate."""
        self._queue.remove(keys)
        self._observe()

    async def keys(self) -> set[GroupId]:
        """Keys of everything waiting or leased."""
        return self._queue.keys(now=time.monotonic())

    async def delivered(self, times: int) -> list[GroupId]:
        """Waiting keys that were leased `times` times or more without an ack."""
        return self._queue.delivered(times)

    async def depth(self) -> dict[str, Any]:
        """`waiting`, `leased` and `oldest_seconds`."""
        self._observe()
        return {
            "waiting": self._queue.waiting,
            "leased": self._queue.leased,
            "oldest_seconds": self._queue.oldest(now=time.monotonic()),
        }

    def _observe(self) -> None:
        queue, metrics = self._queue, self._metrics
        metrics.waiting.set(queue.waiting)
        metrics.leased.set(queue.leased)
        metrics.oldest_seconds.set(queue.oldest(now=time.monotonic()))
        now = (queue.puts, queue.acks, queue.expired)
        for counter, before, after in zip(
            (metrics.puts, metrics.acks, metrics.expired), self._counted, now, strict=True
        ):
            counter.inc(after - before)
        self._counted = now


def get_by(reference: Any, *, seconds: float, what: str) -> Any:
    """`ray.get` with a deadline and a name. Raises DeadlineError that says what was waited for, and an error of ours
    as it was raised at the other end.
    """
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayTaskError as error:
        raise own_cause(error) from None
    except ray.exceptions.GetTimeoutError:
        raise DeadlineError(f"waited {seconds:.0f} s for {what}") from None


def own_cause(error: ray.exceptions.RayTaskError) -> BaseException:
    """The error of ours behind a failed call, in the one line it was raised with; `error` itself for any other."""
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError):
        cause = cause.cause
    return cause if isinstance(cause, DeltalError) else error
