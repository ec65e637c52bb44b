"""What can be known to be wrong with a model before its weights are read: lengths, heads, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltal.config import RunConfig
from deltal.config.run import RANDOM_POSITIONS
from deltal.data.tokenizer import folder_of
from deltal.errors import ModelError
from deltal.plan.lengths import check_heads, check_length
from deltal.plan.model_folder import ADAPTER, base_of, check_model_folder, read_config


def check_model(settings: RunConfig, *, hub: bool) -> list[str]:
    """Raises the UserError of what is wrong with the model, or with the settings for this model.

    `hub`: files of a hub name may be fetched, all but its weights. Returns the names that could not be looked at.
    """
    model = settings.model
    if model.kind == "random":
        shape = {"hidden_size": model.shape.hidden_size, "num_attention_heads": model.shape.heads}
        facts: Mapping[str, Any] = {
            **shape,
            "head_dim": model.shape.head_dim,
            "max_position_embeddings": RANDOM_POSITIONS,
        }
        check_length(facts, settings)
        check_heads(facts, settings)
        return []
    if model.kind == "gguf_package":
        return []
    check_model_folder(model.path)
    folder = Path(model.path).expanduser()
    source = base_of(folder) if (folder / ADAPTER).is_file() else model.path
    known = _at_hand(source, hub=hub)
    if known is None:
        return [f"model {source}"]
    facts = read_config(known)
    check_length(facts, settings)
    check_heads(facts, settings)
    return []


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
