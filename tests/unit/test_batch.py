"""Laws of the batch: packing changes no log-probability, trains every token once, and coefficients know no cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltal.algorithm import AGGREGATIONS, advantages, token_coefficients
from deltal.learner.batch import Item, PackedMicroBatch, assemble, coefficients, mini_batches, pack
from deltal.learner.step import forward
from deltal.types import Batch, Response, ScoredGroup, Span
from tests.unit.builders import numbered, run_config, scored, tiny_model

MASK = (True, True, False, False, True, True)
"""Two tokens of the policy, two of a tool, two of the policy."""


def items_of(groups: Sequence[ScoredGroup], numbers: Sequence[tuple[float, float]] | None = None) -> list[Item]:
    """The responses of a batch with (advantage, coefficient), ones unless given."""
    flat = [(scored.group, response) for scored in groups for response in scored.group.responses]
    numbers = numbers or [(1.0, 1.0)] * len(flat)
    return [
        Item(place=place, group=group, response=response, advantage=advantage, coefficient=coefficient)
        for place, ((group, response), (advantage, coefficient)) in enumerate(zip(flat, numbers, strict=True))
    ]


def mixed_groups() -> list[ScoredGroup]:
    """Three groups with prompts and responses of several lengths, one with tool tokens in it."""
    return numbered([
        scored(0, rewards=(0.0, 1.0, 1.0), lengths=(3, 9, 1), prompt_length=5),
        scored(1, rewards=(0.0, 1.0), lengths=(6, 2), prompt_length=11, masks=(MASK, None)),
        scored(2, rewards=(1.0,), lengths=(7,), prompt_length=1),
    ])  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, model_cache: None) -> torch.nn.Module:
    return tiny_model(request.param, tied=request.param != "llama")  # type: ignore[no-any-return]


def alone(model: Any, prompt: np.ndarray, response: Response, temperature: float) -> Tensor:
    """Log-probability of each token of one response, by one plain forward of prompt and response."""
    row = torch.as_tensor(np.concatenate([prompt, response.tokens])).long()
    logits = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, dim=-1).gather(-1, row[len(prompt) :, None])[:, 0]


def one_by_one(model: Any, groups: Sequence[ScoredGroup], temperature: float) -> dict[float, float]:
    """Number of each policy-written token to its log-probability."""
    found = {}
    for group in groups:
        for response in group.group.responses:
            logprobs = alone(model, group.group.prompt_tokens, response, temperature)
            found |= {
                float(number): float(logprob)
                for number, logprob, own in zip(response.logprobs, logprobs, response.mask, strict=True)
                if own
            }
    return found


def packed(model: Any, micros: Sequence[PackedMicroBatch], temperature: float) -> dict[float, float]:
    """The same from packed rows."""
    found: dict[float, float] = {}
    for micro in micros:
        logprobs, _ = forward(model, micro, temperature)
        found |= dict(zip(micro.old_logprob.tolist(), logprobs.tolist(), strict=True))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("budget", [1, 30, 4096])
@torch.no_grad()
def test_packed_log_probabilities_equal_one_forward_a_response(
    model: torch.nn.Module, budget: int, temperature: float
) -> None:
    groups = mixed_groups()
    expected = one_by_one(model, groups, temperature)
    got = packed(model, pack(items_of(groups), budget=budget, ranks=1)[0], temperature)
    assert got.keys() == expected.keys()
    for number, logprob in expected.items():
        assert got[number] == pytest.approx(logprob, abs=1e-5)


@torch.no_grad()
def test_the_comparison_would_notice_a_response_that_sees_another(model: torch.nn.Module) -> None:
    groups = mixed_groups()
    expected = one_by_one(model, groups, 1.0)
    (micro,) = pack(items_of(groups), budget=4096, ranks=1)[0]
    for wrong in (
        dataclasses.replace(micro, branch=torch.zeros_like(micro.branch)),
        dataclasses.replace(micro, branch=micro.branch.clamp(max=1)),
        dataclasses.replace(micro, positions=torch.arange(len(micro.positions))),
    ):
        got = packed(model, [wrong], 1.0)
        assert max(abs(got[number] - logprob) for number, logprob in expected.items()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_attention_block_by_block_is_attention_under_the_mask(model: Any, budget: int) -> None:
    """The second is how transformers' own sdpa computes it, here and on a GPU."""
    for micro in pack(items_of(mixed_groups()), budget=budget, ranks=1)[0]:
        by_mask = model.model(
            input_ids=micro.tokens[None], position_ids=micro.positions[None], attention_mask=micro.attention_mask()
        ).last_hidden_state[0, micro.predict_at]
        expected = torch.log_softmax(model.lm_head(by_mask), -1).gather(-1, micro.target[:, None])[:, 0]
        torch.testing.assert_close(forward(model, micro, 1.0)[0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_entropy_is_that_of_the_distribution_that_was_sampled_from(model: torch.nn.Module) -> None:
    group = mixed_groups()[2]
    (micro,) = pack(items_of([group]), budget=64, ranks=1)[0]
    prompt, response = group.group.prompt_tokens, group.group.responses[0]
    row = torch.as_tensor(np.concatenate([prompt, response.tokens])).long()
    logits = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1] / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(forward(model, micro, 0.7)[1], expected, rtol=1e-5, atol=1e-5)


# --- packing ---------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[ScoredGroup], list[tuple[float, float]]]:
    """Groups of any lengths and masks, and an advantage and a coefficient for each response, zeros among them."""
    groups = []
    for index in range(draw(st.integers(1, 5))):
        lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
        bits = [draw(st.none() | st.integers(1, 2**length - 1)) for length in lengths]
        masks = [
            None if chosen is None else [bool(chosen >> place & 1) for place in range(length)]
            for chosen, length in zip(bits, lengths, strict=True)
        ]
        rewards = [0.0] * len(lengths)
        prompt_length = draw(st.integers(1, 9))
        groups.append(scored(index, rewards=rewards, lengths=lengths, masks=masks, prompt_length=prompt_length))
    numbers = st.tuples(st.sampled_from([0.0, 1.0, -0.5]), st.sampled_from([0.0, 0.25, 0.125]))
    responses = sum(len(group.verdicts) for group in groups)
    return numbered(groups), draw(st.lists(numbers, min_size=responses, max_size=responses))


Told = dict[float, tuple[int, float, float, int, int]]


def told(micros: Sequence[PackedMicroBatch]) -> Told:
    """Number of every trained token to its target, advantage, coefficient, version and response; no token twice."""
    found: Told = {}
    for micro in micros:
        columns = (micro.old_logprob, micro.target, micro.advantage, micro.coefficient, micro.version, micro.place)
        for number, *rest in zip(*(column.tolist() for column in columns), strict=True):
            assert number not in found, "trained twice"
            found[number] = tuple(rest)  # type: ignore[assignment]
    return found


def expected_of(items: Sequence[Item], *, keep_all: bool = False) -> Told:
    return {
        float(number): (int(token), item.advantage, item.coefficient, item.response.spans[0].version, item.place)
        for item in items
        if item.coefficient != 0.0 and (keep_all or item.advantage != 0.0)
        for number, token, own in zip(item.response.logprobs, item.response.tokens, item.response.mask, strict=True)
        if own
    }


@settings(max_examples=40)
@given(batches(), st.integers(1, 70), st.integers(1, 5))
def test_every_trained_token_is_in_one_row_of_one_rank_whatever_budget_and_ranks(
    batch: tuple[list[ScoredGroup], list[tuple[float, float]]], budget: int, ranks: int
) -> None:
    items = items_of(*batch)
    shares = pack(items, budget=budget, ranks=ranks)
    assert told([micro for share in shares for micro in share]) == expected_of(items)


@settings(max_examples=40)
@given(batches(), st.integers(1, 70), st.integers(1, 5))
def test_with_kl_or_entropy_responses_without_advantage_are_trained_too(
    batch: tuple[list[ScoredGroup], list[tuple[float, float]]], budget: int, ranks: int
) -> None:
    items = items_of(*batch)
    shares = pack(items, budget=budget, ranks=ranks, keep_all=True)
    assert told([micro for share in shares for micro in share]) == expected_of(items, keep_all=True)


@settings(max_examples=40)
@given(batches(), st.integers(1, 70), st.integers(1, 5))
def test_all_ranks_run_equally_many_rows_and_at_least_one(
    batch: tuple[list[ScoredGroup], list[tuple[float, float]]], budget: int, ranks: int
) -> None:
    shares = pack(items_of(*batch), budget=budget, ranks=ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) >= 1
    for micro in (micro for share in shares for micro in share):
        assert len(micro.target) > 0 or len(micro.tokens) == 1


@settings(max_examples=40)
@given(batches(), st.integers(1, 70), st.integers(1, 5))
def test_a_row_keeps_the_budget_or_holds_one_response_alone(
    batch: tuple[list[ScoredGroup], list[tuple[float, float]]], budget: int, ranks: int
) -> None:
    for micro in (micro for share in pack(items_of(*batch), budget=budget, ranks=ranks) for micro in share):
        if len(micro.tokens) > budget:
            assert int(micro.segment.max()) == 0
            assert int(micro.branch.max()) <= 1


@settings(max_examples=40)
@given(batches(), st.integers(1, 70))
def test_segments_say_the_same_as_the_mask(
    batch: tuple[list[ScoredGroup], list[tuple[float, float]]], budget: int
) -> None:
    for micro in pack(items_of(*batch), budget=budget, ranks=1)[0]:
        seen = torch.zeros(len(micro.tokens), len(micro.tokens), dtype=torch.int64)
        for segment in micro.segments():
            for rows, columns, causal in segment.blocks():
                block = torch.ones_like(seen[rows, columns])
                seen[rows, columns] += block.tril() if causal else block
        assert torch.equal(seen, micro.attention_mask()[0, 0].long())


@settings(max_examples=40)
@given(batches(), st.integers(1, 70))
def test_a_response_is_never_split_and_follows_its_prompt(
    batch: tuple[list[ScoredGroup], list[tuple[float, float]]], budget: int
) -> None:
    items = items_of(*batch)
    waiting = [
        (item.group.prompt_tokens.tolist(), item.response.tokens.tolist())
        for item in items
        if item.advantage != 0.0 and item.coefficient != 0.0
    ]
    for micro in pack(items, budget=budget, ranks=1)[0]:
        if not len(micro.target):
            continue
        for segment in range(int(micro.segment.max()) + 1):
            inside = micro.segment == segment
            prompt = inside & (micro.branch == 0)
            for branch in range(1, int(micro.branch[inside].max()) + 1):
                response = inside & (micro.branch == branch)
                waiting.remove((micro.tokens[prompt].tolist(), micro.tokens[response].tolist()))
                positions = torch.cat([micro.positions[prompt], micro.positions[response]])
                assert positions.tolist() == list(range(len(positions)))
    assert waiting == []


def test_a_response_over_the_budget_rides_alone_with_its_prompt() -> None:
    groups = numbered([scored(0, rewards=(0.0, 1.0, 0.0), lengths=(2, 50, 2), prompt_length=4), scored(1)])
    rows = pack(items_of(groups), budget=20, ranks=1)[0]
    (long,) = [micro for micro in rows if len(micro.tokens) > 20]
    assert len(long.tokens) == 54
    assert len(long.target) == 50


def test_the_responses_of_a_group_share_one_prompt() -> None:
    (micro,) = pack(items_of([scored(0, rewards=[1.0] * 4, lengths=[5] * 4, prompt_length=100)]), budget=200, ranks=1)[
        0
    ]
    assert len(micro.tokens) == 120


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("groups", "budget"), [(1, 400), (2, 100), (3, 100), (5, 100), (12, 100), (12, 250), (7, 40)])
def test_all_ranks_have_as_much_to_do_in_every_round(groups: int, budget: int, ranks: int) -> None:
    made = numbered(
        [scored(i, rewards=[0.0, 1.0] * 4, lengths=[10 + i % 3] * 8, prompt_length=4) for i in range(groups)]
    )
    shares = pack(items_of(made), budget=budget, ranks=ranks)
    rounds = [[len(micro.tokens) for micro in together] for together in zip(*shares, strict=True)]
    loads = [sum(len(micro.tokens) for micro in share) for share in shares]
    least = sum(8 * (10 + i % 3) + 4 for i in range(groups))
    assert sum(loads) <= 1.25 * least, "prompts are repeated only where they must be"
    assert sum(max(lengths) for lengths in rounds) <= 1.35 * sum(loads) / ranks, (rounds, loads)


