"""The observer: what the Controller knows of the run, gathered each second and told as status, summary and targets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from deltal.config import RunConfig
from deltal.errors import FolderError
from deltal.folder import RunFolder
from deltal.monitor.metrics import ControllerMetrics
from deltal.results.report import write_report
from deltal.results.rows import last_rows, stalled
from deltal.results.statistics import best_of, paired_gain
from deltal.run.evaluation import Evaluation
from deltal.run.supervisor import Supervisor

STATES = ("starting", "evaluating", "training", "paused", "stopping", "exporting", "stopped", "done", "failed")
RECENT = 5
"""Steps over which the time left is estimated."""


class Observer:
    """Facts of one run, as of the last look."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config, self._folder = config, folder
        self.metrics = ControllerMetrics(folder.name, "controller")
        self.state, self.message = "starting", ""
        self.targets: list[dict[str, Any]] = []
        self.evaluation: Evaluation | None = None
        self.evaluations = folder.rows("evaluations.jsonl")
        earlier = folder.read_json("summary.json") or {}
        self._seconds: dict[str, float] = dict(earlier.get("seconds") or {})
        self._rows = {row["step"]: row for row in last_rows(folder.rows("metrics.jsonl"))}
        self._step_times: list[float] = []
        self._depths: dict[str, Any] = {}
        self._replay: dict[str, Any] = {}
        self._workers: dict[str, dict[str, Any]] = {}
        self._learner: dict[str, Any] = {}
        self._pending: dict[str, dict[str, Any]] = {}
        self._has_told_stall = False
        self._restarts_told: dict[str, int] = {}
        self.rows_skipped = int(earlier.get("rows_skipped") or 0)
        self._skipped_told = 0
        self._looks = 0
        self._supervisor: Supervisor | None = None
        self.address: str | None = None

    def begin(self, supervisor: Supervisor, host: str, port: int) -> None:
        """The page listens and there is somebody to look at; until then the status has little to say."""
        self._supervisor, self._host, self._port = supervisor, host, port
        self.address = f"http://{host}:{port}"

    @property
    def policy_version(self) -> int:
        """Newest published version, by the ledger."""
        return int(self._replay.get("policy_version", 0))

    async def look(self) -> None:
        """Gather queue depths, ledger, workers' figures and, every few looks, the metrics targets."""
        supervisor = self._supervisor
        if supervisor is None or not supervisor.services:
            return
        ask, services = supervisor.ask, supervisor.services
        depths, replay, _ = await asyncio.gather(
            asyncio.gather(*(ask(services[queue].depth.remote()) for queue in ("prompt", "rollout"))),
            ask(services["replay"].state.remote()),
            supervisor.look_after(),
        )
        self._depths = {queue: depth or {} for queue, depth in zip(("prompt", "rollout"), depths, strict=True)}
        self._replay = replay or self._replay
        for _, rank in supervisor.running("learner")[:1]:
            self._learner = rank.stats or self._learner
        self._workers |= {member.name: member.stats for _, member in supervisor.running("rollout") if member.stats}
        self._pending = await self._find_pending(supervisor)
        if self._looks % 5 == 0:
            self.targets = await self._find_targets(supervisor)
        if self._looks % 2 == 0:
            try:
                await asyncio.to_thread(self._folder.write_json, "summary.json", self.summary())
            except FolderError as error:  # It is soft state: what must not be lost ends the run where it is written.
                self.message = str(error)
        self._looks += 1
        self._export_metrics(supervisor)

    def say(self, message: str) -> None:
        """A line for people: in the status, and in the Controller's log."""
        self.message = message
        print(f"deltal: {message}", flush=True)  # noqa: T201

    def enter(self, state: str) -> None:
        """The run's state, one of STATES."""
        self.state = state
        for name in STATES:
            self.metrics.state.labels(state=name).set(name == state)

    @contextlib.contextmanager
    def phase(self, state: str, name: str = "") -> Iterator[None]:
        """Be in `state`; its time counts for the phase `name`, over all lives of the run."""
        self.enter(state)
        self.message, started, name = "", time.monotonic(), name or state
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started

    def take_row(self, row: dict[str, Any]) -> None:
        """A finished step; completed here with what the learner does not know."""
        row["rollout_tokens_per_second"] = self._rollout_rate()
        self._rows[row["step"]] = row
        told = stalled(self._rows.values())
        if told and not self._has_told_stall:
            self.say(told)
        self._has_told_stall = told is not None
        self._step_times.append(time.monotonic())

    def take_evaluation(self, row: dict[str, Any]) -> None:
        """A finished evaluation."""
        self.evaluations.append(row)
        self.metrics.evaluation_accuracy.set(row["accuracy"] or 0.0)

    def checkpoints_to_keep(self) -> list[int]:
        """Versions of the best checkpoint so far and of the one under evaluation."""
        best, now = best_of(self.evaluations), self.evaluation
        found = [best["version"] if best else None, now.checkpoint if now else None]
        return [version for version in found if version is not None]

    def status(self) -> dict[str, Any]:
        """Facts for the progress display, the live page and `deltal status`; values may be None."""
        row = self._rows[max(self._rows)] if self._rows else {}
        evaluation = self.evaluation
        return {
            "name": self._folder.name,
            "state": self.state,
            "step": self.policy_version,
            "steps": self._config.run.steps,
            "policy_version": self.policy_version,
            "reward": row.get("reward"),
            "accuracy": row.get("accuracy"),
            "accuracy_before": self._accuracy("before"),
            "accuracy_after": self._accuracy("after"),
            "response_length": row.get("response_length"),
            "tokens_per_second": {
                "rollout": self._rollout_rate() or None, "learner": row.get("learner_tokens_per_second")
            },
            "staleness": {"mean": row.get("staleness_mean"), "max": row.get("staleness_max")},
            "queues": self._depths,
            "workers": {role: self._count(role) for role in ("rollout", "verify", "learner")},
            "pending": self._pending,
            "restarts": dict(self._supervisor.restarts) if self._supervisor else {},
            "ledger": self._replay.get("counts"),
            "seconds_left": self._seconds_left(),
            "seconds": self._seconds,
            "address": self.address,
            "prompts_skipped": self._prompts_skipped(),
            "rows_skipped": self.rows_skipped,
            "message": self.message,
            "learner": self._learner.get("waiting_for"),
            "evaluation": {"done": len(evaluation.results), "of": len(evaluation.requests)} if evaluation else None,
        }  # fmt: skip

    def summary(self, more: dict[str, Any] | None = None) -> dict[str, Any]:
        """summary.json of the run folder (names: contract), rewritten while running."""
        rows = [self._rows[step] for step in sorted(self._rows)]
        gain = interval = None
        before, after = self._last_evaluation("before"), self._last_evaluation("after")
        if before and after and len(before["correct"]) == len(after["correct"]):
            gain, interval = paired_gain(before["correct"], after["correct"])
        busy = sum(row["seconds"].get("forward_backward", 0.0) + row["seconds"].get("optimizer", 0.0) for row in rows)
        aggregation = self._config.algorithm.aggregation
        return self.status() | {
            "steps": self.policy_version,
            "steps_planned": self._config.run.steps,
            "gain": gain,
            "gain_interval_95": interval,
            "tokens_per_second": {
                "rollout": self._rollout_rate() or (rows[-1]["rollout_tokens_per_second"] if rows else None),
                "learner": sum(row["trained_tokens"] for row in rows) / busy if busy else None,
            },
            "method": aggregation.kind,
            "alpha": getattr(aggregation, "alpha", None),
            "evaluations": [{k: v for k, v in row.items() if k != "correct"} for row in self.evaluations],
            "best": best_of(self.evaluations),
            "forked_from": self._config.run.forked_from,
            "reasons": self._replay.get("reasons"),
            "duplicates": self._replay.get("duplicates"),
            "skipped": self._replay.get("skipped"),
        } | (more or {})  # fmt: skip

    def last_words(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """The summary with the `outcome`, written with report.html as far as the folder takes them."""
        summary = self.summary(outcome)
        with contextlib.suppress(FolderError):
            self._folder.write_json("summary.json", summary)
            rows, settings = self._folder.rows("metrics.jsonl"), self._config.model_dump(mode="json")
            self._folder.write("report.html", write_report(rows, summary, settings).encode())
        return summary

    def _count(self, role: str) -> int:
        return self._supervisor.count(role) if self._supervisor else 0

    def _accuracy(self, label: str) -> float | None:
        row = self._last_evaluation(label)
        return row["accuracy"] if row else None

    def _last_evaluation(self, label: str) -> dict[str, Any] | None:
        return next((row for row in reversed(self.evaluations) if row["label"] == label), None)

    def _prompts_skipped(self) -> int:
        too_long = sum(row.get("too_long", 0) for row in self.evaluations)
        filtered = (self._replay.get("reasons") or {}).get("filtered:prompt_too_long", 0)
        return int(filtered + too_long)

    def _rollout_rate(self) -> float:
        """Tokens per second of busy engine time, over all workers of this life."""
        busy = sum(stats["busy_seconds"] for stats in self._workers.values())
        return sum(stats["tokens"] for stats in self._workers.values()) / busy if busy else 0.0

    def _seconds_left(self) -> float | None:
        times = self._step_times[-RECENT - 1 :]
        if len(times) < 2:
            return None
        a_step = (times[-1] - times[0]) / (len(times) - 1)
        return max(0.0, a_step * (self._config.run.steps - self.policy_version) - (time.monotonic() - times[-1]))

    async def _find_targets(self, supervisor: Supervisor) -> list[dict[str, Any]]:
        """Every actor's metrics, as Prometheus' HTTP service discovery wants them."""
        handles = {name: ("queue" if name in ("prompt", "rollout") else name, handle)
                   for name, handle in supervisor.services.items()}  # fmt: skip
        handles |= {member.name: (role, member.handle) for role, member in supervisor.running()}
        asked = (supervisor.ask(handle.metrics_port.remote(), 2.0) for _, handle in handles.values())
        ports = await asyncio.gather(*asked)
        found = [self._target("controller", "controller", self._port)]
        found += [self._target(role, name, port) for (name, (role, _)), port in zip(handles.items(), ports, strict=True)
                  if port]  # fmt: skip
        return found

    async def _find_pending(self, supervisor: Supervisor) -> dict[str, dict[str, Any]]:
        """Members that have not started, by role, with what is free of what they need: `supervisor.pending`."""
        pending = supervisor.pending()
        free = await supervisor.free() if pending else {}
        for told in pending.values():
            told["free"] = {resource: free.get(resource, 0.0) for resource in told["needs"]}
        return pending

    def _target(self, role: str, name: str, port: int) -> dict[str, Any]:
        labels = {"run": self._folder.name, "role": role, "actor": name}
        return {"targets": [f"{self._host}:{port}"], "labels": labels}

    def _export_metrics(self, supervisor: Supervisor) -> None:
        for role in ("rollout", "verify", "learner"):
            self.metrics.workers.labels(role=role).set(supervisor.count(role))
        for role, count in supervisor.restarts.items():
            self.metrics.restarts.labels(role=role).inc(count - self._restarts_told.get(role, 0))
        self._restarts_told = dict(supervisor.restarts)
        skipped = self._prompts_skipped()
        self.metrics.prompts_skipped.inc(max(0, skipped - self._skipped_told))
        self._skipped_told = skipped
