"""Laws of the step: the update is a plain sum however it is cut, and a step that is not finite changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltal.algorithm import AGGREGATIONS, OBJECTIVES
from deltal.config import LearnerConfig
from deltal.config.algorithm import AlgorithmConfig
from deltal.learner.batch import Item, assemble, mini_batches, pack
from deltal.learner.step import StepResult, StepSums, accumulate, clip, forward, grad_norm, schedule, train_batch
from deltal.types import Batch, ScoredGroup
from tests.unit.builders import run_config, same_state, scored, tiny_model

pytestmark = pytest.mark.usefixtures("process_group")

LENGTHS = [(3, 17, 40), (8, 1, 25), (60, 2, 9), (5, 5, 31)]
AGGREGATION_KINDS = sorted(AGGREGATIONS)
TERMS: list[dict[str, Any]] = [
    {"kl": {"kind": "k1", "coefficient": 0.3}},
    {"kl": {"kind": "k3", "coefficient": 0.3}},
    {"entropy_coefficient": 0.2},
]
"""What gives a response a gradient even when its advantage is 0."""
PLAIN = AlgorithmConfig()
RATE = 1e3
"""Of gradient descent in these tests: gradients are small, and a small step would be lost in the weights' rounding."""


@pytest.fixture(scope="module")
def start(model_cache: None) -> torch.nn.Module:
    return tiny_model()  # type: ignore[no-any-return]


@pytest.fixture
def model(start: torch.nn.Module) -> torch.nn.Module:
    """A model of the test's own with the weights all tests start from."""
    return copy.deepcopy(start)


def groups(version: int = 0) -> list[ScoredGroup]:
    """Four groups of three responses with unlike rewards and lengths."""
    rewards = [0.0, 1.0, 0.5] * 2
    return [
        scored(i, rewards=rewards[i % 3 :][:3], lengths=lengths, version=version, prompt_length=4 + 3 * i)
        for i, lengths in enumerate(LENGTHS)
    ]


