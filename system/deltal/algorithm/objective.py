"""Objective: the per-token loss before aggregation, from two log-probabilities and the advantage.

`proximal_logprob` is the learner's under the weights at the batch's start, `new_logprob` the learner's now, with
gradient. Ratio r = exp(new - proximal). A new objective is one function and one line in `OBJECTIVES`, keyed by the
`kind` of its settings. What the engine's own log-probability does stands in `importance.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltal.algorithm.sequence import mean_over_response, needed
from deltal.config.algorithm import Cispo, Gspo, ObjectiveConfig, PpoClip, Reinforce, Sapo

# The settings' type differs per entry, so the registry cannot name it; `kind` ties the two together.
Objective = Callable[[Tensor, Tensor, Tensor, Any, Tensor | None], tuple[Tensor, Tensor]]
"""(new_logprob, proximal_logprob, advantage, settings, sequence) to (loss float[T], clipped bool[T]).

All float[T], one entry a token; `new_logprob` carries the gradient. `sequence` int64[T] numbers each token's response.
`clipped`: the objective's bound is active.
"""


def ppo_clip(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: PpoClip, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) with separate bounds (DAPO, arXiv 2503.14476).

    Loss -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). Dual clip (arXiv 1912.09729, equation 5): where A < 0 the
    loss is at most -dual_clip · A. A clipped token has no gradient.
    """
    loss, clipped = _clipped(new_logprob - proximal_logprob, advantage, settings.clip_low, settings.clip_high)
    if settings.dual_clip is None:
        return loss, clipped
    bound = -settings.dual_clip * advantage
    over = ((advantage < 0) & (loss > bound)).detach()
    return torch.where(over, bound, loss), clipped | over


def gspo(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: Gspo, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GSPO (arXiv 2507.18071, equations 5 to 7): one ratio a response, s = exp(mean over its tokens of new - proximal).

    Each token's loss is -min(s A, clip(s) A), so that a response's L tokens sum to L times it: GSPO itself is the
    aggregation `grpo`, LUSPO `sequence_sum`. The gradient of that sum is L times that of s, which is s A in each
    token's log-probability. It is given to each token by itself (GSPO-token, section 4.3), so that a token's importance
    weight meets its own gradient.
    """
    log_ratio = mean_over_response(new_logprob - proximal_logprob, needed(sequence, "the objective gspo")).detach()
    own = new_logprob - new_logprob.detach()  # 0, with the token's gradient.
    return _clipped(log_ratio + own, advantage, settings.clip_low, settings.clip_high)


def cispo(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: Cispo, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): loss -clip(r) A log π, the bounded ratio held constant.

    A token whose bound is active keeps a gradient, unlike under `ppo_clip`.
    """
    ratio = _ratio(new_logprob - proximal_logprob).detach()
    lowest = 0.0 if settings.clip_low is None else 1.0 - settings.clip_low
    bounded = ratio.clamp(lowest, 1.0 + settings.clip_high)
    return -bounded * advantage * new_logprob, bounded != ratio


def sapo(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: Sapo, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SAPO (arXiv 2511.20347, equations 5 and 6): loss -σ(τ (r - 1)) · 4 / τ · A, τ by the advantage's sign.

    The gradient is that of the unclipped surrogate times 4 σ (1 - σ), which is 1 at r = 1 and fades on both sides.
    Nothing is ever clipped.
    """
    ratio = _ratio(new_logprob - proximal_logprob)
    positive, negative = (ratio.new_tensor(t) for t in (settings.temperature_positive, settings.temperature_negative))
    temperature = torch.where(advantage > 0, positive, negative)
    gate = torch.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature
    return -gate * advantage, _nothing_clipped(new_logprob)


def reinforce(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: Reinforce,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain policy gradient (Williams 1992): loss -A log π; nothing is ever clipped."""
    return -advantage * new_logprob, _nothing_clipped(new_logprob)


OBJECTIVES: dict[str, Objective] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
}


def per_token_loss(
    new_logprob: Tensor, proximal_logprob: Tensor, advantage: Tensor, settings: ObjectiveConfig,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss float[T] and clipped bool[T] by the objective that `settings` names.

    `new_logprob` (with gradient), `proximal_logprob`, `advantage`: float[T]. `sequence` int64[T]: the number of each
    token's response, for objectives of whole responses. Raises ValueError when shapes differ or it is missing.
    """
    given = [new_logprob, proximal_logprob, advantage, *([] if sequence is None else [sequence])]
    shapes = {tuple(tensor.shape) for tensor in given}
    if len(shapes) != 1:
        raise ValueError(
            f"new_logprob, proximal_logprob, advantage and sequence have different shapes: {sorted(shapes)}"
        )
    return OBJECTIVES[settings.kind](new_logprob, proximal_logprob.detach(), advantage, settings, sequence)


def _ratio(log_ratio: Tensor) -> Tensor:
    """exp, held finite: beyond ±20 nats, where no policy step leads, the ratio stands still and has no gradient."""
    return torch.exp(log_ratio.clamp(-20.0, 20.0))


def _clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and where the clip is active: there is no gradient."""
    ratio = _ratio(log_ratio)
    surrogate, bounded = ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage
    return -torch.minimum(surrogate, bounded), (bounded < surrogate).detach()


def _nothing_clipped(new_logprob: Tensor) -> Tensor:
    return torch.zeros_like(new_logprob, dtype=torch.bool)
