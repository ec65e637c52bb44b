"""What the tokens of one response have in common: sums and means over a response, given to each of its tokens.

A response is never split over micro-batches, so all its trained tokens are at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_response(values: Tensor, sequence: Tensor) -> Tensor:
    """Sum over the tokens of each token's own response: float[T] and int64[T] to float[T]. Differentiable."""
    _, place = torch.unique(sequence, return_inverse=True)
    sums = values.new_zeros(int(place.max()) + 1 if len(place) else 0)
    return sums.index_add(0, place, values)[place]


def mean_over_response(values: Tensor, sequence: Tensor) -> Tensor:
    """Mean over the tokens of each token's own response: float[T] and int64[T] to float[T]. Differentiable."""
    return sum_over_response(values, sequence) / sum_over_response(torch.ones_like(values), sequence)


def same_shape(**named: Tensor | None) -> None:
    """Raises ValueError, naming both, when two of the tensors that are there differ in shape: no broadcasting here."""
    there = [(name, tuple(tensor.shape)) for name, tensor in named.items() if tensor is not None]
    for name, shape in there[1:]:
        if shape != there[0][1]:
            raise ValueError(f"{name} has shape {shape}, but {there[0][0]} has {there[0][1]}")


def needed(sequence: Tensor | None, who: str) -> Tensor:
    """`sequence`, or ValueError when it is missing."""
    if sequence is None:
        raise ValueError(f"{who} needs `sequence`, int64[T]: the number of each token's response")
    return sequence
