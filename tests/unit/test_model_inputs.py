"""A dry run makes the tokens of one prompt with the model's own tokenizer: what fails there would fail in the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deltal.data import made_models
from deltal.errors import ConfigError, DataError, ModelError
from deltal.plan.inputs import check_inputs
from tests.unit.builders import run_config
from tests.unit.test_tokenizer import LLAMA, byte_level, write

OWN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def model_folder(folder: Path, **settings: Any) -> dict[str, str]:
    write(folder, byte_level(), LLAMA | settings)
    (folder / "model.safetensors").write_text("")
    return {"kind": "hf", "path": str(folder)}


def check(model: dict[str, str], **chat: Any) -> list[str]:
    return check_inputs(run_config(model=model, chat=chat), hub=False)


def test_a_model_without_a_chat_template_is_refused_with_what_to_set(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"has no chat template: set chat\.template=chatml"):
        check(model)
    for template in ("chatml", "plain", "{{ messages[0].content }}"):
        assert check(model, template=template) == []
    assert check(model_folder(tmp_path, chat_template=OWN)) == []


def test_a_template_that_refuses_the_run_s_prompts_is_named_before_start(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt, please') }}{% endif %}" + OWN
    model = model_folder(tmp_path, chat_template=strict)
    assert check(model) == []
    with pytest.raises(DataError, match="no system prompt, please"):
        check(model, system_prompt="Be brief.")
    for kind in ("random", "hf"):
        with pytest.raises(DataError, match="chat template fails on prompt"):
            check(model if kind == "hf" else {"kind": kind}, template="{{ messages[9].content.x }}")


def test_tokens_that_the_model_does_not_know_are_refused_before_start(tmp_path: Path) -> None:
    model = model_folder(tmp_path, chat_template=OWN)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50}))
    with pytest.raises(ModelError, match=r"gives token \d+, but the model knows 50 tokens"):
        check(model)


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ("256", "eos_token_id = '256' is neither a token's number nor a list of them"),
        ([[2]], "is neither a token's number"),
        ([2, 99999], "gives token 99999, but the model knows 400 tokens"),
    ],
)
def test_ends_of_a_response_that_are_no_tokens_are_refused_before_start(ends: Any, says: str, tmp_path: Path) -> None:
    model = model_folder(tmp_path, chat_template=OWN)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ModelError, match=re.escape(says)):
        check(model)


def test_a_template_that_makes_nothing_of_a_message_is_refused_before_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="makes no token of a message"):
        check(model_folder(tmp_path, chat_template=OWN), template="{{ '' }}")


def test_a_tokenizer_that_cannot_be_used_is_refused_before_start(tmp_path: Path) -> None:
    model = model_folder(tmp_path, chat_template=OWN)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        check(model)


@pytest.mark.parametrize("template", [None, OWN])
def test_a_gguf_file_is_asked_for_its_template_and_length_without_converting_it(
    template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(700)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.setenv("DELTAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deltal.plan.model_inputs.gguf_file", lambda package: tmp_path / "tiny.gguf")
    facts = made_models.gguf_facts(tmp_path / "tiny.gguf")
    assert facts == {"max_position_embeddings": 700, "chat_template": template}
    model, short = {"kind": "gguf_package", "package": "tiny"}, {"max_response_tokens": 99}
    with pytest.raises(ConfigError, match="but the model takes 700"):
        check_inputs(run_config(model=model), hub=False)
    if template:
        assert check_inputs(run_config(model=model, rollout=short), hub=False) == []
    else:
        with pytest.raises(ConfigError, match=r"tiny has no chat template: set chat\.template=chatml"):
            check_inputs(run_config(model=model, rollout=short), hub=False)
    assert not (tmp_path / "cache").exists()


def test_a_model_in_a_package_that_is_not_here_is_not_looked_at() -> None:
    assert check({"kind": "gguf_package", "package": "no-such-package"}) == ["model no-such-package"]
