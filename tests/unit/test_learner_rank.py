"""Laws of a learner rank, without Ray: when it checkpoints, what it tells, and how it ends when nothing is finite."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from deltal.config import RunConfig
from deltal.errors import DeadlineError, LearnerError, ModelError
from deltal.learner import actor
from deltal.learner.actor import LearnerRank
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.model import prepare
from deltal.replay.buffer import Waiting
from deltal.types import ScoredGroup
from tests.unit.builders import run_config, scored

pytestmark = pytest.mark.usefixtures("model_cache")


class Handle:
    """Stands for an actor's handle: a call is answered on the spot."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, name))


class Run:
    """The other actors of a run: they give batches, of which `not_finite` are broken, and note what they are told."""

    def __init__(self, folder: Path, config: RunConfig, *, not_finite: Collection[int] = ()) -> None:
        self.folder, self.config, self.not_finite = folder, config, not_finite
        self.rows: list[dict[str, Any]] = []
        self.trained_versions: list[tuple[int, bool]] = []
        self.offered: list[int] = []
        self.kept: list[int] = []
        self.told: list[str] = []
        self.waits = self.paused = self.asked = 0
        """Until how many questions there is no batch; nothing is admitted; and how many were asked."""

    def state(self) -> dict[str, Any]:
        return {"policy_version": len(self.trained_versions)}

    def sample(self, version: int, wait_seconds: float) -> list[tuple[ScoredGroup, ...]] | Waiting:
        if self.asked < self.waits:
            time.sleep(0.01)
            return Waiting(why="3 of 4 groups")
        groups = [
            scored(4 * version + i, rewards=(0.0, 1.0, 0.5), lengths=(3 + i, 17, 9), version=version) for i in range(4)
        ]
        if version in self.not_finite:
            group = groups[0].group
            wrong = dataclasses.replace(group.responses[0], logprobs=np.full(3, np.nan))
            changed = dataclasses.replace(group, responses=(wrong, *group.responses[1:]))
            groups[0] = dataclasses.replace(groups[0], group=changed)
        return [tuple(groups)]

    def trained(self, version: int, skipped: bool) -> None:
        if version == len(self.trained_versions):
            self.trained_versions.append((version, skipped))

    def report_step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def checkpoints_to_keep(self) -> list[int]:
        return self.kept

    def admits(self) -> bool:
        self.asked += 1
        return self.asked > self.paused

    def tell(self, text: str) -> None:
        self.told.append(text)

    def checkpoints(self) -> list[int]:
        return Checkpoints(str(self.folder / "checkpoints"), keep=1).versions()

    def learn(self) -> int:
        """One life of rank 0, to its end."""
        run, me = self, Handle(self)

        class Rank(LearnerRank):
            def _offer(self, version: int) -> None:
                run.offered.append(version)

            def _republish(self) -> None:
                """Its thread would outlive the test."""

        rank = Rank(
            rank=0, run="run", model=prepare(self.config.model), config=self.config, folder=str(self.folder),
            replay=me, policy=me, controller=me, host="127.0.0.1", token=None,
        )  # fmt: skip
        try:
            return rank.run("", 0)
        finally:
            if dist.is_initialized():  # it failed: otherwise the learner leaves by itself
                dist.destroy_process_group()


@pytest.fixture(autouse=True)
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "get_by", lambda value, *, seconds, what: value)


def config(steps: int, *, every: int = 0, **learner: Any) -> RunConfig:
    return run_config(
        run={"steps": steps}, rollout={"max_response_tokens": 64},
        # Log-probabilities are made up here, and far from the model's.
        learner={"learning_rate": 1e-3, "checkpoint_every": 100, "keep_checkpoints": 1, "max_mismatch": 100} | learner,
        evaluation={"data": {"kind": "generated", "split": "test"}, "every": every} if every else {},
    )  # fmt: skip


def test_the_last_version_is_checkpointed_and_complete_when_the_learner_leaves(tmp_path: Path) -> None:
    run = Run(tmp_path, config(3))
    assert run.learn() == 3
    assert run.checkpoints() == [3]
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert run.offered == [0, 1, 2, 3]
    assert len({row["digest"] for row in run.rows}) == 3


def test_checkpoints_come_every_so_many_steps_and_one_with_each_evaluation(tmp_path: Path) -> None:
    for every, expected in ((0, [4, 8, 9]), (3, [3, 4, 6, 8, 9])):
        run = Run(tmp_path / str(every), config(9, every=every, checkpoint_every=4, keep_checkpoints=9))
        run.learn()
        assert run.checkpoints() == expected


def test_what_the_controller_wants_kept_and_what_is_to_be_evaluated_stays(tmp_path: Path) -> None:
    run = Run(tmp_path, config(9, every=4, checkpoint_every=1))
    run.kept = [3]
    run.learn()
    assert run.checkpoints() == [3, 8, 9], "the best, the one whose evaluation is due, and the newest"


def test_a_written_checkpoint_stands_in_a_row_with_its_size_and_seconds(tmp_path: Path) -> None:
    run = Run(tmp_path, config(6, checkpoint_every=1))
    run.learn()
    told = [row["checkpoint_written"] for row in run.rows if row["checkpoint_written"]]
    assert told
    for entry in told:
        assert entry["version"] < run.rows[-1]["step"]
        assert entry["seconds"] > 0
        assert entry["bytes"] > 100_000
    assert all("checkpoint" in row["seconds"] for row in run.rows[1:])


def test_a_skipped_step_publishes_the_unchanged_weights_as_the_next_version(tmp_path: Path) -> None:
    run = Run(tmp_path, config(4), not_finite=[1])
    assert run.learn() == 4
    assert [row["skipped"] for row in run.rows] == [False, True, False, False]
    digests = [row["digest"] for row in run.rows]
    assert digests[0] == digests[1] != digests[2]
    assert run.trained_versions == [(0, False), (1, True), (2, False), (3, False)]
    assert run.offered == [0, 1, 2, 3, 4]


def test_three_skipped_in_a_row_end_the_run_and_a_checkpoint_from_before_them_is_there(tmp_path: Path) -> None:
    run = Run(tmp_path, config(9, checkpoint_every=1, max_skipped=3), not_finite=[1, 4, 5, 6])
    with pytest.raises(LearnerError, match=r"steps 5 to 7 were skipped: .*; checkpoint 4 holds the weights") as error:
        run.learn()
    assert "deltal replay RUN 5" in str(error.value)
    assert "\n" not in str(error.value)
    assert [row["step"] for row in run.rows if row["skipped"]] == [2, 5, 6, 7]
    assert 4 in run.checkpoints(), "kept although newer ones were written"


def test_a_skipped_step_is_checkpointed_before_even_when_none_was_due(tmp_path: Path) -> None:
    run = Run(tmp_path, config(9, max_skipped=2), not_finite=[3, 4])
    with pytest.raises(LearnerError, match="steps 4 to 5 were skipped"):
        run.learn()
    assert run.checkpoints() == [3]


def test_a_learner_that_comes_back_redoes_the_recorded_steps_to_the_same_figures(tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", config(6, checkpoint_every=2))
    straight.learn()
    run = Run(tmp_path / "run", config(5, checkpoint_every=2))
    run.learn()
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "complete.json").unlink()  # As if killed before it was complete: all five steps are redone.
    run.config = config(6, checkpoint_every=2)
    run.learn()
    redone = run.rows[5:]
    assert [row["step"] for row in redone] == [1, 2, 3, 4, 5, 6]
    assert [row["redone"] for row in redone] == [True] * 5 + [False]
    for row, first in zip(redone, straight.rows, strict=True):
        assert (row["loss"], row["grad_norms"]) == (first["loss"], first["grad_norms"])
    assert redone[-1]["digest"] == straight.rows[-1]["digest"]
    assert run.trained_versions == [(version, False) for version in range(6)]


def test_a_pause_is_nobody_s_delay_and_a_straggler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "WORD_SECONDS", 0.0)
    run = Run(tmp_path, config(2, batch_deadline=0.2))
    run.waits = run.paused = 60  # At least 0.6 s without a batch, all of it paused.
    assert run.learn() == 2
    late = Run(tmp_path / "late", config(2, batch_deadline=0.2))
    late.waits, late.paused = 10_000, 30
    with pytest.raises(DeadlineError, match=r"waited 0 s for batch 0: 3 of 4 groups"):
        late.learn()
    assert late.asked > late.paused


def test_a_damaged_checkpoint_is_told_to_the_people_who_watch(tmp_path: Path) -> None:
    run = Run(tmp_path, config(4, checkpoint_every=2, keep_checkpoints=2))
    run.learn()
    (tmp_path / "checkpoints" / "00000004" / "random.pt").write_bytes(b"")
    run.config = config(5, checkpoint_every=2)
    assert run.learn() == 5
    (text,) = run.told
    assert "00000004 is damaged and passed over: random.pt" in text
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 3, 4, 5]


def test_what_comes_after_the_last_step_is_one_rank_s_own_work(tmp_path: Path) -> None:
    Run(tmp_path, config(1)).learn()
    assert not dist.is_initialized(), "an export by rank 0 would wait for the others"


def test_an_engine_that_computes_another_model_ends_the_run_at_its_first_batch(tmp_path: Path) -> None:
    run = Run(tmp_path, config(2, max_mismatch=1.0))
    with pytest.raises(ModelError, match=r"are \d\.\d nats apart on average: they do not") as caught:
        run.learn()
    assert "\n" not in str(caught.value)
    assert run.trained_versions == []
    assert run.offered == [0], "what was trained on it is not published"
