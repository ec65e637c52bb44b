"""Laws of sketches, of β's fit and of the variance instrument."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltal.algorithm import token_coefficients
from deltal.algorithm.alpha import AlphaEstimate, BetaFit, fit_beta
from deltal.algorithm.sketch import Sketcher, factor_gram, gram
from deltal.algorithm.variance import by_length, debiased_square, deviations, empirical_bias, would_have_done
from deltal.config.algorithm import AutoAlpha

LIMIT = 4096


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths_of(count: int, seed: int = 0) -> Tensor:
    """Log-normal, 1 to 4,096."""
    return torch.exp(torch.randn(count, generator=generator(seed)) * 1.2 + 4.5).long().clamp(1, LIMIT)


def gradients(lengths: Tensor, beta: float, *, mean: float = 0.0, width: int = 48, seed: int = 1) -> Tensor:
    """Independent rows with covariance L^β / width · I around one mean of norm `mean`."""
    noise = torch.randn(len(lengths), width, generator=generator(seed), dtype=torch.float64) / math.sqrt(width)
    return noise * lengths.double().pow(beta / 2)[:, None] + mean / math.sqrt(width)


# --- β ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5])
def test_a_known_beta_is_recovered_within_its_interval(beta: float) -> None:
    lengths = lengths_of(512)
    fit = fit_beta(lengths, gradients(lengths, beta).square().sum(1), torch.arange(512) // 8)
    assert fit is not None
    low, high = fit.interval
    assert low <= beta <= high
    assert fit.deviation < 0.03


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(beta: float) -> None:
    held = 0
    for seed in range(60):
        lengths = lengths_of(128, seed)
        fit = fit_beta(lengths, gradients(lengths, beta, seed=seed).square().sum(1), torch.arange(128) // 8)
        assert fit is not None
        held += fit.interval[0] <= beta <= fit.interval[1]
    assert held >= 51  # 85%: 16 groups make a bootstrap's 95% interval a little narrow


def test_outliers_do_not_move_beta() -> None:
    lengths = lengths_of(512)
    squares = gradients(lengths, 1.0).square().sum(1)
    squares[torch.argsort(lengths)[-20:]] *= 1e6
    fit = fit_beta(lengths, squares, torch.arange(512) // 8)
    assert fit is not None
    assert abs(fit.beta - 1.0) < 0.15


def test_what_cannot_tell_beta_gives_none() -> None:
    one_group = torch.zeros(64, dtype=torch.int64)
    assert fit_beta(torch.arange(1, 65), torch.rand(64), one_group) is None  # no interval from one group
    few, many = torch.arange(1, 8), torch.full((64,), 9)
    assert fit_beta(few, torch.ones(7), torch.arange(7)) is None
    assert fit_beta(many, torch.rand(64), torch.arange(64)) is None
    assert fit_beta(torch.arange(64), torch.zeros(64), torch.arange(64)) is None


def test_alpha_is_the_fallback_until_the_interval_is_narrow_and_stays_in_its_range() -> None:
    settings = AutoAlpha(low=0.2, high=1.2, fallback=0.75, certain_within=0.3)
    estimate = AlphaEstimate()
    assert estimate.alpha(settings) == 0.75
    estimate = estimate.updated(BetaFit(beta=0.9, deviation=0.5, responses=64), settings)
    assert estimate.alpha(settings) == 0.75
    for _ in range(20):
        estimate = estimate.updated(BetaFit(beta=0.9, deviation=0.3, responses=64), settings)
    assert estimate.alpha(settings) == pytest.approx(0.9, abs=1e-6)
    for beta, alpha in ((3.0, 1.2), (-2.0, 0.2)):
        far = AlphaEstimate().updated(BetaFit(beta=beta, deviation=0.01, responses=64), settings)
        assert far.alpha(settings) == alpha


def test_smoothing_weighs_batches_by_their_certainty_and_forgets_slowly() -> None:
    settings = AutoAlpha(drift=0.05)
    estimate = AlphaEstimate().updated(BetaFit(beta=1.0, deviation=0.05, responses=64), settings)
    vague = estimate.updated(BetaFit(beta=2.0, deviation=1.0, responses=8), settings)
    sure = estimate.updated(BetaFit(beta=2.0, deviation=0.01, responses=999), settings)
    assert 1.0 < vague.mean < 1.02
    assert sure.mean > 1.9
    silent = estimate
    for _ in range(100):
        silent = silent.updated(None, settings)
    assert silent.mean == estimate.mean
    assert silent.half_width > 0.9


# --- sketches ---------------------------------------------------------------------------------------


def head_batch(
    responses: int = 24, vocabulary: int = 400, width: int = 96
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Probabilities, hidden states and targets of responses of unlike lengths."""
    draw = generator(3)
    lengths = torch.randint(1, 30, (responses,), generator=draw).tolist()
    states = [torch.randn(n, width, generator=draw) for n in lengths]
    weight = torch.randn(vocabulary, width, generator=draw) * 0.2
    probabilities = [torch.softmax(state @ weight.t(), -1) for state in states]
    return probabilities, states, [torch.multinomial(p, 1, generator=draw)[:, 0] for p in probabilities]


