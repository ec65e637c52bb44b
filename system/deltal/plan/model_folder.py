"""Looking at a model folder without loading it: is everything there, and what shape is it?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deltal.config import GgufPackageModel, HfModel, ModelShape, RandomModel
from deltal.data.made_models import ADAPTER, is_adapter
from deltal.errors import ModelError, one_line

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_model_folder(path: str) -> None:
    """Passes a hub name and a complete local folder. Raises ModelError naming what a local folder lacks.

    What exists, or begins like a path (`/`, `./`, `../`, `~`), is a folder; anything else is a hub name.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith(("/", "./", "../", "~", ".\\")) or path in (".", "..") or path.count("/") > 1:
            raise ModelError(f"model.path = {path!r}: there is no such folder")
        return
    if not folder.is_dir():
        raise ModelError(f"model.path = {path!r} is a file: give the folder that holds it")
    if is_adapter(folder):
        if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
            raise ModelError(f"model.path = {path!r} is a LoRA adapter without weights: no adapter_model.safetensors")
        check_model_folder(base_of(folder))
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path = {path!r} lacks config.json: it is no Hugging Face model folder")
    read_config(folder)
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise ModelError(f"model.path = {path!r} lacks weights: no *.safetensors or *.bin in it")
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelError(f"model.path = {path!r} lacks a tokenizer: none of {', '.join(TOKENIZER)} in it")


def model_shape(model: HfModel | GgufPackageModel | RandomModel, folder: str | None = None) -> ModelShape | None:
    """The shape from the settings, or from `folder` (for `hf`: its own path); None when neither says.

    Raises ModelError when config.json is there but is no JSON object.
    """
    if model.shape is not None:
        return model.shape
    if folder is None and isinstance(model, HfModel):
        folder = model.path
    if folder is not None and is_adapter(folder):
        folder = base_of(Path(folder).expanduser())
    if folder is None or not (Path(folder).expanduser() / "config.json").is_file():
        return None
    return shape_of(read_config(Path(folder).expanduser()))


def base_of(adapter: Path) -> str:
    """Folder or hub name of the model that a LoRA adapter belongs to. Raises ModelError when it names none."""
    base = read_config(adapter, ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{adapter / ADAPTER} names no base_model_name_or_path")
    return base


def read_config(folder: Path, name: str = "config.json") -> Mapping[str, Any]:
    """The folder's config.json. Raises ModelError when it is no JSON object."""
    try:
        facts = json.loads((folder / name).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / name} cannot be read: {one_line(error)}") from error
    if not isinstance(facts, Mapping):
        raise ModelError(f"{folder / name} is no JSON object")
    return facts


def shape_of(facts: Mapping[str, Any]) -> ModelShape | None:
    """The shape in a Hugging Face config; None for an architecture that `ModelShape` cannot describe."""
    heads, width = facts.get("num_attention_heads"), facts.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return None
    try:
        return ModelShape.model_validate(
            {
                "architecture": facts.get("model_type"),
                "vocab_size": facts.get("vocab_size"),
                "hidden_size": width,
                "intermediate_size": facts.get("intermediate_size"),
                "layers": facts.get("num_hidden_layers"),
                "heads": heads,
                "kv_heads": facts.get("num_key_value_heads") or heads,
                "head_dim": facts.get("head_dim") or width // heads,
                "tied_embeddings": facts.get("tie_word_embeddings", False),
            }
        )
    except ValidationError:
        return None
