"""Models: where their weights come from, and the folder every actor loads them from.

`prepare` turns a model setting into a Hugging Face folder (or leaves a hub name alone); converted and random models
are made once and cached. `load` gives the torch module the learner trains.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltal.config import GgufPackageModel, HfModel, ModelConfig, ModelShape, RandomModel
from deltal.config.run import RANDOM_POSITIONS
from deltal.data.made_models import ADAPTER, folder_of_made, gguf_file, made_folder, ready_folder
from deltal.data.tokenizer import byte_tokenizer, copy_tokenizer
from deltal.errors import ModelError, one_line
from deltal.learner.attention import ATTENTION, packed_attention
from deltal.learner.head import attach
from deltal.learner.lora import with_adapter


def prepare(model: ModelConfig) -> str:
    """A folder (or hub name) that transformers and vLLM load. Raises ModelError when it cannot be made."""
    ready = ready_folder(model)
    if ready is not None:
        return ready
    if isinstance(model, HfModel):
        return _merged_adapter(Path(model.path).expanduser())
    make: Any = _make_random if isinstance(model, RandomModel) else _convert_gguf
    return _made(folder_of_made(model), lambda folder: make(model, folder))


def _made(folder: Path, make: Callable[[Path], None]) -> str:
    """The cached folder, made when it is not there yet."""
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its final place and renamed, so that another process never sees half a model.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            make(Path(temporary) / "model")
            try:
                (Path(temporary) / "model").rename(folder)
            except OSError:
                if not (folder / "config.json").exists():
                    raise
    return str(folder)


def _merged_adapter(adapter: Path) -> str:
    """A folder with the adapter's base model and the adapter merged into it, made once for each adapter's content."""
    key = b"".join(file.read_bytes() for file in sorted(adapter.glob("adapter_*")))

    def make(folder: Path) -> None:
        base = str(json.loads((adapter / ADAPTER).read_text()).get("base_model_name_or_path"))
        merged: Any = with_adapter(_from_pretrained(base, torch.float32), adapter)
        merged.save_pretrained(folder)
        copy_tokenizer(str(adapter) if (adapter / "tokenizer.json").exists() else base, folder)

    return _made(made_folder("adapter", key), make)


def load(folder: str, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The causal language model of a folder or hub name, parameters in `dtype`, all trainable.

    It is in evaluation mode and must stay so: what samples has no dropout, noise of a router or layers left out, so
    what is trained must have none either. The config keeps what it says of them, for the export.
    Raises ModelError in one line when transformers cannot load it.
    """
    model = _from_pretrained(folder, dtype)
    model.config.use_cache = False  # With a cache, packed sequences would see each other, silently.
    attach(model)
    return model.eval()  # type: ignore[no-any-return]


def _from_pretrained(folder: str, dtype: torch.dtype) -> Any:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, partial(packed_attention, otherwise=sdpa_attention_forward))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except KeyError as error:
        # Classes of attention by name: an old architecture, into which ours cannot be put.
        why = "its attention cannot be replaced: not supported" if ATTENTION in str(error) else f"no {error}"
        raise ModelError(f"{folder} cannot be loaded: {why}") from error
    except Exception as error:  # a cut safetensors file or a wrong shape has an exception of its own
        raise ModelError(f"{folder} cannot be loaded: {one_line(error, line=0)}") from error


def hf_config(shape: ModelShape) -> Any:
    """The transformers config of a shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        shape.architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=RANDOM_POSITIONS,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )


def _make_random(model: RandomModel, folder: Path) -> None:
    """Random weights from the seed, and a byte tokenizer whose token 256 ends a turn."""
    from transformers import AutoModelForCausalLM

    if model.shape.vocab_size < 258:
        raise ModelError("a random model needs vocab_size of at least 258: 256 bytes and two special tokens")
    with torch.random.fork_rng():
        torch.manual_seed(model.seed)
        module = AutoModelForCausalLM.from_config(hf_config(model.shape), dtype=torch.float32)
    module.generation_config.eos_token_id = 256
    module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _convert_gguf(model: GgufPackageModel, folder: Path) -> None:
    """Weights and tokenizer of a .gguf file as float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file(model.package)
    where, name = str(file.parent), file.name
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # vLLM would look for GGUF kernels otherwise.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    # The loaded object refuses to be saved; a plain one with the same weights does not.
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
