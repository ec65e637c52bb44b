"""LearnerRank: one of K processes that train together, as a Ray actor, and the task that prepares the model folder.

Rank 0 waits for the batch and for `stop`; the others follow its word, so that all meet in the same collectives.
After a restart the recorded batches behind the checkpoint are redone verbatim, and nothing below the newest published
version is published again. torch is imported by `run`, so that whoever creates ranks stays small.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

from deltal.config import ModelConfig, RunConfig
from deltal.errors import DeadlineError, DeltalError, LearnerError, ModelError
from deltal.monitor.http import serve_metrics
from deltal.monitor.metrics import LearnerMetrics
from deltal.queues.object_queue import get_by
from deltal.types import ScoredGroup

if TYPE_CHECKING:
    from deltal.learner.step import StepSums
    from deltal.learner.trainer import Trainer

RPC_SECONDS = 60.0
WORD_SECONDS = 30.0
"""How often rank 0 tells the others, who sit in a collective, that it still waits."""


def prepare_model(model: ModelConfig) -> str:
    """Task body: the model folder, made on the node that runs it."""
    from deltal.learner.model import prepare

    return prepare(model)


class LearnerRank:
    """Threaded Ray actor. `run` trains until the last step or `stop`; its failure is the learner's failure."""

    def __init__(
        self, *, rank: int, run: str, model: str, config: RunConfig, folder: str, replay: Any, policy: Any,
        controller: Any, host: str, token: str | None,
    ) -> None:  # fmt: skip
        self._rank, self._config, self._model_folder, self._folder = rank, config, model, folder
        self._replay, self._policy, self._controller = replay, policy, controller
        self._stopping = threading.Event()
        self._listener: int | None = None
        self._shares: dict[int, dict[str, Any]] = {}
        self._checkpoint_seconds: dict[str, float] = {}
        self._skipped: list[int] = []
        self._version = 0
        self._waiting_for, self._waits_since = "the model to load", time.monotonic()
        self._progress: float | None = time.monotonic()
        self._offering = threading.Lock()
        self._metrics = LearnerMetrics(run, f"learner-{rank}")
        self._server = serve_metrics(self._metrics.registry, host=host, token=token)

    def metrics_port(self) -> int:
        """Port of this actor's metrics."""
        return self._server.port

    def open_rendezvous(self) -> tuple[str, int]:
        """Rank 0: listen for the other ranks, on this node's Ray address only; returns where.

        The socket is bound here and handed to torch, so no other process can take the port in between.
        """
        listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        host, port = listener.getsockname()[:2]
        self._listener = listener.detach()
        return host, port

    def whereabouts(self) -> tuple[str, int]:
        """Node and process id of this actor, to end a process that does not answer."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def stop(self) -> None:
        """Finish the step under way, checkpoint, leave."""
        self._stopping.set()

    def stats(self) -> dict[str, Any]:
        """Version the learner is at, what it waits for, and seconds since it last got on (0 when it is through)."""
        stuck = 0.0 if self._progress is None else time.monotonic() - self._progress
        return {"version": self._version, "waiting_for": self._waiting_for, "stuck_seconds": stuck}

    def take_weights(self, version: int) -> dict[str, Any] | None:
        """This rank's shard of the last published version, for the PolicyStore; None when a newer one is out.

        With `learner.transport: direct` it is only what to ask for, and whom: the tensors stay here.
        """
        share = self._shares.get(version)
        if share is None or self._config.learner.transport == "object_store":
            return share
        from deltal.policy.direct import layout

        facts = {"digest": share["digest"], "bytes": share["bytes"], "layout": layout(share["tensors"])}
        return {**facts, "holder": ray.get_runtime_context().current_actor}

    def open_sender(self, version: int) -> tuple[str, int] | None:
        """Where one worker may fetch this rank's shard once, for a minute; None when a newer version is out."""
        share = self._shares.get(version)
        if share is None:
            return None
        from deltal.policy.direct import serve_once

        return serve_once(share["tensors"], ray.util.get_node_ip_address(), seconds=RPC_SECONDS)

    def run(self, host: str, port: int) -> int:
        """Train. Returns the version reached, checkpointed. Raises LearnerError when it cannot go on."""
        from deltal.learner.trainer import Trainer, broadcast, join, leave

        join(self._config, self._rank, host, port, self._listener)
        trainer = Trainer(self._config, self._model_folder, f"{self._folder}/checkpoints")
        self._version = trainer.version
        if self._rank == 0:
            for text in trainer.passed_over:
                get_by(self._controller.tell.remote(text), seconds=RPC_SECONDS, what="the Controller to take a line")
        state = get_by(self._replay.state.remote(), seconds=RPC_SECONDS, what="the ReplayBuffer's state")
        # Rank 0's, since all must agree on whether they publish.
        self._newest = broadcast(state["policy_version"])
        threading.Thread(target=self._republish, daemon=True, name="republisher").start()
        if trainer.version >= self._newest:
            self._publish(trainer)
        self._train(trainer)
        trainer.save(keep=self._kept(trainer.version))
        trainer.finish()
        leave()
        self._progress = None
        return trainer.version

    def export(self, target: str, facts: dict[str, Any]) -> int:
        """Write the newest checkpoint as a Hugging Face folder; returns its version."""
        from deltal.learner.export import export

        return export(f"{self._folder}/checkpoints", target, config=self._config, facts=facts)

    def _train(self, trainer: Trainer) -> None:
        while trainer.version < self._config.run.steps:
            started = time.monotonic()
            groups = self._next_batch(trainer)
            if groups is None:
                return
            self._train_on(trainer, groups, time.monotonic() - started)
            if len(self._skipped) >= self._config.learner.max_skipped:
                trainer.finish()
                raise LearnerError(_skipped_in_a_row(self._skipped[0], self._skipped[-1]))

    def _next_batch(self, trainer: Trainer) -> tuple[ScoredGroup, ...] | None:
        """The groups of the next batch, or None to stop: rank 0 waits and tells the others."""
        from deltal.learner.trainer import broadcast

        self._waits_since, word = time.monotonic(), "wait"
        groups: tuple[ScoredGroup, ...] | None = None
        while word == "wait":
            if self._rank == 0:
                word, groups = self._await_batch(trainer.version)
            word = broadcast(word)
            self._progress = time.monotonic()
        if word == "stop" or groups is not None:
            return groups
        deadline = time.monotonic() + RPC_SECONDS
        while isinstance(found := self._sample(trainer.version), str):
            if time.monotonic() > deadline:
                raise LearnerError(f"batch {trainer.version} was promised, but the learner waits for {found}")
        return found

    def _sample(self, version: int) -> tuple[ScoredGroup, ...] | str:
        """Batch `version`, or what it waits for."""
        answer = get_by(self._replay.sample.remote(version, 1.0), seconds=RPC_SECONDS, what="the ReplayBuffer's answer")
        if not isinstance(answer, list):
            return str(answer.why)
        try:
            groups: tuple[ScoredGroup, ...] = get_by(
                answer[0], seconds=RPC_SECONDS, what=f"the groups of batch {version}"
            )
        except ray.exceptions.RayError:
            return "a ReplayBuffer that died with the batch in its hands, and reads it back"
        return groups

    def _await_batch(self, version: int) -> tuple[str, tuple[ScoredGroup, ...] | None]:
        """`go` and batch `version`, `stop` when asked to, `wait` after WORD_SECONDS without either.

        Raises DeadlineError that says for whom it waited; time in which no group is admitted does not count.
        """
        limit, until = self._config.learner.batch_deadline, time.monotonic() + WORD_SECONDS
        while not self._stopping.is_set():
            found = self._sample(version)
            if not isinstance(found, str):
                self._waiting_for = "nothing"
                return "go", found
            self._waiting_for = f"batch {version}: {found}"
            if time.monotonic() < until:
                continue
            # A pause, or an evaluation before training, is nobody's delay.
            if not get_by(self._controller.admits.remote(), seconds=RPC_SECONDS, what="the Controller's answer"):
                self._waits_since = time.monotonic()
            if time.monotonic() - self._waits_since > limit:
                raise DeadlineError(f"the learner waited {limit:.0f} s for {self._waiting_for}")
            return "wait", None
        return "stop", None

    def _train_on(self, trainer: Trainer, groups: tuple[ScoredGroup, ...], waited: float) -> None:
        """Train one batch, publish, tell the others, checkpoint when due. Raises ModelError when the engine sampled
        from another model than this.
        """
        batch, result, rate = trainer.train(groups)
        _check_mismatch(result.sums, batch.version, self._config.learner.max_mismatch)
        self._version, self._progress = trainer.version, time.monotonic()
        self._skipped = [*self._skipped, batch.version] if result.skipped else []
        seconds, digest = {"wait": waited}, None
        # Up to the newest published version a step is only redone: others have seen its outcome.
        redone = trainer.version <= self._newest
        if trainer.version >= self._newest:
            started = time.monotonic()
            digest = self._publish(trainer)
            if self._rank == 0:
                done = self._replay.trained.remote(batch.version, result.skipped)
                get_by(done, seconds=RPC_SECONDS, what="the ReplayBuffer to record a trained batch")
            seconds["publish"] = time.monotonic() - started
        # The row goes out before the checkpoint, so that no step that will not be redone is without one.
        row = trainer.row(batch, result, rate, seconds | self._checkpoint_seconds, redone=redone)
        # A checkpoint is on its way while steps go on: its completion stands in the row of the step that saw it.
        row |= {"digest": digest, "checkpoint_written": trainer.written()}
        self._checkpoint_seconds = {}
        if self._rank == 0:
            answer = self._controller.report_step.remote(row)
            get_by(answer, seconds=RPC_SECONDS, what="the Controller to take a step's row")
            self._observe(row)
        self._checkpoint(trainer)

    def _checkpoint(self, trainer: Trainer) -> None:
        """Begin a checkpoint when one is due: now and then, for an evaluation, and before a first skipped batch."""
        version, settings, started = trainer.version, self._config, time.monotonic()
        periods = settings.learner.checkpoint_every, settings.evaluation.checkpoint_every
        due = [version] if any(period and version % period == 0 for period in periods) else []
        if self._skipped == [version - 1]:
            due = [version - 1, *due]
        for one in due:
            trainer.save(one, keep=self._kept(version))
            self._checkpoint_seconds = {"checkpoint": time.monotonic() - started}

    def _kept(self, version: int) -> set[int]:
        """Versions whose checkpoints stay, beside the newest: the best, those evaluated, and that before a skip."""
        if self._rank != 0:
            return set()  # Rank 0 removes the others' files too.
        answer = self._controller.checkpoints_to_keep.remote()
        kept = set(get_by(answer, seconds=RPC_SECONDS, what="the Controller to name the checkpoints to keep"))
        if every := self._config.evaluation.checkpoint_every:
            # The Controller may not have seen yet that this one is due.
            kept.add(version // every * every)
        return kept.union(self._skipped[:1])

    def _publish(self, trainer: Trainer) -> str:
        """Offer this version's weights to the PolicyStore; returns their digest."""
        # Kept until the next version, so that a restarted PolicyStore can be served at once; not beside it.
        self._shares = {}
        share = trainer.share()
        self._shares = {trainer.version: share}
        self._newest = max(self._newest, trainer.version)
        with self._offering:
            self._offer(trainer.version)
        return str(share["whole"])

    def _offer(self, version: int) -> None:
        me = ray.get_runtime_context().current_actor
        offered = self._policy.offer.remote(version, self._rank, self._config.learner.ranks, me, RPC_SECONDS)
        get_by(offered, seconds=2 * RPC_SECONDS, what=f"the PolicyStore to take version {version}")

    def _republish(self) -> None:
        """Offer the last version again when the PolicyStore lost it; rank by rank, no collective needed."""
        while True:
            time.sleep(3.0)
            # What fails now is tried again. Not beside a publish, whose version is not visible yet.
            with contextlib.suppress(DeltalError, ray.exceptions.RayError), self._offering:
                held = next(iter(self._shares), None)
                newest = get_by(self._policy.newest.remote(), seconds=RPC_SECONDS, what="the PolicyStore's answer")
                if held is not None and (newest is None or newest < held):
                    self._offer(held)

    def _observe(self, row: dict[str, Any]) -> None:
        metrics = self._metrics
        metrics.step.set(row["step"])
        metrics.steps_skipped.inc(row["skipped"])
        metrics.grad_clipped.inc(row["clipped"])
        metrics.tokens.inc(row["trained_tokens"])
        metrics.tokens_per_second.set(row["learner_tokens_per_second"])
        unknown = float("nan")  # no token of the batch was sampled under the learner's own weights
        metrics.logprob_difference_max.set(unknown if (found := row["logprob_difference_max"]) is None else found)
        metrics.logprob_compared.set(row["logprob_compared"])
        for name in ("loss", "reward", "accuracy", "grad_norm", "entropy", "clip_fraction", "learning_rate"):
            getattr(metrics, name).set(row[name])
        metrics.response_length.set(row["response_length"])
        metrics.staleness_max.set(row["staleness_max"])
        metrics.observe_variance(row["variance"])
        for phase, value in row["seconds"].items():
            metrics.seconds.labels(phase=phase).observe(value)


def _check_mismatch(sums: StepSums, version: int, most: float) -> None:
    """Whether engine and learner agree on tokens of the same weights; all ranks see the same sums."""
    if sums.same_version and (mean := sums.difference / sums.same_version) > most:
        raise ModelError(
            f"engine and learner give tokens of version {version} log-probabilities that are {mean:.2g} nats apart on "
            f"average: they do not compute the same model (learner.max_mismatch = {most:g})"
        )


def _skipped_in_a_row(first: int, last: int) -> str:
    """What to tell of a run whose batches `first` to `last` gave nothing finite."""
    before = f"checkpoint {first}" if first else "the start model"
    return (
        f"steps {first + 1} to {last + 1} were skipped: their loss or gradient is not finite; {before} holds the "
        f"weights before them. `deltal replay RUN {first + 1}` shows one of them, and `deltal train CONFIG --from "
        "RUN:STEP` goes on from any checkpoint, e.g. at a lower learner.learning_rate"
    )
