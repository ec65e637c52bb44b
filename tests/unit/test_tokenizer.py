"""Tokenizers are used and copied as their files say, whatever class a config names. All are made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltal.config import ChatConfig
from deltal.data.chat import Chat
from deltal.data.tokenizer import copy_tokenizer, open_tokenizer
from deltal.errors import ModelError
from deltal.types import Message, Prompt

TEXT = "the answer is\n46 + 7,  naïve"
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}


def byte_level(**model: Any) -> Any:
    """A trained byte-level BPE with merges, `<s>` and `</s>` as tokens 0 and 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator([TEXT, "the largest number is the answer, therefore"] * 9, trainer)
    return tokenizer


def write(folder: Path, tokenizer: Any, settings: dict[str, Any], model_type: str = "llama") -> Path:
    """A model folder's tokenizer files, as a publisher would write them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 300}))
    return folder


def asking(content: str) -> Prompt:
    return Prompt(id="p", task="gsm8k", messages=(Message(role="user", content=content),), answer="1")


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_prompts_and_responses_are_as_tokenizer_json_says_whatever_class_is_named(
    tmp_path: Path, named: str, model_type: str
) -> None:
    said = byte_level()
    folder = write(tmp_path, said, LLAMA | {"tokenizer_class": named}, model_type)
    chat = Chat(str(folder), ChatConfig(template="plain"))
    expected = said.encode(TEXT).ids
    assert len(expected) < len(TEXT), "the tokenizer has merges"
    assert chat.encode(asking(TEXT)).tolist() == expected
    assert chat.decode(expected) == TEXT
    assert chat.decode(said.encode("the answer is\n46").ids) == "the answer is\n46"
    assert chat.stop_token_ids == (1,)


def test_special_tokens_and_chat_template_are_those_of_the_files(tmp_path: Path) -> None:
    said = byte_level()
    template = "<s>{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    folder = write(tmp_path, said, LLAMA | {"chat_template": template})
    chat = Chat(str(folder), ChatConfig())
    assert chat.encode(asking("a </s> b")).tolist() == [
        0,
        *Chat(str(folder), ChatConfig()).encode(asking("a </s> b"))[1:],
    ]
    tokens = chat.encode(asking("a </s> b")).tolist()
    assert tokens[0] == 0
    assert 1 not in tokens, "a special token's string in a question stays text"
    assert chat.decode(tokens) == "a </s> b\n"


def test_a_token_that_the_settings_add_to_the_file_is_known(tmp_path: Path) -> None:
    added = {"content": "<tool>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    said = byte_level()
    size = said.get_vocab_size()
    settings = LLAMA | {"added_tokens_decoder": {str(size): added | {"special": False}}}
    chat = Chat(str(write(tmp_path, said, settings)), ChatConfig(template="plain"))
    assert chat.vocab_size == size + 1
    tokens = chat.encode(asking("x<tool>y")).tolist()
    assert tokens[1] == size
    assert chat.decode(tokens) == "x<tool>y"
    settings = LLAMA | {"added_tokens_decoder": {str(size + 3): added | {"special": False}}}
    with pytest.raises(ModelError, match=f"gives '<tool>' the id {size + 3}, but tokenizer.json lacks it"):
        Chat(str(write(tmp_path, said, settings)), ChatConfig())


def test_a_tokenizer_that_disagrees_with_its_file_is_refused(tmp_path: Path) -> None:
    added = {"content": "answer", "lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
    folder = write(tmp_path, byte_level(), LLAMA | {"added_tokens_decoder": {"300": added | {"special": False}}})
    with pytest.raises(ModelError, match=r"tokenizer.json and the tokenizer .* makes of it disagree") as caught:
        Chat(str(folder), ChatConfig())
    assert "\n" not in str(caught.value)


def test_an_end_token_that_only_the_class_names_is_kept(tmp_path: Path) -> None:
    said = byte_level()
    said.add_special_tokens(["<|endoftext|>"])
    folder = write(tmp_path, said, {"model_max_length": 1024}, "gpt2")  # all that gpt2's own file says
    assert Chat(str(folder), ChatConfig(template="plain")).stop_token_ids == (said.token_to_id("<|endoftext|>"),)


def test_padding_truncation_and_dropout_of_the_file_do_not_reach_prompts(tmp_path: Path) -> None:
    plain = byte_level().encode(TEXT + "</s>").ids
    said = byte_level(dropout=0.5)
    said.enable_truncation(4)
    said.enable_padding(length=64, pad_id=1, pad_token="</s>")
    chat = Chat(str(write(tmp_path, said, LLAMA)), ChatConfig(template="plain"))
    hidden = [token for token in chat.encode(asking(TEXT + "</s>")).tolist() if token > 1]
    assert hidden[: len(plain) - 1] == plain[:-1]
    assert len(hidden) < len(plain) + 4


def test_a_folder_with_vocabulary_and_merges_only_works(tmp_path: Path) -> None:
    byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"} | {"eos_token": "</s>"})
    )
    chat = Chat(str(tmp_path), ChatConfig(template="plain"))
    assert chat.decode(chat.encode(asking(TEXT))) == TEXT


def test_files_that_lose_the_spaces_are_refused(tmp_path: Path) -> None:
    byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="tokenizer"):
        Chat(str(tmp_path), ChatConfig())


def test_a_hub_name_is_read_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, cache = byte_level(), tmp_path / "hub"
    repository = cache / "models--some--model"
    snapshot = write(repository / "snapshots" / ("a" * 40), said, LLAMA)
    (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chat = Chat("some/model", ChatConfig(template="plain"))
    assert chat.encode(asking(TEXT)).tolist() == said.encode(TEXT).ids
    assert chat.stop_token_ids == (1, 7), "generation_config.json counts for a hub name too"
    copy_tokenizer("some/model", tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()
    with pytest.raises(ModelError, match="no tokenizer can be loaded from 'some/other'"):
        Chat("some/other", ChatConfig())


def test_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", byte_level(), LLAMA), tmp_path / "target"
    more = (
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json",
        "merges.txt", "generation_config.json", "additional_chat_templates/tool_use.jinja",
    )  # fmt: skip
    for name in more:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"{{}} \n {name}")
    (source / "model.safetensors").write_text("weights")
    target.mkdir()
    copy_tokenizer(str(source), target)
    copied = {file.relative_to(target): file.read_bytes() for file in target.rglob("*") if file.is_file()}
    names = {Path(name) for name in (*more, "tokenizer.json", "tokenizer_config.json")}
    assert copied == {name: (source / name).read_bytes() for name in names}


def test_a_copied_tokenizer_makes_the_same_tokens(tmp_path: Path) -> None:
    said, target = byte_level(), tmp_path / "target"
    target.mkdir()
    copy_tokenizer(str(write(tmp_path / "source", said, LLAMA)), target)
    assert open_tokenizer(str(target))(TEXT, add_special_tokens=False)["input_ids"] == said.encode(TEXT).ids


def test_nothing_to_copy_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        copy_tokenizer(str(tmp_path / "empty"), tmp_path)
