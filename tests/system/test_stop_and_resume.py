"""One run's life on a file as people have it (broken rows, some rows held out): two ranks, stopped by command; resumed
on one, left in a hurry; resumed again and done; and then the file changes under it.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from deltal.replay.journal import Journal
from deltal.replay.ledger import Admitted, BatchFormed
from tests.launch import LiveRun, deltal

STEPS, MORE = 60, 61
PLAIN = (f"run.steps={STEPS}", "learner.checkpoint_every=1000", "evaluation.data={split_off: 4}", "run.export=false")
TWO_RANKS = ("learner.ranks=2", "learner.num_cpus=0.25", "rollout.num_cpus=0.25")


def with_broken_rows(path: Path) -> str:
    """14 good rows and 3 that can be neither read nor judged; the settings that use them."""
    rows = [{"prompt": f"{i}: write one of aei.", "answer": "aei", "task": "letters"} for i in range(14)]
    broken = ["{", json.dumps(rows[0] | {"prompt": "7?", "answer": "7"}), json.dumps(rows[0] | {"answer": "\ud800"})]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:4], *broken, *lines[4:]]))
    return f"data={{kind: jsonl, path: {path}, on_bad_rows: skip}}"


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen of the run, from its first step to its last."""
    root = tmp_path_factory.mktemp("runs")
    run_path, seen = str(root / "run"), {}
    data = root / "data.jsonl"
    with LiveRun(root, "run", with_broken_rows(data), *PLAIN, *TWO_RANKS) as run:
        run.until_step(2)
        seen["stop"] = deltal("stop", run_path)
        seen["stopped"], seen["text"] = run.end(), run.text()
        seen["journal"] = Journal(run.folder.path("journal")).policy_version()
        seen["rows"] = run.rows()
    seen["status"] = deltal("status", run_path)
    seen["too few"] = deltal("resume", run_path, f"run.steps={seen['journal'] - 1}")
    with LiveRun(root, "run", "learner.ranks=1", f"run.steps={MORE}", verb="resume") as run:
        run.until_step(seen["journal"] + 2)
        os.kill(run.process.pid, signal.SIGINT)
        os.kill(run.process.pid, signal.SIGINT)
        seen["left"] = run.process.wait(20)
    with LiveRun(root, "run", verb="resume") as run:
        seen["done"] = run.end()
        seen["audit"], seen["all rows"], seen["folder"] = run.audit(), run.rows(), run.folder
    seen["again"] = deltal("resume", run_path)
    data.write_text(data.read_text().replace("13: write", "14: write"))
    seen["other data"] = deltal("resume", run_path, f"run.steps={MORE + 1}")
    return seen


def test_a_stop_says_the_step_that_journal_and_metrics_say(life: dict[str, Any]):
    assert life["stop"].returncode == 0, life["stop"].stderr
    at_stop, summary = life["journal"], life["stopped"]
    assert 2 <= at_stop < STEPS
    assert (summary["state"], summary["steps"], summary["policy_version"]) == ("stopped", at_stop, at_stop)
    assert summary["ledger"]["consumed"] == 4 * at_stop
    assert max(row["step"] for row in life["rows"]) == at_stop
    assert f"stopped at step {at_stop};" in life["text"]
    assert f"step {at_stop}/{STEPS}" in life["status"].stdout


def test_fewer_steps_than_are_done_are_refused_by_the_journal_s_number(life: dict[str, Any]):
    assert life["too few"].returncode == 2
    assert f"is below the {life['journal']} steps that are done" in life["too few"].stderr


def test_one_rank_resumes_the_checkpoint_of_two_and_the_settings_before_are_kept(life: dict[str, Any]):
    assert life["folder"].config().learner.ranks == 1
    assert life["folder"].exists("config.1.yaml")
    of_checkpointed = [row["step"] for row in life["all rows"] if row["step"] <= life["journal"]]
    assert of_checkpointed == list(range(1, life["journal"] + 1)), "a checkpointed step is not redone"


def test_a_second_ctrl_c_leaves_at_once(life: dict[str, Any]):
    assert life["left"] in (0, 130)


def test_nothing_is_lost_and_nothing_is_trained_twice(life: dict[str, Any]):
    assert (life["done"]["state"], life["done"]["policy_version"]) == ("done", MORE)
    records = Journal(life["folder"].path("journal")).read()
    named = [str(id) for record in records if isinstance(record, BatchFormed) for id in record.ids]
    assert len(named) == len(set(named)) == 4 * MORE
    assert sorted({row["step"] for row in life["all rows"]}) == list(range(1, MORE + 1))
    assert life["audit"]["counts"]["consumed"] == 4 * MORE
    assert life["audit"]["violations"] == []


def test_rows_that_are_broken_are_left_out_and_rows_held_out_are_never_trained(life: dict[str, Any]):
    assert life["done"]["rows_skipped"] == life["stopped"]["rows_skipped"] == 3
    assert "data.jsonl:5: no JSON" in life["text"]
    assert "data.jsonl:6: the answer '7' of a letters prompt holds no letter" in life["text"]
    assert life["folder"].rows("evaluations.jsonl")[0]["prompts"] == 4
    records = [r for r in Journal(life["folder"].path("journal")).read() if isinstance(r, Admitted)]
    assert len({record.scored.group.prompt.messages[0].content for record in records}) == 10


def test_other_data_under_the_same_name_are_refused(life: dict[str, Any]):
    assert life["other data"].returncode == 2
    assert "is not what this run began with" in life["other data"].stderr
    assert len(life["other data"].stderr.strip().splitlines()) == 1


def test_a_run_that_is_done_is_not_resumed(life: dict[str, Any]):
    assert life["again"].returncode == 2
    assert "nothing to resume" in life["again"].stderr