def test_exact_products_from_factors_equal_those_of_the_gradients_themselves() -> None:
    probabilities, states, targets = head_batch()
    errors = []
    for p, y in zip(probabilities, targets, strict=True):
        error = -p.clone()
        error[torch.arange(len(y)), y] += 1.0
        errors.append(error)
    whole = torch.stack([(e.t() @ h).flatten() for e, h in zip(errors, states, strict=True)])
    torch.testing.assert_close(factor_gram(errors, states), gram(whole), rtol=1e-4, atol=1e-4)


def test_sketched_products_agree_with_exact_ones_as_well_as_promised() -> None:
    probabilities, states, targets = head_batch()
    errors = [torch.nn.functional.one_hot(y, p.shape[1]) - p for p, y in zip(probabilities, targets, strict=True)]
    exact = factor_gram(errors, states)
    ratios = []
    for seed in range(40):
        sketcher = Sketcher(400, 96, size=64, seed=seed)
        sketcher.begin(len(states))
        for row, (p, h, y) in enumerate(zip(probabilities, states, targets, strict=True)):
            sketcher.add(p, h, y, torch.full_like(y, row))
        ratios.append(gram(sketcher.sketches).diagonal() / exact.diagonal())
    told = torch.stack(ratios)
    assert float((told.mean() - 1.0).abs()) < 0.02  # unbiased
    assert float(told.std(0).mean()) < 2 / math.sqrt(64)  # no worse than a gradient of rank one


def test_a_sketch_does_not_depend_on_how_tokens_are_cut_into_chunks() -> None:
    probabilities, states, targets = head_batch()
    owners = torch.cat([torch.full_like(y, row) for row, y in enumerate(targets)])
    p, h, y = torch.cat(probabilities), torch.cat(states), torch.cat(targets)
    made = []
    for chunk in (7, 1000):
        sketcher = Sketcher(400, 96, size=16, seed=5)
        sketcher.begin(len(states))
        for start in range(0, len(y), chunk):
            part = slice(start, start + chunk)
            sketcher.add(p[part], h[part], y[part], owners[part], temperature=0.7)
        made.append(sketcher.sketches)
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-4)


# --- the instrument ---------------------------------------------------------------------------------


def all_methods(lengths: Tensor, alpha: float = 1.0) -> dict[str, Tensor]:
    return {
        method: token_coefficients(method, lengths, max_length=LIMIT, alpha=alpha)
        for method in ("delta_l", "dr_grpo", "grpo", "dapo")
    }


def test_predicted_variance_of_every_method_agrees_with_monte_carlo() -> None:
    """Draw many batches with the same lengths; the update's own spread over them is the truth."""
    lengths, beta, mean = lengths_of(64), 1.0, 30.0
    ones = torch.ones(64)
    updates: dict[str, list[Tensor]] = {method: [] for method in all_methods(lengths)}
    told: dict[str, list[float]] = {method: [] for method in updates}
    for seed in range(400):
        g = gradients(lengths, beta, mean=mean, seed=seed)
        for method, c in all_methods(lengths).items():
            updates[method].append(c @ g)
        row = would_have_done(gram(g), lengths, ones, all_methods(lengths), max_length=LIMIT)
        for method in updates:
            told[method].append(row[method]["cv2"] or math.nan)
    for method, made in updates.items():
        drawn = torch.stack(made)
        truth = float(drawn.var(0).sum() / drawn.mean(0).square().sum())
        assert torch.tensor(told[method]).nanmedian().item() == pytest.approx(truth, rel=0.15), method


