"""Laws of `deltal replay`: a recorded step comes out again to the last bit, and another step does not pass for it."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltal.errors import UserError
from deltal.folder import RunFolder
from deltal.learner.model import prepare
from deltal.learner.trainer import Trainer
from deltal.replay.journal import Journal
from deltal.replay.ledger import Admitted, BatchFormed, Issued, Trained
from deltal.results.redo import EQUAL_WITHIN, relative_difference, replay_step, tables
from deltal.types import ScoredGroup
from tests.launch import deltal
from tests.unit.builders import gid, run_config, scored

pytestmark = pytest.mark.usefixtures("process_group", "model_cache")

STEPS = 4
BATCH = 3


def batch(version: int) -> list[ScoredGroup]:
    """Groups of unlike lengths."""
    first = BATCH * version
    return [
        scored(gid(i), rewards=(0.5 if i == first else 0.0, 1.0, 0.25), lengths=(3 + i, 17, 5 * (i % 4) + 1),
               version=version, prompt_length=5)
        for i in range(first, first + BATCH)
    ]  # fmt: skip


def broken(groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """The same from an engine that gave one response log-probabilities which are no numbers."""
    group = groups[0].group
    first = dataclasses.replace(group.responses[0], logprobs=np.full(len(group.responses[0].tokens), np.nan))
    changed = dataclasses.replace(group, responses=(first, *group.responses[1:]))
    return [dataclasses.replace(groups[0], group=changed), *groups[1:]]


def recorded(
    root: Path, *, checkpoints: Collection[int] = (), not_finite: Collection[int] = (), **algorithm: Any
) -> RunFolder:
    """A run folder of STEPS steps, as a run leaves it; batches `not_finite` give no finite gradient."""
    config = run_config(
        run={"name": "run", "steps": 9}, rollout={"max_response_tokens": 64}, algorithm=algorithm,
        learner={"learning_rate": 1e-2, "keep_checkpoints": 9, "schedule": {"kind": "linear", "warmup_steps": 2}},
    )  # fmt: skip
    folder = RunFolder(str(root / "run"))
    folder.make()
    folder.write_config(config)
    journal = Journal(folder.path("journal"))
    journal.open_writer(0.0)
    trainer = Trainer(config, prepare(config.model), folder.path("checkpoints"))
    for version in range(STEPS):
        groups = broken(batch(version)) if version in not_finite else batch(version)
        ids = tuple(one.group.id for one in groups)
        journal.write([Issued(ids, version, 0, ids[-1].index + 1, 0.0), *map(Admitted, groups)])
        journal.write([BatchFormed(version, ids)])
        made, result, rate = trainer.train(groups)
        row = trainer.row(made, result, rate, {}, redone=False)
        folder.append_rows("metrics.jsonl", [row | {"digest": trainer.share()["whole"]}])
        journal.write([Trained(version, result.skipped)])
        if version + 1 in checkpoints:
            trainer.save()
    trainer.finish()
    return folder


def replayed(folder: RunFolder, step: int) -> dict[str, Any]:
    return replay_step(folder, step, lambda done, of: None)


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"mini_batches": 3, "objective": {"kind": "ppo_clip"}},
        {"aggregation": {"kind": "delta_l", "alpha": "auto"}},
        {"kl": {"kind": "k3"}, "entropy_coefficient": 0.01},
    ],
)
def test_every_step_comes_out_again_to_the_last_bit(tmp_path: Path, algorithm: dict[str, Any]) -> None:
    folder = recorded(tmp_path, checkpoints=[2], **algorithm)
    for step, began_at in ((1, 0), (2, 0), (3, 2), (4, 2)):
        facts = replayed(folder, step)
        assert (facts["step"], facts["version"], facts["began_at"]) == (step, step - 1, began_at)
        assert facts["batches_redone"] == step - 1 - began_at
        assert facts["is_equal"]
        assert facts["difference"] == {"loss": 0.0, "grad_norm": 0.0}
        assert facts["recomputed"] == facts["recorded"]
        assert facts["recorded"]["digest"] is not None


def contents(folder: RunFolder) -> dict[str, bytes]:
    root = Path(folder.url)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_replay_only_reads(tmp_path: Path) -> None:
    folder = recorded(tmp_path, checkpoints=[2])
    before = contents(folder)
    replayed(folder, 4)
    assert contents(folder) == before


def test_a_step_that_is_not_the_recorded_one_is_told_from_it(tmp_path: Path) -> None:
    folder = recorded(tmp_path, checkpoints=[1])
    row = folder.rows("metrics.jsonl")[2]
    for key, value in (("loss", row["loss"] + 1e-3), ("grad_norms", [row["grad_norms"][0] * (1 + 3 * EQUAL_WITHIN)])):
        # The last row of a step counts.
        folder.append_rows("metrics.jsonl", [row | {key: value}])
        facts = replayed(folder, 3)
        assert not facts["is_equal"]
        assert max(facts["difference"].values()) > EQUAL_WITHIN
    folder.append_rows("metrics.jsonl", [row])
    assert replayed(folder, 3)["is_equal"]


def test_a_skipped_step_is_found_and_is_skipped_again(tmp_path: Path) -> None:
    folder = recorded(tmp_path, checkpoints=[1], not_finite=[2])
    rows = folder.rows("metrics.jsonl")
    assert [row["skipped"] for row in rows] == [False, False, True, False]
    assert rows[1]["digest"] == rows[2]["digest"], "a skipped step publishes the unchanged weights"
    facts = replayed(folder, 3)
    assert facts["is_equal"]
    assert facts["recomputed"]["skipped"]
    assert facts["recomputed"]["grad_norms"] == [None]
    # The step after it begins from the weights before it.
    assert replayed(folder, 4)["recomputed"] == replayed(folder, 4)["recorded"]


def test_the_largest_contributions_are_those_of_coefficient_advantage_and_length(tmp_path: Path) -> None:
    facts = replayed(recorded(tmp_path), 2)
    assert [group["group"] for group in facts["groups"]] == [str(gid(i)) for i in range(BATCH, 2 * BATCH)]
    assert facts["groups"][0]["rewards"] == [0.5, 1.0, 0.25]
    assert facts["groups"][0]["lengths"] == [3 + BATCH, 17, 5 * (BATCH % 4) + 1]
    sizes = [abs(entry["contribution"]) for entry in facts["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    for entry in facts["largest"]:
        expected = entry["coefficient"] * entry["advantage"] * entry["length"]
        assert entry["contribution"] == pytest.approx(expected)
    assert sum(group["contribution"] for group in facts["groups"]) == pytest.approx(sum(sizes))


def test_a_step_that_does_not_exist_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    for step in (-1, 0, STEPS + 1):
        with pytest.raises(UserError, match=f"run has no step {step}: its journal holds steps 1 to {STEPS}"):
            replayed(folder, step)


def test_a_step_without_a_row_is_shown_but_is_equal_to_nothing(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    folder.write("metrics.jsonl", b"")
    facts = replayed(folder, 1)
    assert facts["recorded"] is None
    assert not facts["is_equal"]
    assert facts["difference"] == {"loss": None, "grad_norm": None}
    assert tables(facts)


def test_differences_are_relative_to_the_value_or_to_the_terms_that_cancel() -> None:
    assert relative_difference(2.0, 2.0) == 0.0
    assert relative_difference(2.0, 2.5) == pytest.approx(0.25)
    assert relative_difference(1e-9, 2e-9, size=1.0) == pytest.approx(1e-9)
    assert relative_difference(0.0, 1e-9) == math.inf
    assert relative_difference(None, None) == 0.0
    assert relative_difference(None, 1.0) == relative_difference(1.0, None) == math.inf


def test_the_command_says_yes_or_no_by_its_exit_code(tmp_path: Path) -> None:
    folder = recorded(tmp_path, checkpoints=[1], not_finite=[2])
    yes = deltal("replay", folder.url, "2", "--json")
    assert yes.returncode == 0, yes.stderr
    assert json.loads(yes.stdout)["is_equal"]
    row = folder.rows("metrics.jsonl")[1]
    folder.append_rows("metrics.jsonl", [row | {"loss": 1.0}])
    no = deltal("replay", folder.url, "2")
    assert no.returncode == 1, no.stderr
    assert "not the step that was recorded" in no.stdout
    skipped = deltal("replay", folder.url, "3")
    assert skipped.returncode == 0, skipped.stderr
    assert "not finite" in skipped.stdout
    unknown = deltal("replay", folder.url, "9")
    assert unknown.returncode == 2
    assert "no step 9" in unknown.stderr


def test_a_step_is_redone_without_ray_and_without_an_engine() -> None:
    code = "import sys, deltal.results.redo; print(sorted({'ray', 'vllm'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"
