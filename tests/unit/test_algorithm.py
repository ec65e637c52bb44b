"""Laws of aggregation, advantage and objective, and agreement with the authors' numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal.algorithm import AGGREGATIONS, advantages, importance_weight, per_token_loss, token_coefficients
from deltal.config import PpoClip, Reinforce

GOLDEN = json.loads((Path(__file__).parent / "data" / "aggregation_golden.json").read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
METHODS = [(case, method) for case in CASES for method in case["methods"]]

# The first call of a law loads parts of torch: no deadline per example.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
lengths_of_a_batch = st.lists(st.integers(1, 4096), min_size=1, max_size=40)


def relative_variance(coefficients: torch.Tensor, lengths: torch.Tensor) -> float:
    """cv² = Σ c² L / (Σ c)² under Var(g_i) = V L_i with V = 1."""
    return float((coefficients**2 * lengths).sum() / coefficients.sum() ** 2)


@pytest.mark.parametrize(
    ("case", "method"), METHODS, ids=[f"{case['title']}-{method['name']}-{method['alpha']}" for case, method in METHODS]
)
def test_coefficients_agree_with_the_authors_code(case: dict[str, Any], method: dict[str, Any]) -> None:
    alpha = 1.0 if method["alpha"] is None else method["alpha"]
    got = token_coefficients(method["name"], case["lengths"], max_length=case["max_response_length"], alpha=alpha)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), method["token_coefficient"], rtol=1e-7)
    lengths = torch.tensor(case["lengths"], dtype=torch.float64)
    assert float(got.sum()) * case["max_response_length"] == pytest.approx(method["scale_times_max_length"], rel=1e-7)
    assert relative_variance(got, lengths) == pytest.approx(method["cv2"], rel=1e-7)
    loss = float((got * torch.tensor(case["token_loss_sum"], dtype=torch.float64)).sum())
    assert loss == pytest.approx(method["loss"], rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
@pytest.mark.parametrize(("kind", "column"), [("grpo", "std"), ("grpo_no_std", "no_std")])
def test_advantages_agree_with_the_authors_code(case: dict[str, Any], kind: str, column: str) -> None:
    got = advantages(case["rewards"], case["groups"], kind=kind)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), case["advantage"][column], rtol=1e-7, atol=1e-12)


@given(lengths_of_a_batch, st.floats(0.0, 4.0), st.sampled_from(["delta_l", "dr_grpo"]))
def test_unbiased_coefficients_sum_to_one_over_max_length(lengths: list[int], alpha: float, method: str) -> None:
    got = token_coefficients(method, lengths, max_length=4096, alpha=alpha)
    assert float(got.sum()) * 4096 == pytest.approx(1.0, rel=1e-12)


@given(lengths_of_a_batch)
def test_alpha_zero_is_dr_grpo(lengths: list[int]) -> None:
    zero = token_coefficients("delta_l", lengths, max_length=5000, alpha=0.0)
    torch.testing.assert_close(zero, token_coefficients("dr_grpo", lengths, max_length=5000), rtol=1e-14, atol=0)


@given(st.integers(1, 4096), st.integers(1, 40), st.floats(0.0, 4.0))
def test_equal_lengths_make_all_methods_proportional(length: int, responses: int, alpha: float) -> None:
    for method in AGGREGATIONS:
        got = token_coefficients(method, [length] * responses, max_length=4096, alpha=alpha)
        torch.testing.assert_close(got, got[0].expand(responses), rtol=1e-14, atol=0)


@given(lengths_of_a_batch, st.randoms(use_true_random=False), st.sampled_from(sorted(AGGREGATIONS)))
def test_permuting_the_batch_permutes_the_coefficients(lengths: list[int], random: Any, method: str) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    straight = token_coefficients(method, lengths, max_length=4096)
    permuted = token_coefficients(method, [lengths[i] for i in order], max_length=4096)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-12, atol=0)


@given(lengths_of_a_batch, st.integers(0, 2**32 - 1))
def test_alpha_one_minimises_variance_when_it_grows_with_length(lengths: list[int], seed: int) -> None:
    best = token_coefficients("delta_l", lengths, max_length=4096, alpha=1.0)
    weights = torch.rand(len(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1e-3
    other = weights / weights.sum() * best.sum()
    long = torch.tensor(lengths, dtype=torch.float64)
    assert relative_variance(best, long) <= relative_variance(other, long) * (1 + 1e-12)


@given(lengths_of_a_batch, st.sampled_from(sorted(AGGREGATIONS)))
def test_empty_responses_are_in_no_sum(lengths: list[int], method: str) -> None:
    without = token_coefficients(method, lengths, max_length=4096)
    with_empty = token_coefficients(method, [0, *lengths, 0], max_length=4096)
    assert float(with_empty[0]) == float(with_empty[-1]) == 0.0
    torch.testing.assert_close(with_empty[1:-1], without, rtol=0, atol=0)


def test_tensor_array_and_sequence_are_the_same() -> None:
    lengths = [3, 0, 7]
    as_list = token_coefficients("delta_l", lengths, max_length=8)
    for given_as in (torch.tensor(lengths), np.asarray(lengths, np.int32), tuple(lengths)):
        assert torch.equal(token_coefficients("delta_l", given_as, max_length=8), as_list)


def test_a_million_responses_and_a_huge_alpha_stay_finite() -> None:
    lengths = np.random.default_rng(0).integers(1, 8192, 1_000_000)
    got = token_coefficients("delta_l", lengths, max_length=8192, alpha=500.0)
    assert bool(torch.isfinite(got).all())
    assert float(got.sum()) * 8192 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, -2]}, r"lengths\[1\] = -2 is negative"),
        ({"lengths": [3, 9]}, r"lengths\[1\] = 9 is above max_length = 8"),
        ({"lengths": [1], "alpha": -0.5}, r"alpha = -0.5"),
        ({"lengths": [1], "alpha": float("nan")}, r"alpha = nan"),
        ({"lengths": [0, 0]}, r"2 responses has no policy-written token"),
        ({"lengths": []}, r"0 responses has no policy-written token"),
        ({"lengths": [1.5]}, r"dtype float64"),
        ({"lengths": [[1], [2]]}, r"shape \(2, 1\)"),
        ({"lengths": [1], "max_length": 0}, r"max_length = 0"),
        ({"lengths": [1], "method": "delta_k"}, r"'delta_k' is no aggregation; the nearest is 'delta_l'"),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_coefficients(**{"method": "delta_l", "max_length": 8, **arguments})


def test_equal_rewards_give_exactly_zero_and_groups_may_be_mixed() -> None:
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


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([PpoClip(), Reinforce()]))
def test_objective_gradient_agrees_with_finite_differences(seed: int, objective: PpoClip | Reinforce) -> None:
    generator = torch.Generator().manual_seed(seed)
    proximal = -torch.rand(16, dtype=torch.float64, generator=generator) * 3
    new = (proximal + torch.randn(16, dtype=torch.float64, generator=generator) * 0.4).requires_grad_()
    advantage = torch.randn(16, dtype=torch.float64, generator=generator)
    loss, clipped = per_token_loss(new, proximal, advantage, objective)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    step = 1e-6
    with torch.no_grad():
        above = per_token_loss(new + step, proximal, advantage, objective)[0]
        below = per_token_loss(new - step, proximal, advantage, objective)[0]
    numeric = (above - below) / (2 * step)
    ratio = torch.exp(new.detach() - proximal)
    smooth = ((ratio - 0.8).abs() > 1e-4) & ((ratio - 1.3).abs() > 1e-4)
    torch.testing.assert_close(gradient[smooth], numeric[smooth], rtol=1e-5, atol=1e-8)
    assert bool((gradient[clipped] == 0).all())


def test_ppo_clip_clips_only_where_the_step_would_go_too_far() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    loss, clipped = per_token_loss(ratio.log(), torch.zeros(5, dtype=torch.float64), advantage, PpoClip())
    torch.testing.assert_close(loss, torch.tensor([-1.3, 1.5, -0.5, 0.8, -1.0], dtype=torch.float64))
    assert clipped.tolist() == [True, False, False, True, False]


def test_on_policy_ppo_and_reinforce_have_the_same_gradient() -> None:
    new = torch.tensor([-0.3, -2.0], requires_grad=True)
    advantage = torch.tensor([0.7, -0.2])
    gradients = [
        torch.autograd.grad(per_token_loss(new, new.detach(), advantage, kind)[0].sum(), new)[0]
        for kind in (PpoClip(), Reinforce())
    ]
    torch.testing.assert_close(*gradients)


def test_importance_weight_is_truncated_and_constant() -> None:
    proximal = torch.tensor([0.0, 0.0], requires_grad=True)
    old = torch.tensor([0.5, -5.0])
    weight = importance_weight(proximal, old, 2.0)
    torch.testing.assert_close(weight, torch.tensor([float(np.exp(-0.5)), 2.0]))
    assert not weight.requires_grad
    assert importance_weight(proximal, old, None).tolist() == [1.0, 1.0]


def test_losses_of_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        per_token_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), Reinforce())
