"""KL to a reference policy: what a token adds to the loss for leaving the model that the run began from.

Each function gives two things for each token: the term of the loss, whose *gradient* is right, and the estimate of
KL(policy ‖ reference) that is logged. The two are not the same: differentiating a good estimate need not give a good
gradient. Both take tokens as sampled from the policy; with several mini-batches that holds to the ratio's distance
from 1. A new estimator is one function and one line in `KL_TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltal.algorithm.sequence import same_shape
from deltal.config.algorithm import KlConfig, NoKl

KlTerm = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(new_logprob, reference_logprob), float[T], the first with gradient, to (loss float[T], value float[T])."""


def k1(new_logprob: Tensor, reference_logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL: loss (log π - log ref) · log π with the first factor held constant; value log π - log ref.

    ∇ E_π[log π - log ref] = E_π[(log π - log ref) ∇ log π] + E_π[∇ log π], whose last part is 0: the loss has exactly
    that gradient in expectation. The value itself as a loss would keep only the part that is 0.
    """
    value = (new_logprob - reference_logprob).detach()
    return value * new_logprob, value


def k3(new_logprob: Tensor, reference_logprob: Tensor) -> tuple[Tensor, Tensor]:
    """GRPO (arXiv 2402.03300, equation 4): ref / π - log(ref / π) - 1, both as loss and as value; never negative.

    An unbiased estimate of the reverse KL, but its gradient, (1 - ref / π) ∇ log π, is in expectation that of the
    forward KL(reference ‖ policy). The two agree to first order near the reference.
    """
    log_ratio = (reference_logprob - new_logprob).clamp(-20.0, 20.0)  # exp must stay finite
    loss = torch.expm1(log_ratio) - log_ratio
    return loss, loss.detach()


KL_TERMS: dict[str, KlTerm] = {"k1": k1, "k3": k3}


def kl_penalty(new_logprob: Tensor, reference_logprob: Tensor | None, settings: KlConfig) -> tuple[Tensor, Tensor]:
    """What `settings` adds to each token's loss, coefficient included, and the estimate of the KL; float[T] both.

    Zeros for kind `none`. Raises ValueError when another kind has no `reference_logprob`, or one of another shape.
    """
    if isinstance(settings, NoKl):
        return torch.zeros_like(new_logprob), torch.zeros_like(new_logprob)
    if reference_logprob is None:
        raise ValueError(f"the KL term {settings.kind} needs `reference_logprob`, float[T]")
    same_shape(new_logprob=new_logprob, reference_logprob=reference_logprob)
    loss, value = KL_TERMS[settings.kind](new_logprob, reference_logprob.detach())
    return settings.coefficient * loss, value
