"""The trunk of a causal language model: all but its head. Where its decoder layers are, and computing them anew."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from deltal.errors import ModelError


def trunk_of(model: torch.nn.Module) -> Any:
    """What turns tokens into hidden states: `model.model` in most families. Raises ModelError when there is none."""
    trunk = getattr(model, "base_model", model)  # transformers' name for it, whatever a family calls its own
    if trunk is model:
        raise ModelError(f"{type(model).__name__} is no model with a head on a trunk: not supported")
    return trunk


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers in order: the largest list of modules of the trunk. Raises ModelError when there is none."""
    lists = [module for module in trunk_of(model).modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers: not supported")
    sizes = [sum(parameter.numel() for parameter in found.parameters()) for found in lists]
    return list(lists[sizes.index(max(sizes))].children())


def compute_anew(model: torch.nn.Module) -> None:
    """Keep each layer's input only, and compute the layer a second time in backward.

    Not by transformers' switch, which works in training mode alone: in that mode dropout and its kin are on.
    """
    for layer in decoder_layers(model):
        # Nothing is random in the policy's forward, so no state needs to be kept.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
