"""Laws of the aggregations, agreement with the authors' numbers, and with sums written out token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltal.algorithm import AGGREGATIONS, token_coefficients

GOLDEN = json.loads((Path(__file__).parent / "data" / "aggregation_golden.json").read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
METHODS = [(case, method) for case in CASES for method in case["methods"]]
NAMES = sorted(AGGREGATIONS)
UNBIASED = ["delta_l", "dr_grpo"]
BATCH = st.lists(st.integers(1, 4096), min_size=1, max_size=40)
ALPHAS = st.floats(0.0, 4.0)


def relative_variance(coefficients: Tensor, lengths: Tensor) -> float:
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


# --- independent slow versions ---------------------------------------------------------------------

Losses = list[list[Fraction]]
"""Loss of each token of each response, exact."""


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def slow_delta_l(losses: Losses, limit: int, alpha: int) -> Fraction:
    """The batch's mean of L^-α-weighted sums, as the paper writes it: weights that sum to B, over B and M."""
    powers = [Fraction(1, len(response) ** alpha) for response in losses]
    weights = [len(losses) * power / sum(powers) for power in powers]
    return mean([weight * sum(response) for weight, response in zip(weights, losses, strict=True)]) / limit


SLOW: dict[str, Callable[[Losses, int, int], Fraction]] = {
    "delta_l": slow_delta_l,
    "dr_grpo": lambda losses, limit, alpha: mean([sum(response, Fraction(0)) / limit for response in losses]),
    "grpo": lambda losses, limit, alpha: mean([mean(response) for response in losses]),
    "dapo": lambda losses, limit, alpha: mean([loss for response in losses for loss in response]),
    "sequence_sum": lambda losses, limit, alpha: mean([sum(response, Fraction(0)) for response in losses]),
}


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(-9, 9), max_size=12), min_size=1, max_size=8).filter(any),
    st.integers(0, 3),
    st.sampled_from(NAMES),
)
def test_the_loss_is_the_published_mean_over_tokens_and_responses(
    numbers: list[list[int]], alpha: int, method: str
) -> None:
    losses = [[Fraction(number, 8) for number in response] for response in numbers]
    expected = SLOW[method]([response for response in losses if response], 12, alpha)
    got = token_coefficients(method, [len(response) for response in losses], max_length=12, alpha=alpha)
    loss = sum(c * float(sum(response)) for c, response in zip(got.tolist(), losses, strict=True))
    assert loss == pytest.approx(float(expected), rel=1e-12, abs=1e-14)


def test_every_aggregation_has_its_slow_version() -> None:
    assert SLOW.keys() == AGGREGATIONS.keys()


# --- laws ------------------------------------------------------------------------------------------


@given(BATCH, ALPHAS, st.sampled_from(UNBIASED))
def test_unbiased_coefficients_sum_to_one_over_max_length(lengths: list[int], alpha: float, method: str) -> None:
    got = token_coefficients(method, lengths, max_length=4096, alpha=alpha)
    assert float(got.sum()) * 4096 == pytest.approx(1.0, rel=1e-12)


@given(BATCH)
def test_sequence_sums_are_unbiased_up_to_the_constant_max_length(lengths: list[int]) -> None:
    got = token_coefficients("sequence_sum", lengths, max_length=4096)
    torch.testing.assert_close(got / 4096, token_coefficients("dr_grpo", lengths, max_length=4096), rtol=1e-14, atol=0)


@given(BATCH)
def test_alpha_zero_is_dr_grpo(lengths: list[int]) -> None:
    zero = token_coefficients("delta_l", lengths, max_length=5000, alpha=0.0)
    torch.testing.assert_close(zero, token_coefficients("dr_grpo", lengths, max_length=5000), rtol=1e-14, atol=0)


@given(BATCH)
def test_alpha_one_is_grpo_up_to_a_factor(lengths: list[int]) -> None:
    one = token_coefficients("delta_l", lengths, max_length=5000, alpha=1.0)
    grpo = token_coefficients("grpo", lengths, max_length=5000)
    torch.testing.assert_close(one / one.sum(), grpo / grpo.sum(), rtol=1e-12, atol=0)