def test_nothing_to_train_is_a_one_token_row_on_every_rank() -> None:
    for items in ([], items_of([scored(0)], [(0.0, 1.0), (1.0, 0.0)])):
        shares = pack(items, budget=64, ranks=3)
        assert [[len(micro.tokens) for micro in share] for share in shares] == [[1]] * 3
        assert all(len(micro.target) == 0 for share in shares for micro in share)


def test_each_token_carries_the_version_that_sampled_it() -> None:
    group = scored(0, rewards=(1.0,), lengths=(5,))
    spans = (Span(start=0, version=3), Span(start=2, version=4), Span(start=4, version=6))
    changed = dataclasses.replace(group.group.responses[0], spans=spans, mask=np.array([1, 1, 0, 1, 1], dtype=np.bool_))
    object.__setattr__(group.group, "responses", (changed,))
    (micro,) = pack(items_of([group]), budget=64, ranks=1)[0]
    assert micro.version.tolist() == [3, 3, 4, 6]


# --- assemble --------------------------------------------------------------------------------------


def some_groups() -> list[ScoredGroup]:
    return [
        scored(0, rewards=(0.0, 1.0, 1.0), lengths=(3, 9, 1), finishes=("stop", "length", "stop")),
        scored(1, rewards=(1.0, 1.0), lengths=(6, 2), masks=(MASK, None)),
        scored(2, rewards=(0.5, 0.0, 1.0), lengths=(4, 0, 8)),
    ]


