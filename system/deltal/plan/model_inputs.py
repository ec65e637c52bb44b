"""What can be known to be wrong with a model before its weights are read: lengths, heads, tokenizer, chat template."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltal.config import RunConfig
from deltal.config.run import RANDOM_POSITIONS
from deltal.data.chat import Chat, no_template
from deltal.data.datasets import load_prompts
from deltal.data.made_models import folder_of_made, gguf_facts, gguf_file
from deltal.data.tokenizer import byte_tokenizer, folder_of
from deltal.errors import ModelError
from deltal.plan.lengths import check_heads, check_length, text_facts
from deltal.plan.model_folder import ADAPTER, TOKENIZER, base_of, check_model_folder, read_config
from deltal.types import Message, Prompt


def check_model(settings: RunConfig, *, hub: bool) -> list[str]:
    """Raises the UserError of what is wrong with the model, or with the settings for this model.

    `hub`: files of a hub name may be fetched, all but its weights. Returns the names that could not be looked at.
    """
    model = settings.model
    if model.kind == "random":
        shape = model.shape
        facts: Mapping[str, Any] = {
            "hidden_size": shape.hidden_size, "num_attention_heads": shape.heads, "head_dim": shape.head_dim,
            "max_position_embeddings": RANDOM_POSITIONS, "vocab_size": shape.vocab_size,
        }  # fmt: skip
        _check_facts(facts, settings)
        with tempfile.TemporaryDirectory() as made_folder:
            byte_tokenizer().save_pretrained(made_folder)
            _check_chat(made_folder, facts, settings, hub=hub)
        return []
    if model.kind == "gguf_package":
        made = folder_of_made(model)
        if (made / "config.json").is_file():
            return _check_folder(made, made, settings, hub=hub)
        return _check_gguf(model.package, settings)
    check_model_folder(model.path)
    folder = Path(model.path).expanduser()
    source = base_of(folder) if (folder / ADAPTER).is_file() else model.path
    known = _at_hand(source, hub=hub)
    if known is None:
        return [f"model {source}"]
    has_own = any((folder / name).is_file() for name in TOKENIZER)
    return _check_folder(known, folder if has_own else known, settings, hub=hub)


def _check_folder(folder: Path, tokenizer: Path, settings: RunConfig, *, hub: bool) -> list[str]:
    """A model's config, and its tokenizer, which an adapter may have of its own."""
    facts = read_config(folder)
    _check_facts(facts, settings)
    _check_chat(str(tokenizer), facts, settings, hub=hub)
    return []


def _check_facts(facts: Mapping[str, Any], settings: RunConfig) -> None:
    check_length(facts, settings)
    check_heads(facts, settings)


def _check_gguf(package: str, settings: RunConfig) -> list[str]:
    """What a .gguf file says of itself; converting it would take half a minute."""
    try:
        file = gguf_file(package)
    except ModelError:
        return [f"model {package}"]  # it may be where the actors run
    facts = gguf_facts(file)
    check_length(facts, settings)
    if settings.chat.template == "model" and facts["chat_template"] is None:
        raise no_template(package)
    return []


def _check_chat(folder: str, facts: Mapping[str, Any], settings: RunConfig, *, hub: bool) -> None:
    """Make the tokens of one prompt. Raises ModelError, ConfigError or DataError when that fails."""
    data = settings.data
    if data.kind == "hf" and not hub and not Path(data.name).exists():
        prompt = Prompt(id="0", task="", messages=(Message(role="user", content="1 + 1?"),), answer="2")
    else:
        prompt = load_prompts(data.model_copy(update={"limit": 1}))[0]
    tokens = Chat(folder, settings.chat).encode(prompt)
    rows = text_facts(facts).get("vocab_size")
    if isinstance(rows, int) and len(tokens) and int(tokens.max()) >= rows:
        raise ModelError(
            f"the tokenizer gives token {int(tokens.max())}, but the model knows {rows} tokens: its config and its "
            "tokenizer do not belong together"
        )


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
