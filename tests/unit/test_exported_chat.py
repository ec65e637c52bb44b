"""An export renders and ends prompts as its run did, in plain transformers; and its card says how."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from deltal.config import ChatConfig
from deltal.data.chat import Chat
from deltal.data.tokenizer import copy_tokenizer
from deltal.learner.export import export, write_chat
from deltal.learner.model import load, prepare
from deltal.types import Message, Prompt
from tests.unit.builders import run_config
from tests.unit.test_export import checkpointed, config_of, contents
from tests.unit.test_tokenizer import LLAMA, byte_level, write

OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[it]{% endif %}"
WITH_DEFAULT = "{% if messages[0].role != 'system' %}[system]be kind{% endif %}" + OWN
OWNS = {"none": None, "own": OWN, "own with a default system prompt": WITH_DEFAULT}
TEMPLATES = ("model", "chatml", "plain", "Q: {{ messages[-1]['content'] }}\nA:")
HARD = 'Say "yes" \\ no\n{{ 1 }} {% raw %} é 😀 | done'


def start(folder: Path, own: str | None, **settings: Any) -> Path:
    said = byte_level()
    said.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return write(folder, said, LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
                 | ({"chat_template": own} if own else {}))  # fmt: skip


def exported(source: Path, target: Path, settings: ChatConfig) -> dict[str, str]:
    target.mkdir()
    copy_tokenizer(str(source), target)
    return write_chat(settings, target)


@pytest.mark.parametrize("system", [None, HARD])
@pytest.mark.parametrize(
    ("own", "template"),
    # Without a template of its own a model cannot be trained with it: refused before start.
    [pair for pair in itertools.product(sorted(OWNS), TEMPLATES) if pair != ("none", "model")],
)
def test_plain_transformers_makes_the_prompts_of_the_run_from_its_export(
    own: str, template: str, system: str | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    settings = ChatConfig(template=template, system_prompt=system, prefill="So: ")
    source = start(tmp_path / "start", OWNS[own], add_bos_token=True)
    exported(source, tmp_path / "out", settings)
    question = Message(role="user", content="1 + 1?")
    expected = Chat(str(source), settings).encode(Prompt(id="p", task="gsm8k", messages=(question,), answer="2"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "1 + 1?"}]
    rendered = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) + "So: "
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == expected.tolist()
    # Whoever begins a run from the export gets the same prompts again, and not the system prompt twice.
    again = Chat(str(tmp_path / "out"), settings.model_copy(update={"template": "model"}))
    assert again.encode(Prompt(id="p", task="gsm8k", messages=(question,), answer="2")).tolist() == expected.tolist()


def test_files_stay_as_they_are_when_they_render_the_run_s_prompts_already(tmp_path: Path) -> None:
    source = start(tmp_path / "start", OWN)
    told = exported(source, tmp_path / "out", ChatConfig(prefill="So: "))
    tokenizer_files = {name: data for name, data in contents(source).items() if name != "config.json"}
    copied = {name: data for name, data in contents(tmp_path / "out").items() if name != "generation_config.json"}
    assert copied == tokenizer_files
    assert told["chat template"] == "the start model's own"
    chatml = start(tmp_path / "chatml", "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                   "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
    assert exported(chatml, tmp_path / "out2", ChatConfig(template="chatml"))["chat template"] == "chatml"
    assert not (tmp_path / "out2" / "chat_template.jinja").exists(), "the model's own does the same, said otherwise"


def test_the_tokens_that_ended_a_response_end_one_of_the_export(tmp_path: Path) -> None:
    source = start(tmp_path / "start", None)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_k": 7}))
    settings = ChatConfig(template="chatml")
    exported(source, tmp_path / "out", settings)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": list(Chat(str(source), settings).stop_token_ids), "top_k": 7}
    assert len(kept["eos_token_id"]) == 2


def test_the_card_names_template_system_prompt_and_prefill(tmp_path: Path) -> None:
    told = exported(
        start(tmp_path / "start", None), tmp_path / "out",
        ChatConfig(template="chatml", system_prompt="a | b\nc", prefill="<think>\n"),
    )  # fmt: skip
    assert told["chat template"] == "chatml, in chat_template.jinja"
    assert told["system prompt"] == r'`"a \| b\nc"`'
    assert told["prefill"].startswith(r'`"<think>\n"`')
    told = exported(write(tmp_path / "llama", byte_level(), LLAMA), tmp_path / "out2", ChatConfig(template="plain"))
    assert told["tokenizer"] == (
        "load it with PreTrainedTokenizerFast: AutoTokenizer makes it a LlamaTokenizer, with other tokens"
    )


@pytest.mark.usefixtures("process_group", "model_cache")
def test_an_export_of_a_run_says_its_template_and_forgets_that_of_the_export_before(tmp_path: Path) -> None:
    config, out = config_of(), tmp_path / "out"
    checkpointed(tmp_path / "checkpoints", config, 1)
    for template, says in (
        ("Q: {{ messages[-1].content }}", "the run's own, in chat_template.jinja"),
        ("model", "own |"),
    ):
        chat = ChatConfig(template=template)
        export(str(tmp_path / "checkpoints"), str(out), config=config.model_copy(update={"chat": chat}))
        assert f"| chat template | {says}" in (out / "README.md").read_text().replace("the start model's ", "")
    made = Path(prepare(config.model))
    assert (out / "chat_template.jinja").read_bytes() == (made / "chat_template.jinja").read_bytes()
    assert load(str(out))
    assert run_config(model={"kind": "hf", "path": str(out)})
