"""Importance: the weight of a token for having been sampled by the engine and not by the learner.

The two compute the same model with other kernels, and the engine's weights may be older. Ratio w = exp(proximal - old):
learner over engine, both at the batch's start. A new way is one function and one line in `IMPORTANCE`.

At level `token` w is the token's own: small variance, but the prefix it stands on is not corrected. At level `sequence`
it is the product over the response, the ratio of whole responses, which is the unbiased weight and what others mean by
it (verl's rollout correction, TRL's `sequence_*` modes); its logarithm spreads with √L, so that bounds bind on long
responses. The geometric mean is no importance weight of anything; it is what the objective `gspo` clips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltal.algorithm.sequence import needed, same_shape, sum_over_response
from deltal.config.algorithm import ImportanceConfig, MaskedImportance, NoImportance, TruncatedImportance

Importance = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
"""(log_ratio, settings) to (weight float[T], bounded bool[T]); `log_ratio` float[T] is of the level that is set."""


def none(log_ratio: Tensor, settings: NoImportance) -> tuple[Tensor, Tensor]:
    """All weights 1."""
    return torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)


def truncate(log_ratio: Tensor, settings: TruncatedImportance) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling: min(w, cap) (Ionides 2008; for engine and learner: Yao et al. 2025, "TIS")."""
    ratio = torch.exp(log_ratio)
    return ratio.clamp(max=settings.cap), ratio > settings.cap


def mask(log_ratio: Tensor, settings: MaskedImportance) -> tuple[Tensor, Tensor]:
    """IcePop (Ring-1T, arXiv 2510.18855; INTELLECT-3, arXiv 2512.16144, equation 1): w in [low, high], else 0."""
    ratio = torch.exp(log_ratio)
    outside = (ratio < settings.low) | (ratio > settings.high)
    return ratio.masked_fill(outside, 0.0), outside


IMPORTANCE: dict[str, Importance] = {"none": none, "truncate": truncate, "mask": mask}


def importance_weight(
    proximal_logprob: Tensor, old_logprob: Tensor, settings: ImportanceConfig, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight float[T] of each token, and bool[T]: it was truncated or masked. Both are constants of the loss.

    `proximal_logprob`, `old_logprob`: float[T]. `sequence` int64[T]: the number of each token's response, for level
    `sequence`; ValueError when it is missing then, or when shapes differ.
    """
    same_shape(proximal_logprob=proximal_logprob, old_logprob=old_logprob, sequence=sequence)
    log_ratio = (proximal_logprob - old_logprob).detach()
    if getattr(settings, "level", "token") == "sequence":
        log_ratio = sum_over_response(log_ratio, needed(sequence, "importance at level sequence"))
    return IMPORTANCE[settings.kind](log_ratio, settings)


def engine_kl(learner_logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """Estimate of KL(engine ‖ learner) at each token the engine sampled, float[T]: w - 1 - log w, never negative.

    The estimator k3 (Schulman 2020, "Approximating KL divergence"); unbiased where both hold the same weights' policy.
    """
    log_ratio = (learner_logprob - old_logprob).detach()
    return torch.expm1(log_ratio) - log_ratio
