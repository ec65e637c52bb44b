"""The weights as the engine knows them: by the names of the model's files, adapters folded in.

transformers holds some architectures otherwise than their files do, the experts of a mixture in one tensor for
instance. An engine that is handed such a tensor passes over it, and its experts keep no weights at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from deltal.errors import ModelError
from deltal.learner.lora import merged


def published(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each weight as the model's files have them, one after the other; tied weights once.

    Sharded weights are gathered: all ranks iterate together, to the end, and see the same order. Raises ModelError for
    an architecture whose files hold several of its tensors in one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    changes = getattr(model, "_weight_conversions", None)
    for name, tensor in _all(model):
        if not changes:
            yield name, tensor
            continue
        # One at a time, so that never more than one is whole.
        try:
            found = revert_weight_conversion(model, {name: tensor})
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__}: {name} alone cannot be given the form it has in the model's files: not "
                "supported"
            ) from error
        yield from found.items()


def _all(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that belong to the weights, such as a router's correction."""
    yield from merged(model)
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer
