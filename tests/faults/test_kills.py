"""kill -9 of each part while a real run goes on: it goes on or is resumed, and every group is trained once."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from deltal.learner.redo import redo
from deltal.replay.journal import Journal
from deltal.replay.ledger import BatchFormed
from tests.launch import LiveRun, deltal

STEPS, BATCH = 16, 4
SLOWER = (f"run.steps={STEPS}", "learner.checkpoint_every=4", "evaluation.data=null", "run.export=false")


def batches(run: LiveRun) -> list[tuple[Any, ...]]:
    """Batch records of the journal, in order."""
    records = Journal(run.folder.path("journal")).read()
    return [record.ids for record in records if isinstance(record, BatchFormed)]


def undisturbed(run: LiveRun, folder: Path) -> str:
    """Digest of the weights to which the recorded batches lead a learner that nothing disturbs, from start to end."""
    journal, named = Journal(run.folder.path("journal")), batches(run)
    list(journal.read())  # Now it knows where each group is.
    nowhere = str(folder / "no-checkpoints")
    redone = redo(run.folder.config(), nowhere, STEPS - 1, lambda v: journal.find(named[v]), lambda done, of: None)
    return redone.digest


def assert_trained_once(run: LiveRun) -> None:
    """All steps done, each group in one batch record, the ledger holds, and each step has its row."""
    summary, audit = run.summary(), run.audit()
    assert summary["state"] == "done"
    assert summary["policy_version"] == STEPS
    assert audit["batches"] == STEPS
    assert audit["counts"]["consumed"] == STEPS * BATCH
    assert audit["counts"]["in_flight"] == 0
    named = [id for ids in batches(run) for id in ids]
    assert len(set(named)) == len(named) == STEPS * BATCH
    assert sorted({row["step"] for row in run.rows()}) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "victims",
    [
        ("policy", "replay", "rollout-0"),
        pytest.param(("verify-0", "prompt", "rollout", "learner-0"), marks=pytest.mark.slow),
    ],
)
def test_a_run_survives_the_deaths_of(victims: tuple[str, ...], tmp_path: Path):
    with LiveRun(tmp_path, "run", *SLOWER) as run:
        run.until(lambda: run.summary().get("state") == "training", "training to begin")
        for number, victim in enumerate(victims):
            # A step needs every part: the one before is up again by then.
            run.until_step(2 + 3 * number)
            os.kill(run.pids()[victim], signal.SIGKILL)
        run.end()
        assert_trained_once(run)


def test_a_learner_killed_between_step_and_checkpoint_redoes_the_recorded_batches(tmp_path: Path):
    with LiveRun(tmp_path, "run", *SLOWER) as run:
        run.until(lambda: run.summary().get("state") == "training", "training to begin")
        run.until_step(5)
        before = batches(run)
        os.kill(run.pids()["learner-0"], signal.SIGKILL)
        run.end()
        assert batches(run)[: len(before)] == before, "recorded batches are redone verbatim"
        assert_trained_once(run)
        redone = [row for row in run.rows() if row["redone"]]
        assert redone, "the learner came back from a checkpoint and redid steps"
        first = {row["step"]: row for row in reversed(run.rows())}
        for row in redone:
            # The same weights, batch and number of ranks: the same loss and gradient, to the last bit.
            assert row["loss"] == first[row["step"]]["loss"]
            assert row["grad_norm"] == first[row["step"]]["grad_norm"]
        assert run.rows()[-1]["digest"] == undisturbed(run, tmp_path)


def test_a_stop_reaches_a_learner_that_is_just_coming_back(tmp_path: Path):
    with LiveRun(tmp_path, "run", *SLOWER) as run:
        run.until(lambda: run.summary().get("state") == "training", "training to begin")
        run.until_step(3)
        os.kill(run.pids()["learner-0"], signal.SIGKILL)
        os.kill(run.process.pid, signal.SIGINT)
        summary = run.end(timeout=150.0)
        assert summary["state"] == "stopped"
        assert run.audit()["counts"]["consumed"] >= 3 * BATCH


def test_the_driver_resumes_a_run_whose_controller_died(tmp_path: Path):
    with LiveRun(tmp_path, "run", *SLOWER) as run:
        run.until_step(4)
        os.kill(run.controller_pid(), signal.SIGKILL)
        run.end()
        assert "resuming the run" in run.text()
        assert_trained_once(run)


def test_a_run_is_resumed_after_everything_was_killed(tmp_path: Path):
    with LiveRun(tmp_path, "run", *SLOWER) as run:
        run.until_step(5)
        run.end_everything()
        before = batches(run)
    with LiveRun(tmp_path, "run", verb="resume") as again:
        again.end()
        assert batches(again)[: len(before)] == before
        assert_trained_once(again)
        assert again.rows()[-1]["digest"] == undisturbed(again, tmp_path), "to the last bit"
    replayed = deltal("replay", str(tmp_path / "run"), "3", "--json")
    assert replayed.returncode == 0, replayed.stderr
    facts = json.loads(replayed.stdout)
    assert facts["difference"] == {"loss": 0.0, "grad_norm": 0.0}
