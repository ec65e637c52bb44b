"""Verifier: leases sampled groups, scores them in sandboxed processes, passes them on.

Training groups go to the ReplayBuffer, evaluation groups to the Controller; only then the lease is acked.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import ray

from deltal.config import VerifyConfig
from deltal.monitor.http import serve_metrics
from deltal.monitor.metrics import VerifyMetrics
from deltal.queues.object_queue import get_by
from deltal.types import Group, Lease, ScoredGroup, Verdict
from deltal.verify.judge import judge
from deltal.verify.sandbox.pool import SandboxPool

RPC_SECONDS = 60.0


class Verifier:
    """Threaded Ray actor. `run` lasts until `stop`; its failure is the Verifier's failure."""

    def __init__(
        self, *, name: str, run: str, settings: VerifyConfig, max_response_tokens: int, lease_seconds: float,
        rollouts: Any, replay: Any, controller: Any, host: str, token: str | None,
    ) -> None:  # fmt: skip
        self.name = name
        self._settings, self._limit, self._lease_seconds = settings, max_response_tokens, lease_seconds
        self._rollouts, self._replay, self._controller = rollouts, replay, controller
        self._held: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._progress = time.monotonic()
        self._metrics = VerifyMetrics(run, name)
        self._server = serve_metrics(self._metrics.registry, host=host, token=token)

    def metrics_port(self) -> int:
        """Port of this actor's metrics."""
        return self._server.port

    def whereabouts(self) -> tuple[str, int]:
        """Node and process id of this actor, to end a process that does not answer."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def stop(self) -> None:
        """Finish the groups at hand, then leave; `run` returns."""
        self._stopping.set()

    def stats(self) -> dict[str, Any]:
        """Seconds since it last got on: leased something or had nothing to lease, or finished a group."""
        return {"stuck_seconds": time.monotonic() - self._progress}

    def run(self) -> None:
        """The verification loop. Returns after `stop`."""
        threading.Thread(target=self._renew, daemon=True, name="lease-renewer").start()
        settings = self._settings
        with SandboxPool(
            processes=settings.processes, timeout=settings.timeout, memory_mib=settings.memory_mib
        ) as pool:
            while not self._stopping.is_set():
                leases = get_by(self._rollouts.lease.remote(4, 1.0), seconds=RPC_SECONDS, what="the rollout queue")
                self._progress = time.monotonic()
                self._held = {lease.token: lease.key for lease in leases}
                for lease in leases:
                    self._handle(pool, lease)
                    self._held.pop(lease.token, None)
                    self._progress = time.monotonic()

    def _handle(self, pool: SandboxPool, lease: Lease[Any]) -> None:
        try:
            group: Group = get_by(lease.item[0], seconds=RPC_SECONDS, what=f"group {lease.key}")
        except ray.exceptions.RayError:
            return  # The queue died with its payload; reconcile has the group sampled again.
        scored = ScoredGroup(group=group, verdicts=tuple(self._judge(pool, group)))
        if group.id.purpose == "eval":
            answer = self._controller.evaluated.remote([scored])
            get_by(answer, seconds=RPC_SECONDS, what="the Controller to take an evaluation result")
        else:
            answer = self._replay.admit.remote([scored])
            get_by(answer, seconds=RPC_SECONDS, what="the ReplayBuffer to admit a group")
        self._rollouts.ack.remote([lease.token])
        self._metrics.groups.inc()

    def _judge(self, pool: SandboxPool, group: Group) -> list[Verdict]:
        task, started = group.prompt.task, time.monotonic()
        verdicts = judge(pool, group, self._settings, limit=self._limit)
        if verdicts:
            self._metrics.seconds.labels(task=task).observe((time.monotonic() - started) / len(verdicts))
        for verdict in verdicts:
            self._metrics.verdicts.labels(task=task, reason=verdict.reason).inc()
        return verdicts

    def _renew(self) -> None:
        """Renew leases while a long verification runs."""
        while not self._stopping.wait(self._lease_seconds / 4):
            held = list(self._held.items())
            if held:
                self._rollouts.renew.remote(held)
