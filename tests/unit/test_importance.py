"""Laws of the importance weight: as a plain loop gives it, bounded, a constant of the loss; the mismatch is a KL."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltal.algorithm import IMPORTANCE, engine_kl, importance_weight
from deltal.config.algorithm import MaskedImportance, NoImportance, TruncatedImportance

EVERY = [
    NoImportance(), TruncatedImportance(), TruncatedImportance(cap=1.1, level="sequence"),
    MaskedImportance(low=0.8, high=1.3), MaskedImportance(low=0.5, high=2.0, level="sequence"),
]  # fmt: skip
NUMBERS = st.integers(0, 2**32 - 1)


def tokens(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """proximal, old float64[T] and sequence int64[T], the tokens of responses mixed up."""
    draw = np.random.default_rng(seed)
    sequence = draw.permutation(np.repeat(np.arange(4) * 3, draw.integers(1, 6, 4)))
    old = -3.0 * draw.random(len(sequence))
    proximal = old + 0.3 * draw.normal(size=len(sequence))
    return torch.from_numpy(proximal), torch.from_numpy(old), torch.from_numpy(sequence)


def slow(proximal: list[float], old: list[float], sequence: list[int], chosen: Any) -> tuple[list[float], list[bool]]:
    weights, bounded = [], []
    for t, which in enumerate(sequence):
        own = [i for i, other in enumerate(sequence) if other == which] if chosen.level == "sequence" else [t]
        ratio = math.prod(math.exp(proximal[i]) / math.exp(old[i]) for i in own)
        if chosen.kind == "truncate":
            weights.append(min(ratio, chosen.cap))
            bounded.append(ratio > chosen.cap)
        else:
            inside = chosen.low <= ratio <= chosen.high
            weights.append(ratio if inside else 0.0)
            bounded.append(not inside)
    return weights, bounded


@settings(max_examples=100)
@given(NUMBERS, st.sampled_from(EVERY[1:]))
def test_weights_are_those_of_a_plain_loop(seed: int, chosen: Any) -> None:
    proximal, old, sequence = tokens(seed)
    weight, bounded = importance_weight(proximal, old, chosen, sequence)
    expected = slow(proximal.tolist(), old.tolist(), sequence.tolist(), chosen)
    np.testing.assert_allclose(weight.numpy(), expected[0], rtol=1e-12)
    assert bounded.tolist() == expected[1]


def test_every_way_of_weighting_is_tried_here() -> None:
    assert {chosen.kind for chosen in EVERY} == IMPORTANCE.keys()


def test_the_default_truncates_each_token_at_two() -> None:
    weight, bounded = importance_weight(torch.tensor([0.0, 0.0]), torch.tensor([0.5, -5.0]), TruncatedImportance())
    torch.testing.assert_close(weight, torch.tensor([math.exp(-0.5), 2.0]))
    assert bounded.tolist() == [False, True]


@pytest.mark.parametrize("chosen", EVERY, ids=lambda chosen: chosen.kind)
def test_a_weight_is_a_constant_of_the_loss(chosen: Any) -> None:
    proximal, old, sequence = tokens(0)
    assert not importance_weight(proximal.requires_grad_(), old, chosen, sequence)[0].requires_grad


@pytest.mark.parametrize("chosen", EVERY, ids=lambda chosen: chosen.kind)
def test_where_engine_and_learner_agree_every_weight_is_one(chosen: Any) -> None:
    proximal, _, sequence = tokens(1)
    weight, bounded = importance_weight(proximal, proximal, chosen, sequence)
    assert weight.tolist() == [1.0] * len(proximal)
    assert not bounded.any()


def test_no_importance_weight_is_one_whatever_the_engine_said() -> None:
    weight, bounded = importance_weight(torch.zeros(2), torch.tensor([-9.0, 9.0]), NoImportance())
    assert weight.tolist() == [1.0, 1.0]
    assert not bounded.any()


@pytest.mark.parametrize("chosen", EVERY, ids=lambda chosen: chosen.kind)
def test_no_mismatch_is_too_large_to_be_weighed(chosen: Any) -> None:
    """The ratio overflows; its bound does not."""
    weight, _ = importance_weight(torch.zeros(4), torch.full((4,), -500.0), chosen, torch.zeros(4, dtype=torch.int64))
    assert bool(torch.isfinite(weight).all())


def test_a_weight_by_response_asks_for_their_numbers() -> None:
    with pytest.raises(ValueError, match="importance at level sequence needs `sequence`"):
        importance_weight(torch.zeros(2), torch.zeros(2), TruncatedImportance(level="sequence"))


def test_tensors_of_other_shapes_are_named_and_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"old_logprob has shape \(1,\), but proximal_logprob has \(2,\)"):
        importance_weight(torch.zeros(2), torch.zeros(1), TruncatedImportance())


@given(NUMBERS)
def test_the_expected_mismatch_is_the_kl_of_engine_and_learner(seed: int) -> None:
    """Over all tokens the engine may draw, by their chances."""
    draw = torch.Generator().manual_seed(seed)
    engine, learner = (torch.log_softmax(torch.randn(9, dtype=torch.float64, generator=draw), 0) for _ in range(2))
    expected = float((engine.exp() * engine_kl(learner, engine)).sum())
    assert expected == pytest.approx(float((engine.exp() * (engine - learner)).sum()), rel=1e-9)
    assert bool((engine_kl(learner, engine) >= 0).all())
