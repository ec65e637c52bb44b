"""Evaluation while the learner goes on, the best checkpoint by it, and a run forked from that, whose two ranks hand
their weights to the worker directly; two real runs.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from deltal.folder import RunFolder
from tests.launch import TINY, LiveRun, deltal

STEPS, EVERY = 40, 8


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run that evaluated on the way."""
    root = tmp_path_factory.mktemp("runs")
    overrides = (
        f"run.steps={STEPS}", f"evaluation.every={EVERY}", "evaluation.responses_per_prompt=4",
        "evaluation.prompts=32", "learner.checkpoint_every=5", "learner.keep_checkpoints=1",
    )  # fmt: skip
    with LiveRun(root, "parent", *overrides) as run:
        summary = run.end()
        yield {"root": root, "folder": run.folder, "summary": summary, "rows": run.rows()}


def evaluations(folder: RunFolder, label: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows("evaluations.jsonl") if row["label"] == label]


def versions(folder: RunFolder) -> list[int]:
    marks = Path(folder.path("checkpoints")).glob("*/complete.json")
    return sorted(int(mark.parent.name) for mark in marks)


def test_evaluations_do_not_stop_the_learner(parent: dict[str, Any]):
    during = evaluations(parent["folder"], "during")
    assert during
    times = [row["time"] for row in parent["rows"]]
    steps_within = [sum(e["time"] < t < e["time"] + e["seconds"] for t in times) for e in during]
    assert max(steps_within) >= 2, f"steps while an evaluation was under way: {steps_within}"
    assert len(evaluations(parent["folder"], "before")) == len(evaluations(parent["folder"], "after")) == 1


def test_each_evaluation_says_what_it_measured_and_how_sure_it_is(parent: dict[str, Any]):
    for row in parent["folder"].rows("evaluations.jsonl"):
        assert list(row["pass_at"]) == ["1", "2", "4"]
        assert row["pass_at"]["1"]["value"] == pytest.approx(row["accuracy"])
        for entry in row["pass_at"].values():
            assert entry["interval_95"][0] <= entry["value"] <= entry["interval_95"][1]
        assert min(row["versions"]) >= row["version"] >= (row["checkpoint"] or 0)
        assert (row["checkpoint"] is None) == (row["label"] == "before")
        if row["label"] == "during":
            assert row["checkpoint"] % EVERY == 0
    (after,) = evaluations(parent["folder"], "after")
    assert after["versions"] == [STEPS] == [after["checkpoint"]]


def test_the_best_checkpoint_is_kept_and_named(parent: dict[str, Any]):
    best = parent["summary"]["best"]
    rated = [row for row in parent["folder"].rows("evaluations.jsonl") if row["checkpoint"]]
    assert best["accuracy"] == max(row["accuracy"] for row in rated)
    assert best["version"] in versions(parent["folder"])
    # The last evaluation comes after the last checkpoint: whichever was best until then may still be there.
    during = max((row for row in rated if row["label"] == "during"), key=lambda row: row["accuracy"])
    # The one under evaluation when the last checkpoint was made stays too: nothing prunes after it.
    late = max(row["checkpoint"] for row in rated if row["label"] == "during")
    allowed = {best["version"], during["checkpoint"], late, STEPS}
    assert set(versions(parent["folder"])) <= allowed, "of the others only the newest is kept"


def test_the_best_is_exported_and_a_fork_begins_from_its_very_weights(parent: dict[str, Any]):
    root, best = parent["root"], parent["summary"]["best"]["version"]
    exported = deltal("export", str(root / "parent"), str(root / "best"), "--step", "best")
    assert exported.returncode == 0, exported.stderr
    assert f"policy version {best} of parent" in exported.stdout
    planned = deltal("train", TINY, "--from", f"{root}/parent:best", "--dry-run", DELTAL_RUNS=str(root))
    assert planned.returncode == 0, planned.stderr
    direct = ("learner.transport=direct", "learner.ranks=2", "learner.num_cpus=0.25", "rollout.num_cpus=0.25")
    with LiveRun(root, "child", "run.steps=6", "evaluation.data=null", "rollout.temperature=0.8", *direct,
                 begin_from=f"{root}/parent:best") as child:  # fmt: skip
        summary, rows = child.end(), child.rows()
        assert (summary["state"], summary["policy_version"], summary["restarts"]) == ("done", 6, {})
        assert summary["forked_from"] == child.folder.config().run.forked_from == f"parent:{best}"
        assert child.folder.config().rollout.temperature == 0.8
        assert (root / "child/start/model.safetensors").read_bytes() == (root / "best/model.safetensors").read_bytes()
        assert rows[0]["logprob_difference_max"] < 1e-3, "engine and learner begin from the same weights"
        agreed = [row["logprob_difference_max"] for row in rows if row["logprob_difference_max"] is not None]
        assert max(agreed) < 1e-3, "the weights that came from both ranks are the learner's"
        assert max(row["version"] - row["staleness_max"] for row in rows) > 0, "newer versions were loaded"
        exported = AutoModelForCausalLM.from_pretrained(child.folder.path("export"))
        assert exported.num_parameters() > 0, "one of the two ranks writes the export by itself"
        counts = child.audit()["counts"]
        assert counts["consumed"] == 6 * 4, "the journal is the fork's own"
    replayed = deltal("replay", str(root / "child"), "1", "--json")
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout)["began_at"] == 0
