"""Laws of forks: a new run begins from the very weights of another, and says from which."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from deltal.config import HfModel, RunConfig
from deltal.errors import RunNotFoundError, UserError
from deltal.folder import RunFolder
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.export import export
from deltal.learner.model import load, prepare
from deltal.run.fork import begin, find_source, named_version, planned
from tests.unit.builders import run_config, same_state

pytestmark = pytest.mark.usefixtures("process_group", "model_cache")

TOKENS = torch.tensor([[72, 105, 256, 3, 77, 200]])


def trained(root: Path, *versions: int, name: str = "old", config: RunConfig | None = None) -> dict[int, Any]:
    """A run in `root` with checkpoints; returns the weights of each."""
    config = config or run_config(run={"name": name})
    folder = RunFolder(str(root / name))
    folder.make()
    folder.write_config(config)
    model: Any = load(prepare(config.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    store = Checkpoints(folder.path("checkpoints"), keep=9)
    found = {}
    for version in versions:
        model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
        optimizer.step()
        store.save(version, model, optimizer, {})
        found[version] = copy.deepcopy(model.state_dict())
    store.wait()
    return found


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAL_RUNS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("named", "version"), [("old", 4), ("old:2", 2), ("old:4", 4), ("old:best", 2)])
def test_a_fork_begins_from_the_weights_of_the_named_checkpoint(runs: Path, named: str, version: int) -> None:
    weights = trained(runs, 2, 4)
    RunFolder(str(runs / "old")).append_rows(
        "evaluations.jsonl",
        [{"checkpoint": None, "accuracy": 0.9}, {"checkpoint": 2, "accuracy": 0.5}, {"checkpoint": 4, "accuracy": 0.4}],
    )
    target = RunFolder(str(runs / "new"))
    target.make()
    source = find_source(named)
    settings = begin(run_config(learner={"learning_rate": 1e-3}), source, target)
    assert settings.run.forked_from == f"old:{version}"
    assert settings.learner.learning_rate == 1e-3
    assert settings.model == HfModel(path=target.path("start"))
    assert same_state(load(prepare(settings.model)).state_dict(), weights[version])


def test_a_fork_of_a_run_whose_checkpoints_are_gone_begins_from_its_export(runs: Path) -> None:
    weights = trained(runs, 4)
    old = RunFolder(str(runs / "old"))
    export(old.path("checkpoints"), old.path("export"), config=old.config())
    (runs / "old" / "checkpoints").rename(runs / "gone")
    target = RunFolder(str(runs / "new"))
    target.make()
    settings = begin(run_config(), find_source("old"), target)
    assert settings.run.forked_from == "old:export"
    assert same_state(load(prepare(settings.model)).state_dict(), weights[4])
    with pytest.raises(UserError, match="old has no checkpoint 4; there are: none"):
        find_source("old:4")


def test_a_fork_can_be_forked(runs: Path) -> None:
    trained(runs, 1)
    new, newer = (RunFolder(str(runs / name)) for name in ("new", "newer"))
    weights = trained(runs, 3, name="new", config=begin(run_config(), find_source("old"), new))
    settings = begin(run_config(), find_source("new"), newer)
    assert settings.run.forked_from == "new:3"
    assert same_state(load(prepare(settings.model)).state_dict(), weights[3])


def test_what_cannot_be_forked_is_named(runs: Path) -> None:
    trained(runs, 2, 4)
    for named, says in (("old:3", "old has no checkpoint 3; there are: 2, 4"), ("old:best", "none was evaluated")):
        with pytest.raises(UserError, match=says):
            find_source(named)
    with pytest.raises(RunNotFoundError, match="there is no run nobody"):
        find_source("nobody:3")
    empty = RunFolder(str(runs / "empty"))
    empty.make()
    empty.write_config(run_config())
    with pytest.raises(UserError, match="empty has neither a checkpoint nor an export"):
        find_source("empty")
    with pytest.raises(UserError, match="must be a local or shared folder"):
        begin(run_config(), find_source("old"), RunFolder("memory://runs/new"))


def test_a_fork_is_planned_with_the_model_of_its_source(runs: Path) -> None:
    trained(runs, 2)
    settings = planned(run_config(model={"kind": "hf", "path": "org/other"}), find_source("old"))
    assert settings.model == run_config().model
    assert settings.run.forked_from == "old:2"


def test_a_step_is_a_number_or_best(runs: Path) -> None:
    trained(runs, 2)
    folder = RunFolder.find("old")
    assert named_version(folder, "17") == 17
    with pytest.raises(UserError, match="'last' is no step"):
        named_version(folder, "last")