def config_of(kind: str = "delta_l", **rooms: Any) -> Any:
    aggregation = {"kind": kind} | ({"alpha": 0.75} if kind.startswith("delta_l") else {})
    algorithm = {"aggregation": aggregation} | rooms.pop("algorithm", {})
    return run_config(algorithm=algorithm, rollout={"max_response_tokens": 16}, **rooms)


@pytest.mark.parametrize("kind", sorted(AGGREGATIONS))
def test_coefficients_are_those_of_the_whole_batch(kind: str) -> None:
    batch = assemble(7, some_groups(), config_of(kind))
    lengths = [3, 9, 1, 4, 2, 4, 0, 8]  # A tool's tokens are not the policy's.
    expected = token_coefficients(kind, lengths, max_length=16, alpha=0.75)
    assert batch.coefficients.tolist() == expected.tolist()
    assert batch.version == 7
    assert batch.coefficients.dtype == np.float64


@pytest.mark.parametrize("kind", ["grpo", "grpo_no_std"])
def test_advantages_are_those_of_each_group(kind: str) -> None:
    batch = assemble(0, some_groups(), config_of(algorithm={"advantage": kind}))
    expected = advantages([0, 1, 1, 1, 1, 0.5, 0, 1], [0, 0, 0, 1, 1, 2, 2, 2], kind=kind)
    assert batch.advantages.tolist() == expected.tolist()
    assert batch.advantages[3:5].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", sorted(AGGREGATIONS))
