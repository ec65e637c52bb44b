"""The PolicyStore: newest published weights, which RolloutWorkers long-poll.

A version is visible only when all learner ranks have handed in their shard. The store fetches shards by calling
the ranks, since a task's return is owned by its caller: published weights survive the death of a rank without a copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from typing import Any

import ray

from deltal.monitor.http import serve_metrics
from deltal.monitor.metrics import PolicyMetrics
from deltal.types import PolicyVersion

Boxed = list[ray.ObjectRef]


class PolicyStore:
    """Async Ray actor. Keeps the newest version; who still loads the one before holds its own reference."""

    def __init__(self, *, run: str, host: str, token: str | None) -> None:
        self._offered: dict[int, dict[int, tuple[Boxed, str, int]]] = {}
        self._visible: list[PolicyVersion[Boxed]] = []
        self._arrived = asyncio.Condition()
        self._metrics = PolicyMetrics(run, "policy")
        self._server = serve_metrics(self._metrics.registry, host=host, token=token)

    async def metrics_port(self) -> int:
        """Port of this actor's metrics."""
        return self._server.port

    async def offer(self, version: int, rank: int, ranks: int, holder: Any, deadline_seconds: float) -> bool:
        """Take one rank's shard of `version`, by calling `holder.take_weights(version)`.

        Returns whether the version is visible now. Raises asyncio.TimeoutError when the rank does not hand it over.
        """
        if self._visible and version <= self._visible[-1].version:
            return True
        reference = holder.take_weights.remote(version)
        # Waiting on the ref fetches it into this process, zero copy; only digest and size are looked at.
        shard = await asyncio.wait_for(asyncio.wrap_future(reference.future()), deadline_seconds)
        if shard is None:
            return False
        if self._visible and version <= self._visible[-1].version:
            return True  # It was offered twice, and the other one came first.
        self._offered.setdefault(version, {})[rank] = ([reference], shard["digest"], shard["bytes"])
        del shard
        if len(self._offered[version]) < ranks:
            return False
        await self._show(version)
        return True

    async def newest(self) -> int | None:
        """Newest visible version, None before the first."""
        return self._visible[-1].version if self._visible else None

    async def wait_newer(self, than: int | None, wait_seconds: float) -> PolicyVersion[Boxed] | None:
        """The newest version if it is above `than` (any, for None); waits up to `wait_seconds`, then None."""

        def is_newer() -> bool:
            return bool(self._visible) and (than is None or self._visible[-1].version > than)

        self._metrics.waiters.inc()
        try:
            async with self._arrived:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait_for(is_newer), wait_seconds)
            return self._visible[-1] if is_newer() else None
        finally:
            self._metrics.waiters.dec()

    async def _show(self, version: int) -> None:
        shards = self._offered.pop(version)
        ordered = [shards[rank] for rank in sorted(shards)]
        digest = hashlib.sha256("".join(digest for _, digest, _ in ordered).encode()).hexdigest()[:16]
        shown = PolicyVersion(
            version=version, shards=tuple(box for box, _, _ in ordered), digest=digest, published_at=time.time()
        )
        async with self._arrived:
            self._visible = [shown]
            self._offered = {v: s for v, s in self._offered.items() if v > version}
            self._arrived.notify_all()
        self._metrics.version.set(version)
        self._metrics.published.inc()
        self._metrics.bytes.set(sum(size for _, _, size in ordered))