@given(BATCH, st.sampled_from(["grpo", "dapo"]))
def test_biased_coefficients_shrink_as_lengths_grow(lengths: list[int], method: str) -> None:
    once = token_coefficients(method, lengths, max_length=8192)
    twice = token_coefficients(method, [2 * length for length in lengths], max_length=8192)
    torch.testing.assert_close(twice, once / 2, rtol=1e-12, atol=0)


@given(BATCH, ALPHAS, st.sampled_from(UNBIASED))
def test_unbiased_coefficients_do_not_shrink_as_lengths_grow(lengths: list[int], alpha: float, method: str) -> None:
    once = token_coefficients(method, lengths, max_length=8192, alpha=alpha)
    twice = token_coefficients(method, [2 * length for length in lengths], max_length=8192, alpha=alpha)
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=0)


@given(st.integers(1, 4096), st.integers(1, 40), ALPHAS)
def test_equal_lengths_make_all_methods_proportional(length: int, responses: int, alpha: float) -> None:
    for method in AGGREGATIONS:
        got = token_coefficients(method, [length] * responses, max_length=4096, alpha=alpha)
        torch.testing.assert_close(got, got[0].expand(responses), rtol=1e-14, atol=0)


@given(BATCH, st.randoms(use_true_random=False), st.sampled_from(NAMES))
def test_permuting_the_batch_permutes_the_coefficients(lengths: list[int], random: Any, method: str) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    straight = token_coefficients(method, lengths, max_length=4096)
    permuted = token_coefficients(method, [lengths[i] for i in order], max_length=4096)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-12, atol=0)


@given(BATCH, st.integers(2, 5), ALPHAS, st.sampled_from(NAMES))
def test_a_batch_that_holds_everything_k_times_gives_each_copy_a_kth(
    lengths: list[int], times: int, alpha: float, method: str
) -> None:
    once = token_coefficients(method, lengths, max_length=4096, alpha=alpha)
    many = token_coefficients(method, lengths * times, max_length=4096, alpha=alpha)
    torch.testing.assert_close(many * times, once.repeat(times), rtol=1e-12, atol=0)


@given(BATCH, ALPHAS, st.sampled_from(NAMES), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_sum_over_any_split_into_micro_batches_is_the_whole(
    lengths: list[int], alpha: float, method: str, parts: int, seed: int
) -> None:
    """Any division of the responses: each carries its coefficient, so nothing is averaged again."""
    coefficients = token_coefficients(method, lengths, max_length=4096, alpha=alpha)
    draw = np.random.default_rng(seed)
    loss = torch.from_numpy(draw.normal(size=len(lengths)))
    part = torch.from_numpy(draw.integers(0, parts, len(lengths)))
    split = sum(float((coefficients * loss)[part == which].sum()) for which in range(parts))
    whole = float((coefficients * loss).sum())
    assert split == pytest.approx(whole, rel=1e-9, abs=1e-12 * float(coefficients.sum()))


@given(BATCH, st.sampled_from(NAMES))
def test_empty_responses_are_in_no_sum(lengths: list[int], method: str) -> None:
    without = token_coefficients(method, lengths, max_length=4096)
    with_empty = token_coefficients(method, [0, *lengths, 0], max_length=4096)
    assert float(with_empty[0]) == float(with_empty[-1]) == 0.0
    torch.testing.assert_close(with_empty[1:-1], without, rtol=0, atol=0)


# --- least variance --------------------------------------------------------------------------------


@given(BATCH, st.integers(0, 2**32 - 1))
def test_no_other_unbiased_weights_have_less_variance_than_alpha_one(lengths: list[int], seed: int) -> None:
    best = token_coefficients("delta_l", lengths, max_length=4096, alpha=1.0)
    weights = torch.rand(len(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1e-3
    other = weights / weights.sum() * best.sum()
    long = torch.tensor(lengths, dtype=torch.float64)
    assert relative_variance(best, long) <= relative_variance(other, long) * (1 + 1e-12)


def least_variance(variances: Tensor) -> Tensor:
    """The positive weights of sum 1 that an optimiser finds for least Σ w² v: L-BFGS on their logarithms.

    It begins at weights of 1 / √v, halfway: from equal ones it gets stuck when v spans five orders of magnitude.
    """
    free = torch.zeros(len(variances), dtype=torch.float64, requires_grad=True)
    begin = -0.5 * variances.log()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-7, tolerance_change=0, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The logarithm has the same minimum and one scale for all lengths; a millionfold, since L-BFGS takes what is
        # below 1e-10 for no curvature.
        loss = 1e6 * (torch.softmax(free + begin, 0).square() * variances).sum().log()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return torch.softmax(free.detach() + begin, 0)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 4096), min_size=2, max_size=12), st.sampled_from([0.0, 0.5, 1.0, 1.5]))