def on_policy(model: torch.nn.Module, some: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The same groups as the model itself would have sampled them: its own log-probabilities."""
    told = []
    for group in some:
        responses = []
        for response in group.group.responses:
            item = Item(place=0, group=group.group, response=response, advantage=1.0, coefficient=1.0)
            (micro,) = pack([item], budget=1, ranks=1)[0]
            with torch.no_grad():
                logprob, _ = forward(model, micro, 1.0)
            responses.append(dataclasses.replace(response, logprobs=logprob.numpy()))
        told.append(dataclasses.replace(group, group=dataclasses.replace(group.group, responses=tuple(responses))))
    return told


def noisy(some: Sequence[ScoredGroup], size: float) -> list[ScoredGroup]:
    """The same with an engine whose log-probabilities are off by so much."""
    draw, told = np.random.default_rng(0), []
    for group in some:
        responses = tuple(
            dataclasses.replace(one, logprobs=one.logprobs + size * draw.normal(size=len(one.logprobs)))
            for one in group.group.responses
        )
        told.append(dataclasses.replace(group, group=dataclasses.replace(group.group, responses=responses)))
    return told


def batch_of(some: Sequence[ScoredGroup], kind: str = "delta_l") -> Batch:
    config = run_config(algorithm={"aggregation": {"kind": kind}}, rollout={"max_response_tokens": 64})
    return assemble(0, some, config)


def flat(model: torch.nn.Module, of: Callable[[torch.nn.Parameter], Any] = lambda p: p.grad) -> Tensor:
    return torch.cat([of(p).detach().flatten().double() for p in model.parameters()])


def weights(model: torch.nn.Module) -> Tensor:
    return flat(model, lambda p: p)


def gradient(
    model: torch.nn.Module, items: Sequence[Item], *, budget: int, ranks: int = 1, algorithm: AlgorithmConfig = PLAIN,
    reference: torch.nn.Module | None = None, sums: StepSums | None = None,
) -> Tensor:  # fmt: skip
    """Summed over all rows of all ranks, float64 and flat."""
    model.zero_grad()
    sums = StepSums() if sums is None else sums
    for share in pack(items, budget=budget, ranks=ranks, keep_all=algorithm.trains_every_response):
        starts = [None] * len(share)
        accumulate(model, share, starts, algorithm, temperature=1.0, version=0, sums=sums, reference=reference)
    return flat(model)


def changed(model: torch.nn.Module) -> torch.nn.Module:
    """A frozen model with other weights."""
    other = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    return other


def alone(model: Any, item: Item) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at each token of one response, by one plain forward."""
    prompt = item.group.prompt_tokens
    row = torch.as_tensor(np.concatenate([prompt, item.response.tokens])).long()
    logs = torch.log_softmax(model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1], dim=-1)
    return logs.gather(-1, row[len(prompt) :, None])[:, 0], -(logs.exp() * logs).sum(-1)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def trained(
    model: torch.nn.Module, cut: Sequence[Sequence[Item]], *, rate: float = RATE,
    optimizer: torch.optim.Optimizer | None = None, **settings: Any,
) -> StepResult:  # fmt: skip
    """One batch, by plain gradient descent unless told otherwise: the weights then move by the clipped gradient."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=rate)
    return train_batch(model, optimizer, cut, PLAIN, LearnerConfig(**settings), temperature=1.0, version=0)


def poisoned(items: Sequence[Item]) -> list[Item]:
    return [dataclasses.replace(items[0], advantage=math.inf), *items[1:]]


# --- the gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AGGREGATION_KINDS)
def test_update_does_not_depend_on_micro_batches(model: torch.nn.Module, kind: str) -> None:
    (items,) = mini_batches(batch_of(groups(), kind), count=1, seed=0)
    whole = gradient(model, items, budget=4096)
    assert float(whole.norm()) > 0.0
    for budget in (1, 64, 256):
        assert difference(gradient(model, items, budget=budget), whole) <= 1e-5


@pytest.mark.parametrize("kind", AGGREGATION_KINDS)
def test_update_does_not_depend_on_the_number_of_ranks(model: torch.nn.Module, kind: str) -> None:
    (items,) = mini_batches(batch_of(groups(), kind), count=1, seed=0)
    whole = gradient(model, items, budget=4096)
    for ranks, budget in ((2, 4096), (3, 64), (7, 80)):
        assert difference(gradient(model, items, budget=budget, ranks=ranks), whole) <= 1e-5


def test_update_does_not_depend_on_the_order_of_the_groups(model: torch.nn.Module) -> None:
    gradients = []
    for some in (groups(), groups()[::-1]):
        (items,) = mini_batches(batch_of(some), count=1, seed=0)
        gradients.append(gradient(model, items, budget=64))
    assert difference(*gradients) <= 1e-5


@pytest.mark.parametrize("kind", AGGREGATION_KINDS)
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_the_gradient_is_that_of_the_plain_sum_over_tokens(model: torch.nn.Module, kind: str, objective: str) -> None:
    """One plain forward a response, and Σ c_i A_i w_t log π_t by hand: with one mini-batch all objectives agree."""
    batch = batch_of(groups(), kind)
    (items,) = mini_batches(batch, count=1, seed=0)
    importance = {"kind": "truncate", "cap": 2.0}
    algorithm = AlgorithmConfig.model_validate({"objective": {"kind": objective}, "importance": importance})
    packed = gradient(model, items, budget=128, algorithm=algorithm)
    model.zero_grad()
    for item, advantage, coefficient in zip(items, batch.advantages, batch.coefficients, strict=True):
        logprob, _ = alone(model, item)
        weight = torch.exp(logprob.detach() - torch.tensor(item.response.logprobs)).clamp(max=2.0)
        (-float(coefficient) * float(advantage) * weight * logprob).sum().backward()
    assert difference(packed, flat(model)) <= 1e-5


def with_a_group_of_equal_rewards() -> list[ScoredGroup]:
    return [*groups(), scored(7, rewards=(1.0, 1.0), lengths=(6, 3))]


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_kl_and_entropy_are_part_of_the_plain_sum_over_all_responses(
    model: torch.nn.Module, terms: dict[str, Any]
) -> None:
    (items,) = mini_batches(batch_of(on_policy(model, with_a_group_of_equal_rewards())), count=1, seed=0)
    algorithm = AlgorithmConfig.model_validate(terms)
    reference = changed(model) if algorithm.has_reference else None
    packed = gradient(model, items, budget=128, algorithm=algorithm, reference=reference)
    model.zero_grad()
    for item in items:
        logprob, entropy = alone(model, item)
        loss = -item.advantage * logprob - algorithm.entropy_coefficient * entropy
        if reference is not None:
            gap = alone(reference, item)[0] - logprob
            loss = loss + 0.3 * (-gap.detach() * logprob if "k1" in str(terms) else gap.exp() - gap - 1)
        (item.coefficient * loss).sum().backward()
    assert difference(packed, flat(model)) <= 1e-4


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_update_does_not_depend_on_sharding_with_kl_and_entropy(model: torch.nn.Module, terms: dict[str, Any]) -> None:
    (items,) = mini_batches(batch_of(with_a_group_of_equal_rewards()), count=1, seed=0)
    algorithm, reference = AlgorithmConfig.model_validate(terms), changed(model)
    whole = gradient(model, items, budget=4096, algorithm=algorithm, reference=reference)
    for ranks, budget in ((1, 1), (3, 64)):
        cut = gradient(model, items, budget=budget, ranks=ranks, algorithm=algorithm, reference=reference)
        assert difference(cut, whole) <= 1e-5


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_update_does_not_depend_on_sharding_with_weights_of_whole_responses(model: torch.nn.Module, kind: str) -> None:
    some = noisy(on_policy(model, groups()), 0.02)
    (items,) = mini_batches(batch_of(some), count=1, seed=0)
    importance = {"kind": kind, "level": "sequence"} | ({"low": 0.95, "high": 1.1} if kind == "mask" else {"cap": 1.02})
    algorithm = AlgorithmConfig.model_validate({"importance": importance})
    sums = StepSums()
    whole = gradient(model, items, budget=4096, algorithm=algorithm, sums=sums)
    assert 0 < sums.bounded < sums.tokens
    for ranks, budget in ((1, 1), (3, 64)):
        assert difference(gradient(model, items, budget=budget, ranks=ranks, algorithm=algorithm), whole) <= 1e-5


def test_responses_without_advantage_move_the_weights_only_where_a_term_needs_them(model: torch.nn.Module) -> None:
    (items,) = mini_batches(batch_of([scored(0, rewards=(1.0, 1.0), lengths=(4, 6))]), count=1, seed=0)
    for terms, moves in (({}, False), *((terms, True) for terms in TERMS)):
        sums, algorithm = StepSums(), AlgorithmConfig.model_validate(terms)
        found = gradient(model, items, budget=64, algorithm=algorithm, reference=changed(model), sums=sums)
        assert (float(found.norm()) > 0) == moves
        assert sums.tokens == (10 if moves else 0)


def test_the_reference_is_compared_and_never_trained(model: torch.nn.Module) -> None:
    (items,) = mini_batches(batch_of(groups()), count=1, seed=0)
    algorithm, reference = AlgorithmConfig.model_validate(TERMS[1]), changed(model)
    before, sums = weights(reference), StepSums()
    gradient(model, items, budget=64, algorithm=algorithm, reference=reference, sums=sums)
    expected = 0.0
    for item in items:
        gap = (alone(reference, item)[0] - alone(model, item)[0]).detach().double()
        expected += float((gap.exp() - gap - 1).sum())
    assert sums.reference_kl == pytest.approx(expected, rel=1e-3)
    assert torch.equal(weights(reference), before)
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_row_with_nothing_to_train_adds_no_gradient(model: torch.nn.Module) -> None:
    assert float(gradient(model, [], budget=64, ranks=2).abs().max()) == 0.0


def test_equal_rewards_leave_the_weights_alone(model: torch.nn.Module) -> None:
    before = weights(model)
    cut = mini_batches(batch_of([scored(0, rewards=(1.0, 1.0))]), count=1, seed=0)
    result = trained(model, cut)
    assert torch.equal(weights(model), before)
    assert (result.skipped, result.clipped, result.grad_norms, result.sums.tokens) == (False, False, [0.0], 0.0)


def test_one_batch_in_one_mini_batch_is_one_step_along_its_gradient(model: torch.nn.Module) -> None:
    cut = mini_batches(batch_of(groups()), count=1, seed=0)
    expected = gradient(model, cut[0], budget=4096)
    before = weights(model)
    result = trained(model, cut, max_grad_norm=1e9, micro_batch_tokens=64)
    assert difference((before - weights(model)) / RATE, expected) <= 1e-4
    assert result.grad_norms == [pytest.approx(float(expected.norm()), rel=1e-5)]
    assert result.sums.tokens == sum(item.response.length for item in cut[0] if item.advantage != 0.0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_reported_is_the_weighted_sum_over_tokens(model: torch.nn.Module) -> None:
    """On policy the ratio and the weight are one, so the loss is -Σ c_i A_i L_i."""
    batch = batch_of(on_policy(model, groups()), "dr_grpo")
    result = trained(model, mini_batches(batch, count=1, seed=0))
    lengths = np.array([response.length for group in batch.groups for response in group.group.responses])
    assert result.sums.loss == pytest.approx(-float((batch.coefficients * batch.advantages * lengths).sum()), rel=1e-3)
    assert result.sums.importance == pytest.approx(result.sums.tokens, rel=1e-4)


# --- clipping, skipping, schedule --------------------------------------------------------------------


def test_a_gradient_above_the_limit_is_scaled_down_to_it_and_reported(model: torch.nn.Module) -> None:
    cut = mini_batches(batch_of(groups()), count=1, seed=0)
    full = gradient(model, cut[0], budget=512)
    norm = float(full.norm())
    for limit, clipped in ((norm / 10, True), (norm * 2, False)):
        own = copy.deepcopy(model)
        result = trained(own, cut, max_grad_norm=limit)
        moved = (weights(model) - weights(own)) / RATE
        assert result.clipped == clipped
        assert result.grad_norms == [pytest.approx(norm, rel=1e-5)]
        assert float(moved.norm()) == pytest.approx(min(norm, limit), rel=1e-3)
        assert difference(moved, full * min(1.0, limit / norm)) <= 1e-3


def test_clip_knows_its_limit_and_leaves_smaller_gradients_alone() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 1, 1)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = grad_norm(iter(parameters))
    assert norm == 5.0
    assert not clip(iter(parameters), norm, 5.0)
    assert clip(iter(parameters), norm, 1.0)
    assert grad_norm(iter(parameters)) == pytest.approx(1.0)
    assert parameters[0].grad[0] / parameters[1].grad[0] == pytest.approx(0.75)


@pytest.mark.parametrize("advantage", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_leaves_weights_and_optimizer_alone(
    model: torch.nn.Module, advantage: float
) -> None:
    (items,) = mini_batches(batch_of(groups()), count=1, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    trained(model, [items], optimizer=optimizer)
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict())
    result = trained(model, [[dataclasses.replace(items[0], advantage=advantage), *items[1:]]], optimizer=optimizer)
    assert result.skipped
    assert not math.isfinite(result.grad_norms[-1])
    assert torch.equal(weights(model), before)
    assert same_state(optimizer.state_dict(), moments)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_skipped_batch_undoes_the_steps_of_its_earlier_mini_batches(
    model: torch.nn.Module, which: int, steps_before: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    cut = mini_batches(batch_of(groups()), count=3, seed=0)
    for _ in range(steps_before):
        trained(model, cut, optimizer=optimizer)
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict())
    result = trained(model, [poisoned(part) if i == which else part for i, part in enumerate(cut)], optimizer=optimizer)
    assert result.skipped
    assert len(result.grad_norms) == which + 1
    assert torch.equal(weights(model), before)
    assert same_state(optimizer.state_dict(), moments)
    # And what comes next is what would have come without it.
    straight = copy.deepcopy(model)
    other = torch.optim.AdamW(straight.parameters(), lr=0.1, weight_decay=0.1)
    other.load_state_dict(moments)
    trained(model, cut, optimizer=optimizer)
    trained(straight, cut, optimizer=other)
    assert torch.equal(weights(model), weights(straight))


@pytest.mark.parametrize(
    ("kind", "warmup", "values"),
    [
        ("constant", 0, {0: 1.0, 5: 1.0, 99: 1.0}),
        ("constant", 4, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 9: 1.0}),
        ("linear", 0, {0: 1.0, 5: 0.5, 9: 0.1, 10: 0.0, 99: 0.0}),
        ("linear", 2, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine", 0, {0: 1.0, 5: 0.5, 10: 0.0, 99: 0.0}),
        ("cosine", 2, {1: 2 / 3, 2: 1.0, 4: 0.5 + math.sqrt(0.5) / 2, 6: 0.5, 10: 0.0}),
        ("cosine", 20, {0: 1 / 21, 9: 10 / 21}),
    ],
)
def test_the_learning_rate_follows_its_schedule(kind: str, warmup: int, values: dict[int, float]) -> None:
    factor = schedule(LearnerConfig.model_validate({"schedule": {"kind": kind, "warmup_steps": warmup}}), 10)
    assert {step: factor(step) for step in values} == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_no_step_of_a_run_has_a_learning_rate_of_zero(kind: str) -> None:
    for warmup in (0, 1, 5, 10):
        factor = schedule(LearnerConfig.model_validate({"schedule": {"kind": kind, "warmup_steps": warmup}}), 10)
        assert all(0.0 < factor(step) <= 1.0 for step in range(10))


# --- log-probabilities -------------------------------------------------------------------------------


def test_proximal_log_probabilities_are_those_of_the_weights_at_the_batch_s_start(model: torch.nn.Module) -> None:
    """The groups are on policy, so they equal the engine's, in every mini-batch, however far the weights moved."""
    some = on_policy(model, groups())
    cut = mini_batches(batch_of(some), count=4, seed=0)
    result = trained(model, cut, rate=30.0)
    assert not result.skipped
    assert len(result.grad_norms) == 4
    assert result.sums.same_version == result.sums.tokens > 0
    assert result.sums.difference_max <= 1e-4
    assert result.sums.importance == pytest.approx(result.sums.tokens, rel=1e-3)
    moved = max(
        float(np.abs(new.logprobs - old.logprobs).max())
        for one, other in zip(on_policy(model, some), some, strict=True)
        for new, old in zip(one.group.responses, other.group.responses, strict=True)
    )
    assert moved > 0.1
    # Ratios are new / proximal, so the later mini-batches do meet the bounds.
    assert result.sums.clipped > 0


