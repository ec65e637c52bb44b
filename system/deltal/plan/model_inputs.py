"""What can be known to be wrong with a model before its weights are read: lengths, heads, tokenizer, chat template."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltal.config import ChatConfig, HfModel, RunConfig
from deltal.config.run import RANDOM_POSITIONS
from deltal.data.chat import Chat, no_template
from deltal.data.made_models import folder_of_made, gguf_facts, gguf_file, is_adapter
from deltal.data.tokenizer import byte_tokenizer, folder_of
from deltal.errors import ConfigError, ModelError
from deltal.plan.lengths import check_heads, check_length, text_facts
from deltal.plan.model_folder import TOKENIZER, base_of, check_model_folder, read_config
from deltal.types import Message, Prompt

ASKED = Prompt(id="0", task="", messages=(Message(role="user", content="1 + 1?"),), answer="2")
"""Whatever the data ask, a template must take this."""


def check_model(settings: RunConfig, *, hub: bool) -> list[str]:
    """Raises the UserError of what is wrong with the model, or with the settings for this model.

    `hub`: files of a hub name may be fetched, all but its weights. Returns the names that could not be looked at.
    """
    model = settings.model
    if model.kind == "hf":
        check_model_folder(model.path)
    facts = _facts(settings, hub=hub)
    if facts is None:
        return [f"model {_source(model) if isinstance(model, HfModel) else getattr(model, 'package', '')}"]
    check_length(facts, settings)
    check_heads(facts, settings)
    chat = chat_at_hand(settings, hub=hub)
    if chat is None:
        if settings.chat.template == "model" and facts.get("chat_template") is None:
            raise no_template(getattr(model, "package", "the model"))
        return []
    tokens, ends = chat.encode(ASKED).tolist(), chat.stop_token_ids
    if not tokens:
        raise ConfigError(f"chat.template = {settings.chat.template!r} makes no token of a message: an empty template?")
    rows = text_facts(facts).get("vocab_size")
    if isinstance(rows, int) and max([*tokens, *ends]) >= rows:
        raise ModelError(
            f"the tokenizer, or eos_token_id of generation_config.json, gives token {max([*tokens, *ends])}, but the "
            f"model knows {rows} tokens: its config and its tokenizer do not belong together"
        )
    return []


def chat_at_hand(settings: RunConfig, *, hub: bool) -> Chat | None:
    """How this run makes tokens of messages; None when the tokenizer is not here, or not made yet.

    Raises ModelError when it cannot be used.
    """
    model = settings.model
    if model.kind == "random":
        return _chat(_byte_folder().name, settings.chat)
    if model.kind == "gguf_package":
        made = folder_of_made(model)
        return _chat(str(made), settings.chat) if (made / "config.json").is_file() else None
    folder = Path(model.path).expanduser()
    if any((folder / name).is_file() for name in TOKENIZER):  # an adapter may have one of its own
        return _chat(str(folder), settings.chat)
    known = _at_hand(_source(model), hub=hub)
    return None if known is None else _chat(str(known), settings.chat)


@functools.cache  # asked for twice, and a tokenizer takes a second
def _chat(folder: str, settings: ChatConfig) -> Chat:
    return Chat(folder, settings)


@functools.cache
def _byte_folder() -> tempfile.TemporaryDirectory[str]:
    """The tokenizer of random models, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="deltal-tokenizer-")
    byte_tokenizer().save_pretrained(folder.name)
    return folder


def _facts(settings: RunConfig, *, hub: bool) -> Mapping[str, Any] | None:
    """The model's config, as far as it is known without its weights; None when it is not here."""
    model = settings.model
    if model.kind == "random":
        shape = model.shape
        return {
            "hidden_size": shape.hidden_size, "num_attention_heads": shape.heads, "head_dim": shape.head_dim,
            "max_position_embeddings": RANDOM_POSITIONS, "vocab_size": shape.vocab_size,
        }  # fmt: skip
    if model.kind == "gguf_package":
        made = folder_of_made(model)
        if (made / "config.json").is_file():
            return read_config(made)
        try:
            return gguf_facts(gguf_file(model.package))  # converting it would take half a minute
        except ModelError:
            return None  # it may be where the actors run
    known = _at_hand(_source(model), hub=hub)
    return None if known is None else read_config(known)


def _source(model: HfModel) -> str:
    """Folder or hub name of the whole model, which an adapter names as its base."""
    folder = Path(model.path).expanduser()
    return base_of(folder) if is_adapter(folder) else model.path


def _at_hand(source: str, *, hub: bool) -> Path | None:
    """The folder with config and tokenizer, not always weights, of a model folder or hub name; None when not here.

    A hub that does not answer is no error yet: the actors may run where it does.
    """
    for is_local in (True, False) if hub else (True,):
        try:
            folder = folder_of(source, is_local=is_local)
        except ModelError:
            continue
        if (folder / "config.json").is_file():
            return folder
    return None
