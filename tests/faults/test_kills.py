"""kill -9 of each part while a real run goes on: it goes on or is resumed, and every group is trained once."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deltal.learner.redo import redo
from deltal.replay.journal import Journal
from deltal.replay.ledger import Admitted, BatchFormed
from tests.launch import LiveRun, deltal

STEPS, BATCH = 60, 4
PLAIN = (f"run.steps={STEPS}", "learner.checkpoint_every=4", "evaluation.data=null", "run.export=false")
VICTIMS = ("policy", "replay", "rollout-0", "learner-0")


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


def end_each(run: LiveRun, victims: tuple[str, ...]) -> None:
    """kill -9 of one after the other, each a few steps after the one before: a step needs every part."""
    run.until(lambda: run.summary().get("state") == "training", "training to begin")
    for victim in victims:
        run.until_step(2 + newest(run))
        os.kill(run.pids()[victim], signal.SIGKILL)
    run.until_step(2 + newest(run))


def newest(run: LiveRun) -> int:
    return max((row["step"] for row in run.rows()), default=0)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run: each part killed, the Controller, the whole tree; a learner while a stop is asked for; then its end."""
    root, seen = tmp_path_factory.mktemp("runs"), {}
    with LiveRun(root, "run", *PLAIN) as run:
        end_each(run, VICTIMS)
        seen["restarts"] = run.summary()["restarts"]
        os.kill(run.controller_pid(), signal.SIGKILL)
        run.until(lambda: "resuming the run" in run.text(), "the driver to see that the Controller died")
        run.until_step(2 + newest(run))
        run.end_everything()
        seen["before"] = batches(run)
    with LiveRun(root, "run", verb="resume") as run:
        run.until_step(2 + newest(run))
        os.kill(run.pids()["learner-0"], signal.SIGKILL)
        os.kill(run.process.pid, signal.SIGINT)
        seen["stopped"] = run.end(timeout=150.0)
    with LiveRun(root, "run", verb="resume") as run:
        seen["done"], seen["audit"] = run.end(), run.audit()
        seen |= {"rows": run.rows(), "batches": batches(run), "digest": undisturbed(run, root), "root": root}
    return seen


def assert_trained_once(seen: dict[str, Any]) -> None:
    """All steps done, each group in one batch record, the ledger holds, and each step has its row."""
    summary, audit = seen["done"], seen["audit"]
    assert (summary["state"], summary["policy_version"], audit["batches"]) == ("done", STEPS, STEPS)
    assert audit["counts"]["consumed"] == STEPS * BATCH
    assert audit["counts"]["in_flight"] == 0
    named = [id for ids in seen["batches"] for id in ids]
    assert len(set(named)) == len(named) == STEPS * BATCH
    assert sorted({row["step"] for row in seen["rows"]}) == list(range(1, STEPS + 1))


def test_a_run_survives_the_death_of_every_part_and_trains_each_group_once(life: dict[str, Any]):
    assert life["restarts"] == {"rollout": 1, "learner": 1}, "Ray restarts the others by itself"
    assert_trained_once(life)


def test_recorded_batches_are_redone_verbatim_after_everything_was_killed(life: dict[str, Any]):
    assert life["batches"][: len(life["before"])] == life["before"]


def test_a_redone_step_is_the_same_to_the_last_bit(life: dict[str, Any]):
    redone = [row for row in life["rows"] if row["redone"]]
    assert redone, "the learner came back from a checkpoint and redid steps"
    first = {row["step"]: row for row in reversed(life["rows"])}
    for row in redone:
        # The same weights, batch and number of ranks: the same loss and gradient.
        assert row["loss"] == first[row["step"]]["loss"]
        assert row["grad_norm"] == first[row["step"]]["grad_norm"]


def test_a_run_full_of_deaths_ends_with_the_weights_of_one_without_any(life: dict[str, Any]):
    assert life["rows"][-1]["digest"] == life["digest"]


def test_a_stop_reaches_a_learner_that_is_just_coming_back(life: dict[str, Any]):
    assert life["stopped"]["state"] == "stopped"
    assert life["stopped"]["policy_version"] >= len(life["before"]) - 1


