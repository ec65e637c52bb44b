"""Laws of the step and of checkpoints: the update is a plain sum however it is cut, and what is saved goes on equal."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import resource
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltal.algorithm import AGGREGATIONS
from deltal.config import AlgorithmConfig, LearnerConfig
from deltal.errors import LearnerError
from deltal.learner.batch import Item, assemble, mini_batches, pack
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.step import StepResult, StepSums, accumulate, clip, forward, grad_norm, schedule, train_batch
from deltal.types import Batch, ScoredGroup
from tests.unit.builders import run_config, same, scored, tiny_model

pytestmark = pytest.mark.usefixtures("process_group")

LENGTHS = [(3, 17, 40), (8, 1, 25), (60, 2, 9), (5, 5, 31)]
AGGREGATION_KINDS = sorted(AGGREGATIONS)
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


def batch_of(some: Sequence[ScoredGroup], kind: str = "delta_l") -> Batch:
    config = run_config(algorithm={"aggregation": {"kind": kind}}, rollout={"max_response_tokens": 64})
    return assemble(0, some, config)


def flat(model: torch.nn.Module, of: Callable[[torch.nn.Parameter], Any] = lambda p: p.grad) -> Tensor:
    return torch.cat([of(p).detach().flatten().double() for p in model.parameters()])


def weights(model: torch.nn.Module) -> Tensor:
    return flat(model, lambda p: p)


def gradient(
    model: torch.nn.Module, items: Sequence[Item], *, budget: int, ranks: int = 1, algorithm: AlgorithmConfig = PLAIN
) -> Tensor:
    """Summed over all rows of all ranks, float64 and flat."""
    model.zero_grad()
    for share in pack(items, budget=budget, ranks=ranks):
        starts = [None] * len(share)
        accumulate(model, share, starts, algorithm, temperature=1.0, version=0, sums=StepSums())
    return flat(model)


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
@pytest.mark.parametrize("objective", ["ppo_clip", "reinforce"])
def test_the_gradient_is_that_of_the_plain_sum_over_tokens(model: torch.nn.Module, kind: str, objective: str) -> None:
    """One plain forward a response, and Σ c_i A_i w_t log π_t by hand."""
    batch = batch_of(groups(), kind)
    (items,) = mini_batches(batch, count=1, seed=0)
    algorithm = AlgorithmConfig.model_validate({"objective": {"kind": objective}, "importance_cap": 2.0})
    packed = gradient(model, items, budget=128, algorithm=algorithm)
    model.zero_grad()
    for item, advantage, coefficient in zip(items, batch.advantages, batch.coefficients, strict=True):
        prompt = item.group.prompt_tokens
        row = torch.as_tensor(np.concatenate([prompt, item.response.tokens])).long()
        logits = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1]
        logprob = torch.log_softmax(logits, dim=-1).gather(-1, row[len(prompt) :, None])[:, 0]
        weight = torch.exp(logprob.detach() - torch.tensor(item.response.logprobs)).clamp(max=2.0)
        (-float(coefficient) * float(advantage) * weight * logprob).sum().backward()
    assert difference(packed, flat(model)) <= 1e-5


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


def test_a_gradient_that_is_not_finite_skips_what_is_left_of_its_batch(model: torch.nn.Module) -> None:
    cut = mini_batches(batch_of(groups()), count=3, seed=0)
    alone, broken = copy.deepcopy(model), copy.deepcopy(model)
    trained(alone, cut[:1])
    result = trained(broken, [cut[0], poisoned(cut[1]), cut[2]])
    assert result.skipped
    assert len(result.grad_norms) == 2
    assert not torch.equal(weights(broken), weights(model))
    assert difference(weights(broken) - weights(model), weights(alone) - weights(model)) <= 1e-4


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


def test_engine_and_learner_are_compared_only_where_their_versions_are_equal(model: torch.nn.Module) -> None:
    for version, compared in ((0, True), (1, False)):
        some = on_policy(model, groups(version))
        result = trained(copy.deepcopy(model), mini_batches(batch_of(some), count=1, seed=0))
        assert (result.sums.same_version == result.sums.tokens) == compared
        assert (result.sums.same_version == 0.0) == (not compared)


# --- checkpoints -------------------------------------------------------------------------------------


def same_state(one: Any, other: Any) -> bool:
    """Bit for bit, tensors included."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_state(a, b) for a, b in zip(one, other, strict=True))
    return same(one, other)