def test_a_filtered_overlong_response_leaves_the_loss_and_stays_in_the_baseline(kind: str) -> None:
    plain = assemble(0, some_groups(), config_of(kind))
    filtered = assemble(0, some_groups(), config_of(kind, verify={"overlong": "filter"}))
    assert filtered.advantages.tolist() == plain.advantages.tolist()
    assert filtered.coefficients[1] == 0.0
    without = token_coefficients(kind, [3, 1, 4, 2, 4, 0, 8], max_length=16, alpha=0.75)
    assert np.delete(filtered.coefficients, 1).tolist() == without.tolist()


@pytest.mark.parametrize("kind", sorted(AGGREGATIONS))
def test_a_response_without_a_token_of_the_policy_has_coefficient_zero(kind: str) -> None:
    groups = [scored(0, rewards=(0.0, 1.0, 1.0), lengths=(0, 3, 2), masks=(None, (False,) * 3, None))]
    batch = assemble(0, groups, config_of(kind))
    assert batch.coefficients[:2].tolist() == [0.0, 0.0]
    assert batch.coefficients[2] == float(token_coefficients(kind, [2], max_length=16, alpha=0.75))
    trained = told(pack(mini_batches(batch, count=1, seed=0)[0], budget=64, ranks=1)[0])
    assert len(trained) == 2


