"""Advantage: the reward of each response relative to its group.

A new kind is one function `(centred, std) -> advantages` and one line in `ADVANTAGES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = Tensor | NDArray[Any] | Sequence[float] | Sequence[int]
Advantage = Callable[[Tensor, Tensor], Tensor]

EPSILON = 1e-6
"""Added to the standard deviation, as in the GRPO code the golden numbers come from."""


def grpo(centred: Tensor, std: Tensor) -> Tensor:
    """GRPO (arXiv 2402.03300): (r - mean) / (std + 1e-6), std of the sample (n - 1)."""
    return centred / (std + EPSILON)


def grpo_no_std(centred: Tensor, std: Tensor) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): r - mean; dividing by std would favour prompts that are nearly decided."""
    return centred


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "grpo_no_std": grpo_no_std}


def advantages(rewards: Numbers, groups: Numbers, *, kind: str = "grpo") -> Tensor:
    """Advantage of every response of a batch.

    `rewards`: float[responses]; `groups`: int[responses], number of the group of each response, in any order.
    Returns float32[responses]; computed in float64. Responses of a group whose rewards are all equal get exactly 0.
    A group of one keeps its reward: it counts as mean 0 and standard deviation 1.

    Raises ValueError for an unknown kind, unequally many rewards and groups, group numbers that are no integers,
    and a reward that is not finite.
    """
    if kind not in ADVANTAGES:
        near = difflib.get_close_matches(kind, ADVANTAGES, n=1, cutoff=0.0)[0]
        raise ValueError(f"kind = {kind!r} is no advantage; the nearest is {near!r}")
    reward, number = _checked(rewards, groups)
    if not len(reward):
        return torch.zeros(0, dtype=torch.float32)
    _, group = torch.unique(number, return_inverse=True)
    size = torch.bincount(group)
    groups_count = len(size)
    # Centre on the group's least reward first: equal rewards then give exactly 0, whatever their rounding.
    least = torch.full((groups_count,), torch.inf, dtype=torch.float64).scatter_reduce(0, group, reward, "amin")
    above = reward - least[group]
    mean = torch.zeros(groups_count, dtype=torch.float64).index_add(0, group, above) / size
    centred = above - mean[group]
    squares = torch.zeros(groups_count, dtype=torch.float64).index_add(0, group, centred.square())
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    alone = size == 1
    std[alone] = 1.0
    centred = torch.where(alone[group], reward, centred)
    return ADVANTAGES[kind](centred, std[group]).float()


def _checked(rewards: Numbers, groups: Numbers) -> tuple[Tensor, Tensor]:
    """float64[responses] and int64[responses] on the CPU, or ValueError."""
    reward = torch.as_tensor(rewards).detach().cpu().double()
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
