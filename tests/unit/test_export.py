"""Laws of the export: plain transformers loads what was trained, and nothing else on the disk is touched."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deltal.config import HfModel, ModelShape, RandomModel, RunConfig
from deltal.errors import UserError
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.export import export
from deltal.learner.model import load, prepare
from tests.unit.builders import run_config

pytestmark = pytest.mark.usefixtures("process_group", "model_cache")

TOKENS = torch.tensor([[72, 105, 256, 3, 77, 200]])


def config_of(architecture: str = "qwen2", *, tied: bool = True, **rooms: Any) -> RunConfig:
    shape = {"architecture": architecture, "tied_embeddings": tied}
    return run_config(model={"kind": "random", "shape": shape}, **rooms)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits  # type: ignore[no-any-return]


def checkpointed(folder: Path, config: RunConfig, *versions: int) -> dict[int, torch.Tensor]:
    """Checkpoints of different weights; returns the logits of each."""
    model = load(prepare(config.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = {}
    for version in versions:
        model(input_ids=TOKENS).logits[..., :7].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        store = Checkpoints(str(folder), keep=9)
        store.save(version, model, optimizer, {})
        store.wait()
        found[version] = logits(copy.deepcopy(model).eval())
    return found


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("llama", False), ("qwen3", True)])
def test_plain_transformers_loads_an_export_with_identical_logits(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_of(architecture, tied=tied)
    expected = checkpointed(tmp_path / "checkpoints", config, 3)
    assert export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(model.eval()), expected[3])
    assert not torch.equal(expected[3], logits(load(prepare(config.model)).eval()))
    assert model.config.model_type == architecture
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("seven + 7 = ä")) == "seven + 7 = ä"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert turn == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256


def test_an_export_has_the_tokenizer_files_of_its_start_model_byte_for_byte(tmp_path: Path) -> None:
    made, start = prepare(config_of().model), tmp_path / "start"
    shutil.copytree(made, start)
    settings = json.loads((start / "tokenizer_config.json").read_text())
    # As many published models have it; transformers builds another tokenizer then, and would save that one.
    settings["tokenizer_class"] = "LlamaTokenizerFast"
    (start / "tokenizer_config.json").write_text(json.dumps(settings))
    (start / "added_tokens.json").write_text("{}")
    config = run_config(model={"kind": "hf", "path": str(start)})
    checkpointed(tmp_path / "checkpoints", config, 1)
    export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (start / name).read_bytes(), name


def test_the_newest_checkpoint_is_exported_unless_another_is_asked_for(tmp_path: Path) -> None:
    config = config_of()
    expected = checkpointed(tmp_path / "checkpoints", config, 2, 4)
    assert not torch.equal(expected[2], expected[4])
    for version, asked in ((4, None), (2, 2), (4, 4)):
        # The same folder each time: an earlier export is replaced.
        assert export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config, version=asked) == version
        assert torch.equal(logits(load(str(tmp_path / "out")).eval()), expected[version])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "out"]


def test_an_unknown_step_names_the_ones_there_are(tmp_path: Path) -> None:
    config, checkpoints = config_of(), str(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=f"there is no checkpoint .*in {checkpoints}; there are: none"):
        export(checkpoints, str(tmp_path / "out"), config=config)
    checkpointed(tmp_path / "checkpoints", config, 2, 4)
    with pytest.raises(UserError, match=f"there is no checkpoint 3 in {checkpoints}; there are: 2, 4"):
        export(checkpoints, str(tmp_path / "out"), config=config, version=3)
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("holds", ["notes.txt", "config.json", "README.md", "a model", "a file"])
def test_a_target_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path, holds: str) -> None:
    config, target = config_of(), tmp_path / "out"
    checkpointed(tmp_path / "checkpoints", config, 1)
    match holds:
        case "a model":
            load(prepare(RandomModel(shape=ModelShape()))).save_pretrained(target)  # type: ignore[operator]
        case "a file":
            target.write_text("mine")
        case _:
            target.mkdir()
            (target / holds).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{target} exists and is no export of deltal"):
        export(str(tmp_path / "checkpoints"), str(target), config=config)
    assert contents(tmp_path) == before


def test_the_model_the_run_began_from_is_never_replaced(tmp_path: Path) -> None:
    config, start = config_of(), tmp_path / "start"
    checkpointed(tmp_path / "checkpoints", config, 1)
    export(str(tmp_path / "checkpoints"), str(start), config=config)
    forked = config.model_copy(update={"model": HfModel(path=str(start))})
    before = contents(start)
    with pytest.raises(UserError, match="is the model this run began from"):
        export(str(tmp_path / "checkpoints"), str(start / ".." / "start"), config=forked)
    assert contents(start) == before


def test_what_others_put_into_an_export_stays(tmp_path: Path) -> None:
    config, target = config_of(), tmp_path / "out"
    checkpointed(tmp_path / "checkpoints", config, 1)
    export(str(tmp_path / "checkpoints"), str(target), config=config)
    before = set(contents(target))
    (target / "notes.txt").write_text("mine")
    export(str(tmp_path / "checkpoints"), str(target), config=config)
    assert (target / "notes.txt").read_text() == "mine"
    assert set(contents(target)) == before | {"notes.txt"}


def test_an_export_that_cannot_be_put_in_place_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, target, rename = config_of(), tmp_path / "out", Path.rename
    checkpointed(tmp_path / "checkpoints", config, 1)
    export(str(tmp_path / "checkpoints"), str(target), config=config)
    (target / "notes.txt").write_text("mine")
    before = contents(tmp_path)

    def refusing(self: Path, place: Path) -> Path:
        if place == target and not self.name.endswith(".before"):
            raise OSError("the disk is gone")
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(UserError, match=f"{target} cannot be written: the disk is gone"):
        export(str(tmp_path / "checkpoints"), str(target), config=config)
    assert contents(tmp_path) == before


def test_an_empty_or_new_folder_is_taken(tmp_path: Path) -> None:
    config = config_of()
    checkpointed(tmp_path / "checkpoints", config, 1)
    (tmp_path / "empty").mkdir()
    for target in ("empty", "new/below"):
        assert export(str(tmp_path / "checkpoints"), str(tmp_path / target), config=config) == 1
        assert (tmp_path / target / "config.json").exists()


def test_an_export_can_be_the_start_of_another_run(tmp_path: Path) -> None:
    config = config_of()
    checkpointed(tmp_path / "checkpoints", config, 1)
    export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config)
    again = run_config(model={"kind": "hf", "path": str(tmp_path / "out")})
    expected = checkpointed(tmp_path / "more", again, 1)
    export(str(tmp_path / "more"), str(tmp_path / "out2"), config=again)
    assert torch.equal(logits(load(str(tmp_path / "out2")).eval()), expected[1])


def test_the_card_says_what_was_trained_and_how_it_evaluated(tmp_path: Path) -> None:
    config = config_of(run={"name": "first"}, algorithm={"aggregation": {"kind": "delta_l", "alpha": 0.75}})
    checkpointed(tmp_path / "checkpoints", config, 7)
    export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config, facts={"held-out accuracy, after": 0.5})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# first, policy version 7" in card
    assert "| aggregation | kind delta_l, alpha 0.75 |" in card
    assert "| held-out accuracy, after | 0.5 |" in card


def test_others_may_read_an_export(tmp_path: Path) -> None:
    config = config_of()
    checkpointed(tmp_path / "checkpoints", config, 1)
    export(str(tmp_path / "checkpoints"), str(tmp_path / "model"), config=config)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o644}