def test_a_batch_without_any_token_to_train_is_no_error() -> None:
    batch = assemble(0, [scored(0, lengths=(0, 0))], config_of())
    assert batch.coefficients.tolist() == [0.0, 0.0]
    assert [len(row.target) for row in pack(mini_batches(batch, count=1, seed=0)[0], budget=8, ranks=1)[0]] == [0]


# --- mini-batches ----------------------------------------------------------------------------------


def large_batch(version: int = 0, *, empty: int = 0) -> Batch:
    """Ten groups of three responses, the first `empty` responses without a token."""
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 16, (10, 3))
    lengths.reshape(-1)[:empty] = 0
    groups = [scored(i, rewards=draw.random(3).tolist(), lengths=lengths[i].tolist()) for i in range(10)]
    return assemble(version, numbered(groups), config_of())


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(-(2**63), 2**63), st.integers(0, 1000))
def test_mini_batches_are_a_partition_of_the_batch_of_nearly_equal_parts(count: int, seed: int, version: int) -> None:
    cut = mini_batches(large_batch(version), count=count, seed=seed)
    assert sorted(item.place for part in cut for item in part) == list(range(30))
    assert len(cut) == count
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_the_cut_follows_from_seed_and_version_alone() -> None:
    def places(seed: int, version: int) -> list[list[int]]:
        cut = mini_batches(large_batch(version), count=3, seed=seed)
        return [[item.place for item in part] for part in cut]

    assert places(5, 2) == places(5, 2)
    orders = {str(places(seed, version)) for seed in (-1, 0, 1) for version in range(3)}
    assert len(orders) == 9


def test_a_mini_batch_is_not_what_came_first() -> None:
    """In arrival order mini-batches would be sorted by length."""
    assert [item.place for item in mini_batches(large_batch(), count=3, seed=0)[0]] != list(range(10))


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(0, 9))
def test_a_mini_batch_of_b_of_the_responses_in_the_loss_scales_by_all_of_them_over_b(count: int, empty: int) -> None:
    batch = large_batch(empty=empty)
    for part in mini_batches(batch, count=count, seed=3):
        inside = sum(batch.coefficients[item.place] > 0 for item in part)
        for item in part:
            expected = batch.coefficients[item.place] * ((30 - empty) / inside if inside else 0.0)
            assert item.coefficient == pytest.approx(expected, rel=1e-12)
            assert item.advantage == batch.advantages[item.place]


def test_one_mini_batch_is_the_batch_as_it_is() -> None:
    batch = large_batch()
    (items,) = mini_batches(batch, count=1, seed=0)
    assert [item.coefficient for item in items] == batch.coefficients.tolist()
    assert [item.place for item in items] == list(range(30))


@settings(max_examples=40)
@given(st.sampled_from(sorted(AGGREGATIONS)), st.integers(2, 30), st.integers(0, 9))
def test_normalized_over_the_mini_batch_each_is_a_batch_of_its_own(kind: str, count: int, empty: int) -> None:
    config = config_of(kind)
    batch = large_batch(empty=empty)
    for part in mini_batches(batch, count=count, seed=3, anew=partial(coefficients, config=config)):
        lengths = [item.response.length for item in part]
        expected = (
            token_coefficients(kind, lengths, max_length=16, alpha=0.75).tolist() if any(lengths) else [0.0] * len(part)
        )
        assert [item.coefficient for item in part] == expected


def test_a_response_filtered_for_its_length_stays_out_of_a_mini_batch_s_own_coefficients() -> None:
    config = config_of("dapo", verify={"overlong": "filter"})
    batch = assemble(0, some_groups(), config)
    cut = mini_batches(batch, count=2, seed=0, anew=partial(coefficients, config=config))
    assert sum(item.coefficient == 0.0 for part in cut for item in part) == 2
    for part in cut:
        used = [item.response.length for item in part if item.coefficient > 0]
        assert {item.coefficient for item in part} - {0.0} == {1.0 / sum(used)}


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo", "sequence_sum"])
def test_over_what_is_normalized_does_not_matter_where_lengths_of_others_do_not(kind: str) -> None:
    config = config_of(kind)
    batch = assemble(0, some_groups(), config)
    cuts = [mini_batches(batch, count=3, seed=1, anew=anew) for anew in (None, partial(coefficients, config=config))]
    for one, other in zip(*cuts, strict=True):
        assert [item.coefficient for item in one] == pytest.approx([item.coefficient for item in other], rel=1e-12)