def test_a_step_is_replayed_from_the_folder_alone_without_any_difference(life: dict[str, Any]):
    replayed = deltal("replay", str(life["root"] / "run"), "3", "--json")
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout)["difference"] == {"loss": 0.0, "grad_norm": 0.0}


@pytest.mark.slow
def test_a_run_survives_the_deaths_of_its_verifier_and_its_queues(tmp_path: Path):
    with LiveRun(tmp_path, "run", *PLAIN) as run:
        end_each(run, ("verify-0", "prompt", "rollout", "learner-0"))
        seen = {"done": run.end(), "audit": run.audit(), "rows": run.rows(), "batches": batches(run)}
    assert_trained_once(seen)


@pytest.mark.slow
def test_a_worker_that_was_held_up_beyond_its_lease_goes_on_with_its_groups_and_samples_none_twice(tmp_path: Path):
    """SIGSTOP while groups are under way, for longer than a lease: they are leased again, to the same worker."""
    limit = 1500
    longer = (
        "run.steps=3", f"rollout.max_response_tokens={limit}", "replay.lease_seconds=2", "evaluation.data=null",
        "model.shape.vocab_size=9000",  # of which one ends a response
        "rollout.max_sequences=64", "run.export=false",
    )  # fmt: skip
    with LiveRun(tmp_path, "run", *longer) as run:
        run.until(lambda: (run.summary().get("queues") or {}).get("prompt", {}).get("leased"), "groups under way")
        worker = run.pids()["rollout-0"]
        for _ in range(2):
            os.kill(worker, signal.SIGSTOP)
            time.sleep(5.0)
            os.kill(worker, signal.SIGCONT)
            time.sleep(1.0)
        summary = run.end()
        groups = [r.scored.group for r in Journal(run.folder.path("journal")).read() if isinstance(r, Admitted)]
        audit = run.audit()
    assert summary["restarts"] == {}
    assert audit["reasons"] == {}, "nothing was malformed or evicted"
    assert max(len(response.tokens) for group in groups for response in group.responses) <= limit
    for group in groups:
        for response in group.responses:
            assert len(response.logprobs) == len(response.tokens)


@pytest.mark.slow
def test_a_process_that_lives_but_does_not_answer_is_ended_and_replaced(tmp_path: Path):
    """SIGSTOP of each kind of member, never woken: no fault of its own would end it."""
    with LiveRun(tmp_path, "run", *PLAIN, "run.silence_deadline=4") as run:
        run.until(lambda: run.summary().get("state") == "training", "training to begin")
        stopped = []
        for victim in ("verify-0", "rollout-0", "learner-0"):
            run.until_step(2 + newest(run))
            stopped.append(run.pids()[victim])
            os.kill(stopped[-1], signal.SIGSTOP)
            run.until(lambda pid=stopped[-1]: not psutil.pid_exists(pid), f"{victim} to be ended", 60.0)
            run.until(lambda who=victim: f"{who} gave no answer for" in run.text(), f"a line about {victim}", 10.0)
        run.until_step(2 + newest(run))
        seen = {"done": run.end(), "audit": run.audit(), "rows": run.rows(), "batches": batches(run)}
    assert seen["done"]["restarts"] == {"verify": 1, "rollout": 1, "learner": 1}
    assert_trained_once(seen)


@pytest.mark.slow
def test_a_controller_that_was_held_up_ends_nobody_and_loses_nothing(tmp_path: Path):
    """SIGSTOP of the Controller for longer than every lease, heartbeat and the silence of its members; then SIGCONT."""
    with LiveRun(tmp_path, "run", *PLAIN, "run.silence_deadline=15") as run:
        run.until_step(2)
        controller = run.controller_pid()
        os.kill(controller, signal.SIGSTOP)
        time.sleep(30.0)
        os.kill(controller, signal.SIGCONT)
        seen = {"done": run.end(), "audit": run.audit(), "rows": run.rows(), "batches": batches(run)}
    assert seen["done"]["restarts"] == {}
    assert_trained_once(seen)