def test_delta_l_has_the_least_variance_and_dr_grpo_counts_as_one() -> None:
    lengths = lengths_of(256)
    g = gradients(lengths, 1.0, mean=5.0)
    told = would_have_done(gram(g), lengths, torch.ones(256), all_methods(lengths), max_length=LIMIT)
    assert told["dr_grpo"]["relative_variance"] == pytest.approx(1.0)
    assert told["delta_l"]["relative_variance"] == min(row["relative_variance"] for row in told.values())  # type: ignore[type-var]
    assert told["delta_l"]["scale"] == pytest.approx(1.0)
    assert told["dr_grpo"]["scale"] == pytest.approx(1.0)
    assert told["dr_grpo"]["cosine"] == pytest.approx(1.0)
    assert told["dapo"]["cosine"] == pytest.approx(1.0)  # the same direction, another size
    assert told["dapo"]["size"] == pytest.approx(LIMIT * 256 / int(lengths.sum()), rel=1e-6)


def test_token_mass_is_told_by_the_sign_of_the_advantage() -> None:
    lengths = torch.tensor([10, 10, 40, 40])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    told = would_have_done(gram(torch.randn(4, 8)), lengths, advantages, all_methods(lengths), max_length=LIMIT)
    assert told["dr_grpo"]["positive"] == pytest.approx(0.2)
    assert told["grpo"]["positive"] == pytest.approx(0.5)
    assert told["delta_l"]["positive"] == pytest.approx(0.5)


def test_responses_outside_of_the_loss_do_not_count() -> None:
    lengths, g = lengths_of(32), torch.randn(32, 8, generator=generator())
    out = torch.cat([lengths, torch.zeros(3, dtype=torch.int64)])
    more = torch.cat([g, torch.randn(3, 8, generator=generator(9))])
    for one, other in zip(
        would_have_done(gram(g), lengths, torch.ones(32), all_methods(lengths), max_length=LIMIT).values(),
        would_have_done(gram(more), out, torch.ones(35), all_methods(out), max_length=LIMIT).values(),
        strict=True,
    ):
        assert one == pytest.approx(other)


def test_the_mean_gradient_by_length_shows_a_mean_that_depends_on_length_and_one_that_does_not() -> None:
    lengths, groups = lengths_of(512), torch.arange(512) // 8
    steady = gradients(lengths, 0.0, mean=3.0)
    turning = steady * torch.where(lengths > lengths.median(), -1.0, 1.0)[:, None]
    for rows, expected in ((steady, [1, 1, 1, 1]), (turning, [1, 1, -1, -1])):
        told = by_length(gram(rows), lengths, groups)
        overall = 1 if rows is steady else 0
        assert [row["responses"] for row in told] == pytest.approx([128] * 4, abs=4)
        for row, sign in zip(told, expected, strict=True):
            assert row["norm"] == pytest.approx(3.0, rel=0.1)
            assert row["norm_interval_95"][0] <= row["norm"] <= row["norm_interval_95"][1]
            if overall:
                assert row["cosine"] * sign > 0.95
    assert told[0]["cosine"] * told[-1]["cosine"] < 0  # whichever half prevails, the other points away


def test_noise_is_not_taken_for_a_mean() -> None:
    squares = []
    for seed in range(300):
        g = gradients(torch.full((32,), 7), 0.0, mean=0.0, seed=seed)
        squares.append(debiased_square(gram(g), torch.full((32,), 1 / 32, dtype=torch.float64)))
    told = torch.tensor(squares)
    assert abs(float(told.mean())) < 4 * float(told.std()) / math.sqrt(300)
    assert float(deviations(gram(g)).mean()) == pytest.approx(float((g - g.mean(0)).square().sum()) / 31, rel=1e-6)


def test_empirical_bias_is_nothing_when_the_mean_does_not_depend_on_length_and_shows_when_it_does() -> None:
    lengths, groups = lengths_of(512), torch.arange(512) // 8
    same = torch.ones(512, 4)
    tilted = torch.stack([torch.ones(512), (lengths > lengths.median()).float() * 2 - 1], 1)

    def told(method: str, rows: Tensor) -> dict[str, float]:
        return empirical_bias(
            gram(rows), lengths, groups, lambda some: token_coefficients(method, some, max_length=LIMIT),
            groups_per_batch=8, max_length=LIMIT, batches=400,
        )  # fmt: skip

    for method in ("delta_l", "dr_grpo"):
        assert told(method, same)["relative_error"] < 1e-9
        assert told(method, same)["size"] == pytest.approx(1.0)
    assert told("dapo", same)["size"] > 5
    assert told("dr_grpo", tilted)["relative_error"] < 1e-9
    # Long responses count less, so an update that differs by length turns towards the short ones' gradient.
    assert told("delta_l", tilted)["relative_error"] > 0.3