def test_an_optimiser_finds_the_weights_of_delta_l_when_alpha_is_the_growth_of_the_variance(
    lengths: list[int], growth: float
) -> None:
    """Under Var(g_i) = V L_i^β the best unbiased weights are those of α = β; the paper's case is β = 1."""
    found = least_variance(torch.tensor(lengths, dtype=torch.float64).pow(growth))
    ours = token_coefficients("delta_l", lengths, max_length=4096, alpha=growth) * 4096
    torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-6)


# --- sizes, input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["delta_l", "dr_grpo", "grpo", "dapo", "sequence_sum"])
def test_a_million_responses_of_up_to_a_million_tokens_are_right(method: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 1_000_001, 1_000_000)
    lengths[:2] = 1, 1_000_000
    got = token_coefficients(method, lengths, max_length=1_000_000).numpy()
    exact = {
        "delta_l": 1 / (lengths * (1_000_000 * math.fsum(1 / lengths))),
        "dr_grpo": np.full(len(lengths), 1e-12),
        "grpo": 1 / (1e6 * lengths),
        "dapo": np.full(len(lengths), 1 / int(lengths.sum())),
        "sequence_sum": np.full(len(lengths), 1e-6),
    }[method]
    np.testing.assert_allclose(got, exact, rtol=1e-10)


@pytest.mark.parametrize("length", [1, 1000])
@pytest.mark.parametrize("method", NAMES)
def test_one_response_is_enough(method: str, length: int) -> None:
    got = float(token_coefficients(method, [length], max_length=1000))
    assert got == pytest.approx(float(SLOW[method]([[Fraction(1, length)] * length], 1000, 1)), rel=1e-14)


def test_a_huge_alpha_stays_finite() -> None:
    lengths = np.random.default_rng(0).integers(1, 8192, 1000)
    got = token_coefficients("delta_l", lengths, max_length=8192, alpha=500.0)
    assert bool(torch.isfinite(got).all())
    assert float(got.sum()) * 8192 == pytest.approx(1.0)


def test_tensor_array_and_sequence_are_the_same() -> None:
    lengths = [3, 0, 7]
    as_list = token_coefficients("delta_l", lengths, max_length=8)
    for given_as in (torch.tensor(lengths), np.asarray(lengths, np.int32), tuple(lengths)):
        assert torch.equal(token_coefficients("delta_l", given_as, max_length=8), as_list)


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
        ({"lengths": [1], "max_length": 8.5}, r"max_length = 8.5"),
        ({"lengths": [1], "max_length": "8"}, r"max_length = '8'"),
        ({"lengths": [1], "max_length": 2**70}, r"max_length = 1180591620717411303424"),
        ({"lengths": [1], "alpha": "1"}, r"alpha = '1'"),
        ({"lengths": [1], "method": "delta_k"}, r"'delta_k' is no aggregation; the nearest is 'delta_l'"),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_coefficients(**{"method": "delta_l", "max_length": 8, **arguments})
