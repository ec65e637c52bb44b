"""Sketches: what is kept of each response's gradient, small enough to take in every step.

The score-function gradient of the LM head for response i is G_i = Σ_t (onehot(y_t) - p_t) h_tᵀ / T, a matrix of
vocabulary × width. Its sketch is A G_i B with fixed random signs in A and B: inner products, and so norms, angles and
variances, are kept in expectation (Johnson and Lindenstrauss 1984; two-sided, Woodruff 2014, section 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Sketcher:
    """Takes the head's probabilities chunk by chunk and adds up one sketch a response.

    Args:
        vocabulary: V.
        width: d, of the hidden states.
        size: k; a sketch is k × k numbers. The relative standard deviation of one squared norm is about 2 / √k for a
            gradient of rank one, less for others.
        seed: of the signs; the same for a whole run, so that steps and ranks can be compared and added.
        device: where the head computes.
    """

    def __init__(
        self, vocabulary: int, width: int, *, size: int = 64, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self._left = self._signs(vocabulary, size, draw).to(device)
        self._right = self._signs(width, size, draw).to(device)
        self._size = size
        self.sketches = torch.zeros(0, size * size, device=device)

    @staticmethod
    def _signs(rows: int, size: int, draw: torch.Generator) -> Tensor:
        signs: Tensor = torch.randint(0, 2, (rows, size), generator=draw, dtype=torch.float32) * 2 - 1
        return signs / math.sqrt(size)

    def begin(self, responses: int) -> None:
        """Forget the last batch; `responses` rows of zeros."""
        self.sketches = torch.zeros(responses, self._size**2, device=self._left.device)

    @torch.no_grad()
    def add(
        self, probabilities: Tensor, hidden: Tensor, target: Tensor, response: Tensor, temperature: float = 1.0
    ) -> None:
        """Add n tokens. `probabilities` float32[n, V]; `hidden` [n, d]; `target`, `response` (row) int64[n]."""
        error = (self._left[target] - probabilities @ self._left) / temperature
        state = hidden.float() @ self._right
        # A response's tokens stand together: one product a response is cheaper than one outer product a token.
        rows, counts = torch.unique_consecutive(response, return_counts=True)
        start = 0
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            part = slice(start, start + count)
            self.sketches[row] += (error[part].t() @ state[part]).flatten()
            start += count


def gram(vectors: Tensor) -> Tensor:
    """Inner products of the rows of float[n, D], float64[n, n] on the CPU."""
    rows = vectors.float()
    return (rows @ rows.t()).double().cpu()


def factor_gram(errors: list[Tensor], states: list[Tensor]) -> Tensor:
    """Exact inner products of the gradients G_i = E_iᵀ H_i, without ever making one: float64[n, n].

    `errors`: float[L_i, V] a response, onehot - p, already divided by the temperature; `states`: float[L_i, d].
    ⟨G_i, G_j⟩ = Σ_ts (E_i E_jᵀ)_ts (H_i H_jᵀ)_ts.
    """
    counts = torch.tensor([len(error) for error in errors])
    error, state = torch.cat(errors).float(), torch.cat(states).float()
    product = (error @ error.t()) * (state @ state.t())
    owner = torch.repeat_interleave(torch.arange(len(errors)), counts)
    rows = torch.zeros(len(errors), product.shape[1], dtype=torch.float64).index_add(0, owner, product.double())
    return torch.zeros(len(errors), len(errors), dtype=torch.float64).index_add(1, owner, rows)