class Learner:
    """A model with its optimizer, a new one each time as after a restart."""

    def __init__(self, start: torch.nn.Module) -> None:
        self.model = copy.deepcopy(start)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))

    def step(self, times: int = 1) -> Learner:
        cut = mini_batches(batch_of(groups()), count=2, seed=0)
        for _ in range(times):
            trained(self.model, cut, optimizer=self.optimizer)
        return self

    def state(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def save(self, store: Checkpoints, version: int, **extra: Any) -> None:
        store.save(version, self.model, self.optimizer, extra)

    def load(self, store: Checkpoints) -> tuple[int, dict[str, Any]]:
        return store.load(self.model, self.optimizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def checkpointed(folder: Path, start: torch.nn.Module, versions: int) -> list[Any]:
    """Checkpoints 1 to `versions`; returns the state each holds."""
    learner, states = Learner(start), []
    for version in range(1, versions + 1):
        learner.step().save(Checkpoints(str(folder), keep=9), version)
        states.append(learner.state())
    return states


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_checkpoint_restores_every_bit_and_training_goes_on_equal(
    start: torch.nn.Module, folder: Path, where: str
) -> None:
    url = str(folder) if where == "local" else f"memory://{uuid.uuid4().hex}/checkpoints"
    straight = Learner(start).step(2)
    straight.save(Checkpoints(url, keep=2), 2, note="kept")
    resumed = Learner(start)
    version, extra = resumed.load(Checkpoints(url, keep=2))
    assert (version, extra["note"], extra["version"], extra["ranks"]) == (2, "kept", 2, 1)
    assert same_state(resumed.state(), straight.state())
    assert same_state(resumed.step(2).state(), straight.step(2).state())


def test_without_a_checkpoint_nothing_is_touched(start: torch.nn.Module, folder: Path) -> None:
    learner = Learner(start)
    assert learner.load(Checkpoints(str(folder), keep=2)) == (0, {})
    assert same_state(learner.state(), Learner(start).state())


def test_a_half_written_checkpoint_is_never_picked(start: torch.nn.Module, folder: Path) -> None:
    states = checkpointed(folder, start, 2)
    (folder / "00000002" / "complete.json").unlink()
    (folder / "00000003").mkdir()
    (folder / "notes").mkdir()
    store, learner = Checkpoints(str(folder), keep=2), Learner(start)
    assert store.versions() == [1]
    assert learner.load(store)[0] == 1
    assert same_state(learner.state(), states[0])


def test_a_checkpoint_cut_off_before_is_written_anew(start: torch.nn.Module, folder: Path) -> None:
    (folder / "00000001").mkdir(parents=True)
    (folder / "00000001" / "__7_0.distcp").write_bytes(b"of another number of ranks")
    states = checkpointed(folder, start, 1)
    learner = Learner(start)
    assert learner.load(Checkpoints(str(folder), keep=2))[0] == 1
    assert same_state(learner.state(), states[0])
    assert not (folder / "00000001" / "__7_0.distcp").exists()


def damage(folder: Path, how: str) -> None:
    (shard,) = folder.glob("*.distcp")
    match how:
        case "shard cut":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        case "shard empty":
            shard.write_bytes(b"")
        case "shard gone":
            shard.unlink()
        case "metadata cut":
            (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])
        case "metadata gone":
            (folder / ".metadata").unlink()
        case "mark empty":
            (folder / "complete.json").write_bytes(b"")


DAMAGES = ["shard cut", "shard empty", "shard gone", "metadata cut", "metadata gone", "mark empty"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    start: torch.nn.Module, folder: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    states = checkpointed(folder, start, 2)
    damage(folder / "00000002", how)
    learner = Learner(start)
    assert learner.load(Checkpoints(str(folder), keep=2))[0] == 1
    assert same_state(learner.state(), states[0])
    said = [line for line in capfd.readouterr().out.splitlines() if "passed over" in line]
    assert len(said) == 1
    assert said[0].startswith(f"deltal: checkpoint {folder}/00000002 is damaged and passed over: ")


def test_no_run_goes_on_from_weights_that_are_of_no_checkpoint(start: torch.nn.Module, folder: Path) -> None:
    checkpointed(folder, start, 1)
    damage(folder / "00000001", "shard cut")
    with pytest.raises(LearnerError, match=r"no checkpoint in .* can be read; move it away"):
        Learner(start).load(Checkpoints(str(folder), keep=2))


def test_damaged_weights_are_not_exported(start: torch.nn.Module, folder: Path) -> None:
    checkpointed(folder, start, 1)
    damage(folder / "00000001", "shard gone")
    with pytest.raises(LearnerError, match="00000001 is damaged"):
        Checkpoints(str(folder), keep=1).load_weights(1, copy.deepcopy(start))


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_checkpoints_stay(start: torch.nn.Module, folder: Path, keep: int) -> None:
    learner, store = Learner(start), Checkpoints(str(folder), keep=keep)
    for version in (1, 3, 10):
        learner.save(store, version)
    assert store.versions() == [1, 3, 10][-keep:]
    assert sorted(path.name for path in folder.iterdir()) == [f"{v:08d}" for v in (1, 3, 10)[-keep:]]


def test_a_damaged_newer_checkpoint_never_pushes_out_one_that_can_be_read(start: torch.nn.Module, folder: Path) -> None:
    checkpointed(folder, start, 4)
    for version in (2, 4):
        shutil.rmtree(folder / f"{version:08d}")
    damage(folder / "00000003", "shard cut")
    learner, store = Learner(start), Checkpoints(str(folder), keep=1)
    assert learner.load(store)[0] == 1
    learner.save(store, 2)
    again = Learner(start)
    assert again.load(store)[0] == 2
    assert same_state(again.state(), learner.state())


def test_a_checkpoint_that_cannot_be_written_is_an_error_in_one_line_and_loses_nothing(
    start: torch.nn.Module, folder: Path
) -> None:
    states = checkpointed(folder, start, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As if the disk were full: no file may grow beyond 100 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(LearnerError, match=f"checkpoint {folder}/00000002 could not be written: ") as error:
            Learner(start).step().save(Checkpoints(str(folder), keep=1), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    again = Learner(start)
    assert again.load(Checkpoints(str(folder), keep=1))[0] == 1
    assert same_state(again.state(), states[0])


def test_a_checkpoint_s_mark_is_written_last(start: torch.nn.Module, folder: Path) -> None:
    checkpointed(folder, start, 1)
    files = sorted((folder / "00000001").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert files[-1].name == "complete.json"
    assert json.loads(files[-1].read_text())["version"] == 1
