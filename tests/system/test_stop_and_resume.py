"""A run stopped in order and resumed, by command and by Ctrl-C, and a learner of two ranks."""

import os
import signal
from pathlib import Path

from deltal.replay.journal import Journal
from deltal.replay.ledger import BatchFormed
from tests.launch import LiveRun, deltal

STEPS = 24
PLAIN = (f"run.steps={STEPS}", "learner.checkpoint_every=100", "evaluation.data=null", "run.export=false")


def trained(run: LiveRun) -> list[str]:
    """Every group named by a batch record, in order."""
    records = Journal(run.folder.path("journal")).read()
    return [str(id) for record in records if isinstance(record, BatchFormed) for id in record.ids]


def test_a_stopped_run_goes_on_with_nothing_lost_and_nothing_trained_twice(tmp_path: Path):
    with LiveRun(tmp_path, "run", *PLAIN) as run:
        run.until(lambda: run.summary().get("state") == "training", "training to begin")
        run.until_step(1)
        stopped = deltal("stop", str(tmp_path / "run"))
        assert stopped.returncode == 0, stopped.stderr
        summary = run.end()
        assert summary["state"] == "stopped"
        at_stop = summary["policy_version"]
        assert 2 <= at_stop < STEPS
    with LiveRun(tmp_path, "run", verb="resume") as again:
        summary = again.end()
        assert summary["state"] == "done"
        assert summary["policy_version"] == STEPS
        named = trained(again)
        assert len(named) == len(set(named)) == 4 * STEPS
        assert [row["step"] for row in again.rows()] == list(range(1, STEPS + 1)), "a checkpointed step is not redone"
        again.audit()
    refused = deltal("resume", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert "nothing to resume" in refused.stderr


def test_two_ranks_train_and_one_rank_resumes_their_checkpoint(tmp_path: Path):
    two = ("learner.ranks=2", "learner.num_cpus=0.25", "rollout.num_cpus=0.25")
    with LiveRun(tmp_path, "run", *PLAIN, *two) as run:
        run.until_step(3)
        os.kill(run.process.pid, signal.SIGINT)
        summary = run.end()
        assert summary["state"] == "stopped"
        assert summary["workers"]["learner"] == 0 or summary["policy_version"] >= 3
    with LiveRun(tmp_path, "run", "learner.ranks=1", f"run.steps={STEPS + 1}", verb="resume") as again:
        assert again.end()["policy_version"] == STEPS + 1
        assert again.folder.config().learner.ranks == 1
        assert again.folder.exists("config.1.yaml"), "the settings before are kept"
        named = trained(again)
        assert len(named) == len(set(named)) == 4 * (STEPS + 1)
        again.audit()


def test_a_second_ctrl_c_leaves_at_once_and_the_run_can_be_resumed(tmp_path: Path):
    with LiveRun(tmp_path, "run", *PLAIN) as run:
        run.until_step(2)
        os.kill(run.process.pid, signal.SIGINT)
        os.kill(run.process.pid, signal.SIGINT)
        assert run.process.wait(20) in (0, 130)
    with LiveRun(tmp_path, "run", verb="resume") as again:
        assert again.end()["state"] == "done"
        named = trained(again)
        assert len(named) == len(set(named)) == 4 * STEPS
        again.audit()