def test_the_first_mini_batch_is_never_clipped_by_its_ratio(model: torch.nn.Module) -> None:
    assert trained(model, mini_batches(batch_of(groups()), count=1, seed=0)).sums.clipped == 0


def test_the_mismatch_of_engine_and_learner_is_told_as_a_kl_and_as_the_share_of_bounded_tokens(
    model: torch.nn.Module,
) -> None:
    exact, off = on_policy(model, groups()), noisy(on_policy(model, groups()), 0.3)
    for some, algorithm, mismatched in (
        (exact, AlgorithmConfig(), False),
        (off, AlgorithmConfig.model_validate({"importance": {"kind": "mask", "low": 0.9, "high": 1.1}}), True),
        (off, AlgorithmConfig.model_validate({"importance": {"kind": "none"}}), True),
    ):
        (items,) = mini_batches(batch_of(some), count=1, seed=0)
        sums = StepSums()
        gradient(model, items, budget=64, algorithm=algorithm, sums=sums)
        # To second order the estimate is half the squared difference.
        expected = 0.5 * 0.3**2 if mismatched else 0.0
        assert sums.engine_kl / sums.same_version == pytest.approx(expected, rel=0.3, abs=1e-6)
        assert (sums.bounded > 0) == (algorithm.importance.kind == "mask")
        if algorithm.importance.kind == "none":
            assert sums.importance == sums.tokens


def test_engine_and_learner_are_compared_only_where_their_versions_are_equal(model: torch.nn.Module) -> None:
    for version, compared in ((0, True), (1, False)):
        some = on_policy(model, groups(version))
        result = trained(copy.deepcopy(model), mini_batches(batch_of(some), count=1, seed=0))
        assert (result.sums.same_version == result.sums.tokens) == compared
        assert (result.sums.same_version == 0.0) == (not compared)
