"""Advantage: the reward of each response relative to its group, or to the batch.

A new kind is one function `(rewards) -> advantages` and one line in `ADVANTAGES`; `Relative` says what it is given.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = Tensor | NDArray[Any] | Sequence[float] | Sequence[int]

EPSILON = 1e-6
"""Added to the standard deviation, as in the GRPO code the golden numbers come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relative:
    """The rewards of a batch beside those of their groups; float64[responses] each."""

    reward: Tensor
    mean: Tensor
    """Of the response's group; 0 for a group of one, which has nothing to be compared with."""
    centred: Tensor
    """reward - mean; exactly 0 in a group whose rewards are all equal."""
    std: Tensor
    """Of the response's group, of the sample (n - 1); 1 for a group of one."""
    size: Tensor
    """Responses in the response's group."""


Advantage = Callable[[Relative], Tensor]


def grpo(rewards: Relative) -> Tensor:
    """GRPO (arXiv 2402.03300): (r - mean) / (std + 1e-6), std of the sample (n - 1)."""
    return rewards.centred / (rewards.std + EPSILON)


def grpo_no_std(rewards: Relative) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): r - mean; dividing by std would favour prompts that are nearly decided."""
    return rewards.centred


def rloo(rewards: Relative) -> Tensor:
    """RLOO (arXiv 2402.14740): r minus the mean of the group's others, which is (r - mean) n / (n - 1)."""
    return rewards.centred * (rewards.size / (rewards.size - 1).clamp(min=1))


def reinforce_pp(rewards: Relative) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): (r - mean) / (std + 1e-6) with mean and std of the whole batch's responses.

    Groups do not matter. One whose rewards are all equal is 0 only when the whole batch is: a prompt that is always
    solved pushes its responses up, one never solved pushes them down.
    """
    return _whitened(rewards.reward)


def reinforce_pp_baseline(rewards: Relative) -> Tensor:
    """REINFORCE++ with baseline (arXiv 2501.03262): r - the group's mean, then whitened over the batch.

    A group whose rewards are all equal stays 0 as long as no group of one is in the batch: centred rewards have mean
    0, so whitening only divides them.
    """
    alone = bool((rewards.size == 1).any())
    # Their mean is 0 up to rounding, and subtracting the rounding would move all-equal groups off 0.
    return _whitened(rewards.centred) if alone else rewards.centred / (_std(rewards.centred) + EPSILON)


def max_rl(rewards: Relative) -> Tensor:
    """MaxRL (arXiv 2602.02710): (r - mean) / mean, 0 when the group's mean is 0.

    With p = E[r] the chance to succeed, ∇ log p = ∇p / p: the gradient of `grpo_no_std` over an estimate of p, so that
    a prompt solved once in ten counts as ten. For rewards 0 and 1 that is the gradient of maximum likelihood, its
    series cut after n terms. A reward between 0 and 1 is read as the chance that the response is accepted; for these
    1 / mean is a consistent estimate of 1 / p, no unbiased one. A negative reward is no chance: ValueError.
    A group of one is plain REINFORCE, the series' first term.
    """
    negative = rewards.reward < 0
    if bool(negative.any()):
        place = int(negative.int().argmax())
        raise ValueError(
            f"rewards[{place}] = {float(rewards.reward[place])} is negative: max_rl takes rewards as chances"
        )
    alone, none = rewards.size == 1, rewards.mean == 0
    return rewards.centred / torch.where(alone | none, 1.0, rewards.mean)


ADVANTAGES: dict[str, Advantage] = {
    "grpo": grpo,
    "grpo_no_std": grpo_no_std,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "max_rl": max_rl,
}


def advantages(rewards: Numbers, groups: Numbers, *, kind: str = "grpo") -> Tensor:
    """Advantage of every response of a batch.

    `rewards`: float[responses]; `groups`: int[responses], number of the group of each response, in any order.
    Returns float32[responses]; computed in float64. Responses of a group whose rewards are all equal get exactly 0;
    with `reinforce_pp` only when the whole batch's are. A group of one keeps its reward: its mean counts as 0 and its
    standard deviation as 1.

    Raises ValueError for an unknown kind, unequally many rewards and groups, group numbers that are no integers,
    and a reward that is not finite.
    """
    if kind not in ADVANTAGES:
        near = difflib.get_close_matches(kind, ADVANTAGES, n=1, cutoff=0.0)[0]
        raise ValueError(f"kind = {kind!r} is no advantage; the nearest is {near!r}")
    reward, number = _checked(rewards, groups)
    if not len(reward):
        return torch.zeros(0, dtype=torch.float32)
    return ADVANTAGES[kind](_relative(reward, number)).float()


def _relative(reward: Tensor, number: Tensor) -> Relative:
    """Each reward beside its group's, from float64[responses] and int64[responses]."""
    _, group = torch.unique(number, return_inverse=True)
    size = torch.bincount(group)
    zeros = torch.zeros(len(size), dtype=torch.float64)
    # Centre on the group's least reward first: equal rewards then give exactly 0, whatever their rounding.
    least = torch.full_like(zeros, torch.inf).scatter_reduce(0, group, reward, "amin")
    above = reward - least[group]
    mean = zeros.index_add(0, group, above) / size
    centred = above - mean[group]
    squares = zeros.index_add(0, group, centred.square())
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    alone = size == 1
    std[alone] = 1.0
    return Relative(
        reward=reward,
        mean=torch.where(alone, 0.0, least + mean)[group],
        centred=torch.where(alone[group], reward, centred),
        std=std[group],
        size=size[group].double(),
    )


def _whitened(values: Tensor) -> Tensor:
    """(value - mean) / (std + 1e-6) over all; exactly 0 when all are equal."""
    above = values - values.min()
    return (above - above.mean()) / (_std(above) + EPSILON)


def _std(values: Tensor) -> Tensor:
    """Of the sample (n - 1); 0 for one value."""
    return values.std() if len(values) > 1 else values.new_zeros(())


def _checked(rewards: Numbers, groups: Numbers) -> tuple[Tensor, Tensor]:
    """float64[responses] and int64[responses] on the CPU, or ValueError."""
    reward = torch.as_tensor(rewards, dtype=torch.float64).detach().cpu()
    number = torch.as_tensor(groups).detach().cpu()
    if reward.shape != number.shape or reward.ndim != 1:
        raise ValueError(
            f"rewards has shape {tuple(reward.shape)} and groups {tuple(number.shape)}: one entry a response each"
        )
    if len(number) and (number.is_floating_point() or number.is_complex()):
        raise ValueError(f"groups has dtype {number.dtype}: group numbers are integers")
    wrong = ~torch.isfinite(reward)
    if bool(wrong.any()):
        place = int(wrong.int().argmax())
        raise ValueError(f"rewards[{place}] = {float(reward[place])} is not finite")
    return reward, number.long()
