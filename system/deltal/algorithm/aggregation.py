"""Aggregation: the lengths of a batch to one token coefficient per response.

The loss is a plain sum, `loss = Σ_i c_i Σ_t ℓ_it`; all an aggregation says is c_i. A new method is one function
`(lengths, max_length, alpha) -> coefficients` over positive lengths and one line in `AGGREGATIONS`.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Lengths = Tensor | NDArray[Any] | Sequence[int]
Aggregation = Callable[[Tensor, int, float], Tensor]


def delta_l(lengths: Tensor, max_length: int, alpha: float) -> Tensor:
    """ΔL Normalization (arXiv 2509.07558): c_i = L_i^-α / (M Σ_j L_j^-α). Unbiased; least variance at α = 1.

    `lengths`: float64[responses], all positive. Returns float64[responses].
    """
    # Relative to the shortest response, so that no α can make all weights underflow to zero.
    weights = (lengths.min() / lengths).pow(alpha)
    return weights / (max_length * weights.sum())


def dr_grpo(lengths: Tensor, max_length: int, alpha: float) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): c_i = 1 / (B M), `delta_l` at α = 0. Unbiased, high variance."""
    return torch.full_like(lengths, 1.0 / (len(lengths) * max_length))


def grpo(lengths: Tensor, max_length: int, alpha: float) -> Tensor:
    """GRPO (arXiv 2402.03300): c_i = 1 / (B L_i), mean over tokens, then over responses. Biased by length."""
    return 1.0 / (len(lengths) * lengths)


def dapo(lengths: Tensor, max_length: int, alpha: float) -> Tensor:
    """DAPO (arXiv 2503.14476): c_i = 1 / Σ_j L_j, mean over all tokens. Biased by length."""
    return torch.full_like(lengths, 1.0) / lengths.sum()


def sequence_sum(lengths: Tensor, max_length: int, alpha: float) -> Tensor:
    """c_i = 1 / B, sum over tokens, then mean over responses; LUSPO (arXiv 2602.05261) with the objective `gspo`.

    The direction of `dr_grpo`, unbiased like it, but M times as large.
    """
    return torch.full_like(lengths, 1.0 / len(lengths))


AGGREGATIONS: dict[str, Aggregation] = {
    "delta_l": delta_l,
    "dr_grpo": dr_grpo,
    "grpo": grpo,
    "dapo": dapo,
    "sequence_sum": sequence_sum,
}


def token_coefficients(method: str, lengths: Lengths, *, max_length: int, alpha: float = 1.0) -> Tensor:
    """Token coefficient c_i of every response of a whole batch.

    `lengths`: int[responses], policy-written tokens of each response (L_i). `max_length`: M, the constant response
    limit in tokens. `alpha`: exponent of `delta_l`; the other methods do not read it. Returns float64[responses].
    A response of length 0 has coefficient 0 and is in no sum: B counts the others.

    Raises ValueError, naming value and place, for an unknown method, lengths that are no whole numbers or negative
    or above `max_length`, an `alpha` that is negative or not finite, and a batch without any policy-written token.
    """
    if method not in AGGREGATIONS:
        near = difflib.get_close_matches(method, AGGREGATIONS, n=1, cutoff=0.0)[0]
        raise ValueError(f"method = {method!r} is no aggregation; the nearest is {near!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha = {alpha!r} must be a finite number and not negative")
    checked = _checked(lengths, max_length)
    written = checked > 0
    if not bool(written.any()):
        raise ValueError(f"a batch of {len(checked)} responses has no policy-written token: there is nothing to train")
    coefficients = torch.zeros(len(checked), dtype=torch.float64)
    coefficients[written] = AGGREGATIONS[method](checked[written].double(), int(max_length), float(alpha))
    return coefficients


def _checked(lengths: Lengths, max_length: int) -> Tensor:
    """int64[responses] on the CPU, or ValueError for the first wrong entry."""
    array = lengths.detach().cpu().numpy() if isinstance(lengths, Tensor) else np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths has shape {array.shape}: it must have one entry a response")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"lengths has dtype {array.dtype}: lengths are whole numbers of tokens")
    whole = isinstance(max_length, numbers.Integral) and not isinstance(max_length, bool)
    if not whole or not 1 <= max_length < 2**63:
        raise ValueError(f"max_length = {max_length!r} must be a whole number of tokens, at least 1")
    for wrong, why in ((array < 0, "is negative"), (array > max_length, f"is above max_length = {max_length}")):
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(f"lengths[{place}] = {array[place]} {why}")
    return torch.from_numpy(array.astype(np.int64))
