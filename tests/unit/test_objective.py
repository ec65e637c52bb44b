"""Laws of the objectives: loss and gradient of each token as a plain loop gives them, and as finite differences do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltal.algorithm import AGGREGATIONS, OBJECTIVES, per_token_loss, token_coefficients
from deltal.config.algorithm import Cispo, Gspo, PpoClip, Reinforce, Sapo

WIDE = Gspo(clip_low=0.1, clip_high=0.2)
"""Bounds that random numbers meet as often as not."""
EVERY = [
    PpoClip(), PpoClip(dual_clip=1.2), PpoClip(dual_clip=3.0), WIDE, Cispo(clip_high=0.2),
    Cispo(clip_low=0.3, clip_high=0.2), Sapo(), Sapo(temperature_positive=0.7, temperature_negative=2.0), Reinforce(),
]  # fmt: skip
WITH_A_CONSTANT = {"cispo"}
"""Kinds whose loss holds something constant: its gradient is not the derivative of its value."""
NUMBERS = st.integers(0, 2**32 - 1)


def tokens(seed: int, *, responses: int = 4, spread: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """new, proximal, advantage float64[T] and sequence int64[T] of a few responses, their tokens mixed up."""
    draw = np.random.default_rng(seed)
    sequence = draw.permutation(np.repeat(np.arange(responses) * 5, draw.integers(1, 7, responses)))
    proximal = -3.0 * draw.random(len(sequence))
    new = proximal + spread * draw.normal(size=len(sequence)) + 0.2 * draw.normal(size=responses)[sequence // 5]
    advantage = draw.normal(size=responses)[sequence // 5]
    return torch.from_numpy(new), torch.from_numpy(proximal), torch.from_numpy(advantage), torch.from_numpy(sequence)


# --- independent slow versions: (new, proximal, advantage, sequence) of all tokens to (loss, gradient, clipped) ----

Columns = tuple[list[float], list[float], list[bool]]


def surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, bool]:
    """-min(r A, clip(r) A), and whether it is the clipped one."""
    plain, bounded = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
    return -min(plain, bounded), bounded < plain


def slow_ppo(new: list[float], proximal: list[float], advantage: list[float], sequence: list[int], s: Any) -> Columns:
    loss, gradient, clipped = [], [], []
    for n, p, a in zip(new, proximal, advantage, strict=True):
        ratio = math.exp(n - p)
        value, is_clipped = surrogate(ratio, a, s.clip_low, s.clip_high)
        if s.dual_clip is not None and a < 0 and value > -s.dual_clip * a:
            value, is_clipped = -s.dual_clip * a, True
        loss.append(value)
        clipped.append(is_clipped)
        gradient.append(0.0 if is_clipped else -ratio * a)
    return loss, gradient, clipped


def slow_gspo(new: list[float], proximal: list[float], advantage: list[float], sequence: list[int], s: Any) -> Columns:
    loss, gradient, clipped = [], [], []
    for t, which in enumerate(sequence):
        own = [i for i, other in enumerate(sequence) if other == which]
        ratio = math.exp(sum(new[i] - proximal[i] for i in own) / len(own))
        value, is_clipped = surrogate(ratio, advantage[t], s.clip_low, s.clip_high)
        loss.append(value)
        clipped.append(is_clipped)
        # Each of the response's L tokens has the loss -s A, whose derivative in this token's logarithm is -s A / L.
        gradient.append(0.0 if is_clipped else sum(-ratio * advantage[i] / len(own) for i in own))
    return loss, gradient, clipped


def slow_cispo(new: list[float], proximal: list[float], advantage: list[float], sequence: list[int], s: Any) -> Columns:
    loss, gradient, clipped = [], [], []
    for n, p, a in zip(new, proximal, advantage, strict=True):
        ratio = math.exp(n - p)
        weight = min(ratio, 1 + s.clip_high)
        if s.clip_low is not None:
            weight = max(weight, 1 - s.clip_low)
        loss.append(-weight * a * n)
        gradient.append(-weight * a)
        clipped.append(weight != ratio)
    return loss, gradient, clipped


def slow_sapo(new: list[float], proximal: list[float], advantage: list[float], sequence: list[int], s: Any) -> Columns:
    loss, gradient = [], []
    for n, p, a in zip(new, proximal, advantage, strict=True):
        tau = s.temperature_positive if a > 0 else s.temperature_negative
        ratio = math.exp(n - p)
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        loss.append(-4 / tau * gate * a)
        gradient.append(-4 * gate * (1 - gate) * ratio * a)
    return loss, gradient, [False] * len(loss)


def slow_reinforce(
    new: list[float], proximal: list[float], advantage: list[float], sequence: list[int], s: Any
) -> Columns:
    return (
        [-a * n for n, a in zip(new, advantage, strict=True)],
        [-a for a in advantage],
        [False] * len(new),
    )


SLOW: dict[str, Callable[..., Columns]] = {
    "ppo_clip": slow_ppo,
    "gspo": slow_gspo,
    "cispo": slow_cispo,
    "sapo": slow_sapo,
    "reinforce": slow_reinforce,
}


def near_a_bound(new: Tensor, proximal: Tensor, sequence: Tensor, chosen: Any) -> bool:
    """A ratio lies where the loss has a kink."""
    log_ratio = new - proximal
    if isinstance(chosen, Gspo):
        log_ratio = torch.stack([log_ratio[sequence == one].mean() for one in sequence.unique()])
    bounds = [1 + getattr(chosen, "clip_high", 9.0), 1 - (getattr(chosen, "clip_low", None) or 0.0)]
    bounds.append(getattr(chosen, "dual_clip", None) or 9.0)
    return any(bool(((log_ratio.exp() - bound).abs() < 1e-4).any()) for bound in bounds)


@settings(max_examples=150)
@given(NUMBERS, st.sampled_from(EVERY))
def test_loss_gradient_and_clipping_are_those_of_a_plain_loop(seed: int, chosen: Any) -> None:
    new, proximal, advantage, sequence = tokens(seed)
    assume(not near_a_bound(new, proximal, sequence, chosen))
    new.requires_grad_()
    loss, clipped = per_token_loss(new, proximal, advantage, chosen, sequence)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    expected = SLOW[chosen.kind](new.tolist(), proximal.tolist(), advantage.tolist(), sequence.tolist(), chosen)
    np.testing.assert_allclose(loss.detach().numpy(), expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient.numpy(), expected[1], rtol=1e-10, atol=1e-14)
    assert clipped.tolist() == expected[2]


def test_every_objective_has_its_slow_version() -> None:
    assert SLOW.keys() == OBJECTIVES.keys()
    assert {chosen.kind for chosen in EVERY} == OBJECTIVES.keys()


@settings(max_examples=60)
@given(NUMBERS, st.sampled_from([chosen for chosen in EVERY if chosen.kind not in WITH_A_CONSTANT]))
def test_the_gradient_is_the_derivative_of_the_loss(seed: int, chosen: Any) -> None:
    new, proximal, advantage, sequence = tokens(seed)
    assume(not near_a_bound(new, proximal, sequence, chosen))

    def loss(x: Tensor) -> Tensor:
        return per_token_loss(x, proximal, advantage, chosen, sequence)[0].sum()

    assert torch.autograd.gradcheck(loss, new.requires_grad_(), eps=1e-6, atol=1e-7)


@settings(max_examples=30)
@given(NUMBERS)
def test_cispo_s_gradient_is_the_derivative_of_its_loss_with_the_ratio_held(seed: int) -> None:
    new, proximal, advantage, sequence = tokens(seed)
    chosen = Cispo(clip_high=0.2)
    new.requires_grad_()
    (gradient,) = torch.autograd.grad(per_token_loss(new, proximal, advantage, chosen, sequence)[0].sum(), new)
    weight = torch.exp(new.detach() - proximal).clamp(max=1.2)
    step = 1e-6
    numeric = (-weight * advantage * (new.detach() + step) + weight * advantage * (new.detach() - step)) / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-7, atol=1e-8)


# --- laws ------------------------------------------------------------------------------------------


@given(NUMBERS, st.sampled_from(EVERY))
def test_on_policy_every_objective_has_the_gradient_of_reinforce(seed: int, chosen: Any) -> None:
    _, proximal, advantage, sequence = tokens(seed)
    new = proximal.clone().requires_grad_()
    loss, clipped = per_token_loss(new, new.detach(), advantage, chosen, sequence)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    torch.testing.assert_close(gradient, -advantage, rtol=1e-12, atol=1e-14)
    assert not clipped.any()


def test_ppo_clips_only_where_the_step_would_go_too_far() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    loss, clipped = per_token_loss(ratio.log(), torch.zeros(5, dtype=torch.float64), advantage, PpoClip())
    torch.testing.assert_close(loss, torch.tensor([-1.3, 1.5, -0.5, 0.8, -1.0], dtype=torch.float64))
    assert clipped.tolist() == [True, False, False, True, False]


def test_dual_clip_bounds_the_loss_of_a_wrong_response_that_became_likely() -> None:
    ratio = torch.tensor([2.0, 10.0, 10.0, 0.1], dtype=torch.float64)
    advantage = torch.tensor([-1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    new = ratio.log().requires_grad_()
    loss, clipped = per_token_loss(new, torch.zeros(4, dtype=torch.float64), advantage, PpoClip(dual_clip=3.0))
    torch.testing.assert_close(loss.detach(), torch.tensor([2.0, 3.0, -1.3, 0.8], dtype=torch.float64))
    assert clipped.tolist() == [False, True, True, True]
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert gradient.tolist() == [2.0, 0.0, 0.0, 0.0]


@settings(max_examples=40)
@given(NUMBERS)
def test_gspo_does_to_responses_of_one_token_what_ppo_does(seed: int) -> None:
    new, proximal, advantage, _ = tokens(seed)
    bounds = {"clip_low": 0.1, "clip_high": 0.2}
    alone = torch.arange(len(new))
    for one, other in zip(
        per_token_loss(new, proximal, advantage, Gspo(**bounds), alone),
        per_token_loss(new, proximal, advantage, PpoClip(**bounds)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@settings(max_examples=40)
@given(NUMBERS)
def test_gspo_clips_whole_responses_and_gives_their_tokens_one_gradient(seed: int) -> None:
    new, proximal, advantage, sequence = tokens(seed)
    new.requires_grad_()
    loss, clipped = per_token_loss(new, proximal, advantage, WIDE, sequence)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    for one in sequence.unique():
        for column in (loss.detach(), gradient, clipped.double()):
            torch.testing.assert_close(
                column[sequence == one], column[sequence == one][0].expand_as(new[sequence == one])
            )


@settings(max_examples=40)
@given(NUMBERS, st.sampled_from(EVERY))
def test_a_token_s_weight_meets_its_own_gradient(seed: int, chosen: Any) -> None:
    """A token that the importance mask takes out has no gradient, and no other token loses any of its own."""
    new, proximal, advantage, sequence = tokens(seed)
    new.requires_grad_()
    weight = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, len(new))).double()
    loss, _ = per_token_loss(new, proximal, advantage, chosen, sequence)
    (plain,) = torch.autograd.grad(loss.sum(), new, retain_graph=True)
    (weighted,) = torch.autograd.grad((weight * loss).sum(), new)
    torch.testing.assert_close(weighted, weight * plain)


@pytest.mark.parametrize(("aggregation", "weight"), [("grpo", lambda length: 1.0), ("sequence_sum", float)])
def test_gspo_and_luspo_are_aggregations_of_one_objective(aggregation: str, weight: Callable[[int], float]) -> None:
    """GSPO: mean over responses of -min(s A, clip(s) A). LUSPO: the same times the length."""
    new, proximal, advantage, sequence = tokens(3)
    loss, _ = per_token_loss(new, proximal, advantage, WIDE, sequence)
    places, lengths = sequence.unique(return_counts=True)
    coefficients = token_coefficients(aggregation, lengths, max_length=64)
    ours = sum(float(c * loss[sequence == one].sum()) for c, one in zip(coefficients, places, strict=True))
    published = 0.0
    for one, length in zip(places, lengths.tolist(), strict=True):
        own = sequence == one
        ratio = math.exp(float((new - proximal)[own].mean()))
        published += surrogate(ratio, float(advantage[own][0]), 0.1, 0.2)[0] * weight(length) / len(places)
    assert ours == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("chosen", EVERY, ids=lambda chosen: chosen.kind)
@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_the_sum_over_any_split_into_micro_batches_is_the_whole_gradient(chosen: Any, aggregation: str) -> None:
    """As long as no response is split, which packing never does."""
    new, proximal, advantage, sequence = tokens(11, responses=6)
    places, lengths = sequence.unique(return_counts=True)
    per_response = dict(
        zip(places.tolist(), token_coefficients(aggregation, lengths, max_length=64).tolist(), strict=True)
    )
    coefficient = torch.tensor([per_response[one] for one in sequence.tolist()], dtype=torch.float64)

    def gradient(parts: list[Tensor]) -> Tensor:
        free = new.clone().requires_grad_()
        for part in parts:
            loss, _ = per_token_loss(free[part], proximal[part], advantage[part], chosen, sequence[part])
            (coefficient[part] * loss).sum().backward()
        assert free.grad is not None
        return free.grad

    whole = gradient([torch.ones_like(sequence, dtype=torch.bool)])
    for size in (1, 2, 4):
        cut = [torch.isin(sequence, some) for some in places.split(size)]
        torch.testing.assert_close(gradient(cut), whole, rtol=1e-12, atol=1e-15)


def test_a_token_beyond_cispo_s_bound_keeps_a_gradient_and_one_beyond_ppo_s_does_not() -> None:
    proximal, advantage = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for chosen, expected in ((Cispo(clip_high=0.3), -1.3), (PpoClip(clip_high=0.3), 0.0)):
        new = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(per_token_loss(new, proximal, advantage, chosen)[0].sum(), new)
        assert float(gradient) == pytest.approx(expected)


@given(st.floats(-3.0, 3.0), st.booleans())
def test_sapo_s_gradient_never_exceeds_the_unclipped_one(log_ratio: float, is_positive: bool) -> None:
    new = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0 if is_positive else -1.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(per_token_loss(new, torch.zeros_like(new), advantage, Sapo())[0].sum(), new)
    assert abs(float(gradient)) <= math.exp(log_ratio) * (1 + 1e-12)


def test_losses_of_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        per_token_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), Reinforce())
    with pytest.raises(ValueError, match="different shapes"):
        per_token_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), Reinforce(), torch.zeros(3, dtype=torch.int64))


def test_an_objective_of_whole_responses_asks_for_their_numbers() -> None:
    with pytest.raises(ValueError, match="the objective gspo needs `sequence`"):
        per_token_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), Gspo())


@pytest.mark.parametrize("chosen", EVERY, ids=lambda chosen: chosen.kind)
def test_no_tokens_give_no_losses(chosen: Any) -> None:
    nothing = torch.zeros(0)
    loss, clipped = per_token_loss(nothing, nothing, nothing, chosen, torch.zeros(0, dtype=torch.int64))
    assert loss.tolist() == clipped.tolist() == []


SETTINGS = {"ppo_clip": PpoClip, "gspo": Gspo, "cispo": Cispo, "sapo": Sapo, "reinforce": Reinforce}


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
@pytest.mark.parametrize("gap", [100.0, -100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_all_bounds_gives_finite_losses_and_gradients(kind: str, gap: float, advantage: float) -> None:
    new = torch.tensor([gap], requires_grad=True)
    loss, _ = per_token_loss(
        new, torch.zeros(1), torch.tensor([advantage]), SETTINGS[kind](), torch.zeros(1, dtype=torch.int64)
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()
