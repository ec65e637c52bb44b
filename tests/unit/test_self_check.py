"""What the learner would compute otherwise than the model itself is refused in one line, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deltal.errors import ModelError
from deltal.learner import head
from deltal.learner.attention import Segment
from deltal.learner.batch import pack
from deltal.learner.model import load
from deltal.learner.published import published
from deltal.learner.self_check import check_forward
from deltal.learner.step import forward
from deltal.learner.trainer import Trainer
from tests.unit.builders import family_folder, run_config, scored
from tests.unit.families import COMPUTED, REFUSED, settings_of
from tests.unit.test_batch import items_of

pytestmark = pytest.mark.usefixtures("process_group", "model_cache")


@pytest.mark.parametrize("family", sorted(COMPUTED))
def test_a_family_is_computed_packed_as_by_its_own_forward(family: str, tmp_path: Path) -> None:
    check_forward(load(family_folder(tmp_path, **settings_of(family))))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_would_be_computed_wrong_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    folder = family_folder(tmp_path, **settings_of(family))
    with pytest.raises(ModelError, match=REFUSED[family]) as caught:
        check_forward(load(folder))
    assert "\n" not in str(caught.value)
    assert "not supported" in str(caught.value)


@pytest.mark.parametrize("family", ["stablelm", "gemma3_text", "granite", "qwen3_moe", "gpt2"])
def test_a_mask_of_the_whole_row_gives_the_same_as_block_by_block(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the way on GPU."""
    model = load(family_folder(tmp_path, **settings_of(family)))
    groups = [scored(i, rewards=[0.0, 1.0], lengths=[9, 5]) for i in range(2)]
    (micro,) = pack(items_of(groups), budget=128, ranks=1)[0]
    with torch.no_grad():
        blocks = forward(model, micro, 1.0)[0]
        monkeypatch.setattr(head, "tell_segments", lambda segments: micro.attention_mask())
        torch.testing.assert_close(forward(model, micro, 1.0)[0], blocks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [lambda logits: logits * 1.5, lambda logits: 5 * torch.tanh(logits / 5)])
def test_a_head_that_does_something_no_setting_names_is_found_in_the_numbers(change: Any, tmp_path: Path) -> None:
    model: Any = load(family_folder(tmp_path, **settings_of("llama")))
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: change(own(hidden))
    with pytest.raises(ModelError, match="nats off those of the model's own forward"):
        check_forward(model)


def test_layers_that_lose_the_mask_are_found_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_folder(tmp_path, **settings_of("llama"))

    def forgetful(segments: list[Segment]) -> torch.Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)

    monkeypatch.setattr(head, "tell_segments", forgetful)
    with pytest.raises(ModelError, match="changes the mask it is given"):
        Trainer(run_config(), folder, str(tmp_path / "checkpoints"))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "olmoe", "gemma3_text"])
def test_weights_are_published_as_the_model_s_own_files_have_them(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = family_folder(tmp_path, **settings_of(family))
    files, told = load_file(Path(folder) / "model.safetensors"), dict(published(load(folder)))
    assert told.keys() == files.keys()
    assert all(torch.equal(told[name], files[name]) for name in files)
