"""LoRA: low-rank adapters beside some linear layers are trained, all else is frozen (through peft).

Nobody outside the learner knows: what is published and exported are whole weights, named as in the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltal.config.lora import Lora
from deltal.errors import ModelError, one_line

NAME = "default"
"""peft's name of the one adapter."""


def adapt(model: torch.nn.Module, lora: Lora, *, seed: int) -> None:
    """Put adapters into `model`, which stands for the same function still (B = 0), and freeze everything else.

    A is drawn by `seed`, the same on all ranks. Raises ModelError for targets that are not linear layers of the decoder
    layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(lora.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, model, NAME)
        except ValueError as error:
            raise ModelError(f"learner.lora.targets {', '.join(lora.targets)}: {one_line(error, line=0)}") from error
    # The head is used by its weight alone, and the embedding may be the same matrix.
    outside = [name for name, _ in _adapted(model) if ".layers." not in name]
    if outside:
        raise ModelError(f"learner.lora.targets: {outside[0]} is in no decoder layer; only those can be adapted")


def merged(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each weight as the base model has them, adapters folded in; tied weights once.

    Sharded weights are gathered: all ranks iterate together, to the end.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(parameter)
        owner, adapted, kind = name.rpartition(".base_layer.")
        if adapted and kind == "weight":
            weight = weight + _delta(model.get_submodule(owner))
        yield f"{owner}.{kind}" if adapted else name, weight


def fold(model: torch.nn.Module) -> None:
    """Turn an unsharded model with adapters into the plain one with merged weights, in place."""
    for name, layer in _adapted(model):
        base = layer.base_layer
        base.weight.data += _delta(layer)
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, base)
    model.requires_grad_(True)


def write_adapter(model: torch.nn.Module, folder: Path, *, lora: Lora, base: str) -> None:
    """The adapters of an unsharded model as a peft folder on top of the model folder or hub name `base`."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    weights = {
        "base_model.model." + name.replace(f".{NAME}.", "."): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(lora.targets), task_type="CAUSAL_LM",
        base_model_name_or_path=base, inference_mode=True,
    ).save_pretrained(folder)  # fmt: skip


def with_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """`model` with the adapter of a peft folder merged into its weights. Raises ModelError when it does not fit."""
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, folder)
        plain: torch.nn.Module = adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter {folder} does not fit its base model: {one_line(error, line=0)}") from error
    return plain


def whole(tensor: Any) -> Tensor:
    """A tensor of all ranks' shards, detached; all ranks call it together."""
    full: Tensor = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return full


def _adapted(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Name and layer of everything that has an adapter."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def _delta(layer: Any) -> Tensor:
    """What the adapter adds to its layer's weight, [out, in]."""
    scale: float = layer.scaling[NAME]
    return scale * (whole(layer.lora_B[NAME].weight) @ whole(layer.lora_A[NAME].weight))
