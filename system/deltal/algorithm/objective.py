"""Objective: the per-token loss before aggregation, from three log-probabilities and the advantage.

`old_logprob` is the engine's, `proximal_logprob` the learner's under the weights at the batch's start, `new_logprob`
the learner's now, with gradient. Ratio = exp(new - proximal); importance weight = exp(proximal - old). A new objective
is one function and one line in `OBJECTIVES`, keyed by the `kind` of its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltal.config import PpoClip, Reinforce

# The settings' type differs per entry, so the registry cannot name it; `kind` ties the two together.
Objective = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]


def ppo_clip(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: PpoClip
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347) with separate bounds (DAPO, arXiv 2503.14476).

    All float[T], one entry a token; `new_logprob` carries the gradient. Returns the loss
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), float[T], and bool[T]: the bound is active, no gradient.
    """
    ratio = torch.exp(new_logprob - proximal_logprob.detach())
    bounded = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    surrogate, bounded_surrogate = ratio * advantage, bounded * advantage
    return -torch.minimum(surrogate, bounded_surrogate), (bounded_surrogate < surrogate).detach()


def reinforce(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: Reinforce
) -> tuple[Tensor, Tensor]:
    """Plain policy gradient (Williams 1992): loss -A log π, float[T]; nothing is ever clipped, bool[T] all False."""
    return -advantage * new_logprob, torch.zeros_like(new_logprob, dtype=torch.bool)


OBJECTIVES: dict[str, Objective] = {"ppo_clip": ppo_clip, "reinforce": reinforce}


def per_token_loss(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: PpoClip | Reinforce
) -> tuple[Tensor, Tensor]:
    """Loss float[T] and clipped bool[T] by the objective that `settings` names.

    `new_logprob` (with gradient), `proximal_logprob`, `advantage`: float[T]. Raises ValueError when shapes differ.
    """
    shapes = {tuple(tensor.shape) for tensor in (new_logprob, proximal_logprob, advantage)}
    if len(shapes) != 1:
        raise ValueError(f"new_logprob, proximal_logprob and advantage have different shapes: {sorted(shapes)}")
    return OBJECTIVES[settings.kind](new_logprob, proximal_logprob, advantage, settings)


def importance_weight(proximal_logprob: Tensor, old_logprob: Tensor, cap: float | None) -> Tensor:
    """Weight of each token for having been sampled by the engine and not by the learner: exp(proximal - old).

    Both float[T]; truncated at `cap` (truncated importance sampling), all ones when `cap` is None. Returns float[T],
    detached: the weight is a constant of the loss.
    """
    if cap is None:
        return torch.ones_like(proximal_logprob).detach()
    return torch.exp(proximal_logprob - old_logprob).clamp(max=cap).detach()
