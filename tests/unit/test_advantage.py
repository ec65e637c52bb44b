"""Laws of the advantages, agreement with the authors' numbers, and with plain loops over groups."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal.algorithm import ADVANTAGES, advantages

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "aggregation_golden.json").read_text())[
    "cases"
]
KINDS = sorted(ADVANTAGES)
OF_THE_GROUP = ["grpo", "grpo_no_std", "max_rl", "rloo"]
"""What other groups got does not matter to these."""

rewards_of_a_group = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), min_size=1, max_size=6)
BATCH = st.lists(rewards_of_a_group, min_size=1, max_size=6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
@pytest.mark.parametrize(("kind", "column"), [("grpo", "std"), ("grpo_no_std", "no_std")])
def test_advantages_agree_with_the_authors_code(case: dict[str, Any], kind: str, column: str) -> None:
    got = advantages(case["rewards"], case["groups"], kind=kind)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), case["advantage"][column], rtol=1e-7, atol=1e-12)


# --- independent slow versions ---------------------------------------------------------------------


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def centre(reward: float, group: list[float]) -> float:
    return reward - statistics.fmean(group) if len(group) > 1 else reward


def slow_rloo(reward: float, group: list[float], batch: list[list[float]]) -> float:
    if len(group) == 1:
        return reward
    return reward - (sum(group) - reward) / (len(group) - 1)


def slow_max_rl(reward: float, group: list[float], batch: list[list[float]]) -> float:
    if len(group) == 1:
        return reward
    return centre(reward, group) / statistics.fmean(group) if any(group) else 0.0


def slow_grpo(reward: float, group: list[float], batch: list[list[float]]) -> float:
    return centre(reward, group) / ((deviation(group) if len(group) > 1 else 1.0) + 1e-6)


def slow_whitening(reward: float, group: list[float], batch: list[list[float]]) -> float:
    every = [one for some in batch for one in some]
    return (reward - statistics.fmean(every)) / (deviation(every) + 1e-6)


def slow_whitening_of_centred(reward: float, group: list[float], batch: list[list[float]]) -> float:
    every = [centre(one, some) for some in batch for one in some]
    return (centre(reward, group) - statistics.fmean(every)) / (deviation(every) + 1e-6)


SLOW: dict[str, Callable[[float, list[float], list[list[float]]], float]] = {
    # (reward, rewards of its group, rewards of all groups) to an advantage.
    "grpo": slow_grpo,
    "grpo_no_std": lambda reward, group, batch: centre(reward, group),
    "rloo": slow_rloo,
    "reinforce_pp": slow_whitening,
    "reinforce_pp_baseline": slow_whitening_of_centred,
    "max_rl": slow_max_rl,
}


def flat(batch: list[list[float]]) -> tuple[list[float], list[int]]:
    return [reward for group in batch for reward in group], [
        number for number, group in enumerate(batch) for _ in group
    ]


@settings(max_examples=150)
@given(BATCH, st.sampled_from(KINDS))
def test_advantages_are_those_of_a_plain_loop(batch: list[list[float]], kind: str) -> None:
    # A standard deviation that is nothing but rounding is told from 0 by 1e-6 only.
    expected = [SLOW[kind](reward, group, batch) for group in batch for reward in group]
    got = advantages(*flat(batch), kind=kind)
    np.testing.assert_allclose(got.numpy(), np.array(expected), rtol=1e-5, atol=1e-6)


def test_every_advantage_has_its_slow_version() -> None:
    assert SLOW.keys() == ADVANTAGES.keys()


# --- laws ------------------------------------------------------------------------------------------


@given(BATCH, st.sampled_from([kind for kind in KINDS if kind != "reinforce_pp"]), st.sampled_from([0.1, 0.3, 1.0]))
def test_a_group_whose_rewards_are_all_equal_gets_exactly_zero(
    batch: list[list[float]], kind: str, reward: float
) -> None:
    batch = [group for group in batch if len(group) > 1]
    rewards, groups = flat([[reward] * 3, *batch])
    assert advantages(rewards, groups, kind=kind)[:3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_whose_rewards_are_all_equal_gets_exactly_zero(kind: str) -> None:
    assert advantages([0.1] * 6, [0, 0, 1, 1, 1, 0], kind=kind).tolist() == [0.0] * 6


def test_whitening_over_the_batch_moves_groups_that_are_always_right_or_always_wrong() -> None:
    got = advantages([1, 1, 0, 0], [0, 0, 1, 1], kind="reinforce_pp")
    assert got[0] == got[1] == -got[2] == -got[3] > 0


@given(BATCH, st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_the_order_of_responses_and_the_numbers_of_groups_do_not_matter(
    batch: list[list[float]], kind: str, random: Any
) -> None:
    rewards, groups = flat(batch)
    order = list(range(len(rewards)))
    random.shuffle(order)
    straight = advantages(rewards, groups, kind=kind)
    renamed = advantages([rewards[i] for i in order], [7 - 3 * groups[i] for i in order], kind=kind)
    torch.testing.assert_close(renamed, straight[order], rtol=1e-5, atol=1e-6)


@given(BATCH, BATCH, st.sampled_from(OF_THE_GROUP))
def test_advantages_of_a_group_do_not_depend_on_other_groups(
    batch: list[list[float]], others: list[list[float]], kind: str
) -> None:
    alone = advantages(*flat(batch), kind=kind)
    together = advantages(*flat([*batch, *others]), kind=kind)
    torch.testing.assert_close(together[: len(alone)], alone, rtol=0, atol=0)


@given(BATCH, st.sampled_from(["grpo", "grpo_no_std", "rloo", "max_rl"]))
def test_advantages_of_a_group_of_two_or_more_sum_to_zero(batch: list[list[float]], kind: str) -> None:
    for group in batch:
        if len(group) > 1:
            assert float(advantages(*flat([group]), kind=kind).double().sum()) == pytest.approx(0.0, abs=1e-4)


@given(BATCH.filter(lambda batch: len({reward for group in batch for reward in group}) > 1))
def test_whitened_rewards_have_mean_zero_and_deviation_one(batch: list[list[float]]) -> None:
    got = advantages(*flat(batch), kind="reinforce_pp").double()
    assert float(got.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(got.std()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("kind", OF_THE_GROUP)
def test_a_group_of_one_keeps_its_reward(kind: str) -> None:
    got = advantages([0.7, 1.0, 0.0], [4, 9, 9], kind=kind)
    assert float(got[0]) == pytest.approx(0.7, rel=2e-6)


def test_leaving_one_out_does_not_let_a_reward_into_its_own_baseline() -> None:
    """Raising one reward raises its own advantage by exactly as much."""
    before = advantages([0.2, 0.5, 0.9], [0, 0, 0], kind="rloo")
    after = advantages([0.2, 0.5, 1.9], [0, 0, 0], kind="rloo")
    assert float(after[2] - before[2]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("right", "of"), [(1, 2), (1, 10), (3, 4)])
def test_max_rl_gives_right_responses_together_the_score_of_one_likelihood(right: int, of: int) -> None:
    """Σ_right r / (n p̂) = 1: as in maximum likelihood, a prompt's pull does not depend on how often it is solved."""
    got = advantages([1.0] * right + [0.0] * (of - right), [0] * of, kind="max_rl").double()
    over_chance = got + 1.0  # (r - p) / p = r / p - 1.
    assert float(over_chance[:right].sum()) / of == pytest.approx(1.0, rel=1e-6)
    assert over_chance[right:].tolist() == [0.0] * (of - right)


def test_max_rl_refuses_a_negative_reward() -> None:
    with pytest.raises(ValueError, match=r"rewards\[2\] = -0.5 is negative: max_rl"):
        advantages([0.0, 1.0, -0.5], [0, 0, 0], kind="max_rl")


@pytest.mark.parametrize("kind", KINDS)
def test_no_rewards_give_no_advantages(kind: str) -> None:
    assert advantages([], np.zeros(0, dtype=np.int64), kind=kind).tolist() == []


def test_groups_may_be_mixed() -> None:
    got = advantages([0.1, 1.0, 0.1, 0.0, 0.1], [7, 3, 7, 3, 7], kind="grpo")
    assert got[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert got[1] == -got[3] != 0


@pytest.mark.parametrize(
    ("rewards", "groups", "kind", "message"),
    [
        ([1.0], [0, 0], "grpo", "shape"),
        ([1.0, float("inf")], [0, 0], "grpo", r"rewards\[1\] = inf"),
        ([1.0], [0.5], "grpo", "dtype"),
        ([1.0], [0], "grop", "the nearest is 'grpo'"),
    ],
)
def test_wrong_rewards_are_named(rewards: list[float], groups: list[Any], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(rewards, groups, kind=kind)
