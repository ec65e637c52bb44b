"""Laws of evaluation: each prompt counts once, and the intervals hold the truth as often as they promise."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal.results.statistics import best_of, mean_interval, paired_gain, pass_at, pass_at_k
from deltal.run.evaluation import Evaluation
from deltal.types import ScoredGroup
from tests.unit.builders import gid, prompt, run_config, scored


def begun(there_are: int = 4, **settings: Any) -> Evaluation:
    """An evaluation at version 3 over the first of `there_are` held-out prompts."""
    config = run_config(evaluation=settings, rollout={"temperature": 0.7, "max_response_tokens": 99})
    return Evaluation.of("during", 3, [prompt(i) for i in range(there_are)], config)


def result(index: int, *rewards: float, version: int = 3, **more: Any) -> ScoredGroup:
    return scored(gid(index, epoch=3, purpose="eval"), rewards=rewards, version=version, **more)


def outcomes(seed: int, gain: float, prompts: int = 100) -> tuple[list[float], list[float]]:
    """Right or wrong before and after on the same prompts, of any difficulty; the true mean gain is `gain`."""
    draw = np.random.default_rng(seed)
    easiness = draw.uniform(0.0, 1.0 - gain, prompts)
    before, after = draw.random(prompts) < easiness, draw.random(prompts) < easiness + gain
    return before.astype(float).tolist(), after.astype(float).tolist()


@pytest.mark.parametrize("gain", [0.0, 0.15])
def test_the_interval_of_a_gain_holds_the_true_gain_about_95_times_in_100(gain: float) -> None:
    held = 0
    for seed in range(100):
        _, (low, high) = paired_gain(*outcomes(seed, gain))
        held += low <= gain <= high
    # 95 expected; below 87 or so would have a chance of one in a thousand.
    assert held >= 87


def test_a_big_gain_is_told_from_none() -> None:
    for seed in range(20):
        mean, (low, high) = paired_gain(*outcomes(seed, 0.5))
        assert 0.0 < low < mean < high


def test_a_gain_is_paired_by_prompt() -> None:
    """Every prompt gains a tenth: the pairs say so exactly, however much the prompts differ."""
    before = np.linspace(0.0, 0.9, 50)
    mean, (low, high) = paired_gain(before.tolist(), (before + 0.1).tolist())
    assert mean == pytest.approx(0.1)
    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_gain_over_other_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="3 prompts before, 2 after"):
        paired_gain([1.0, 0.0, 1.0], [1.0, 0.0])


def test_an_interval_holds_its_mean_and_narrows_with_more_prompts() -> None:
    few, many = mean_interval([0.0, 1.0] * 20), mean_interval([0.0, 1.0] * 500)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert mean_interval([1.0] * 30) == [1.0, 1.0]


def test_the_same_results_have_the_same_interval() -> None:
    assert mean_interval([0.0, 1.0, 1.0] * 9) == mean_interval([0.0, 1.0, 1.0] * 9)


def test_each_prompt_is_requested_once_at_the_version_it_began_with() -> None:
    evaluation = begun(5, prompts=3, responses_per_prompt=2)
    assert list(evaluation.requests) == [gid(i, epoch=3, purpose="eval") for i in range(3)]
    for index, (id, request) in enumerate(evaluation.requests.items()):
        assert request.id == id
        assert request.prompt == prompt(index)
        assert (request.issued_version, request.responses, request.max_tokens) == (3, 2, 99)


@pytest.mark.parametrize(("setting", "used"), [(None, 0.7), (0.3, 0.3), (0.0, 0.0)])
def test_the_temperature_is_the_rollouts_only_where_none_is_set(setting: float | None, used: float) -> None:
    assert {request.temperature for request in begun(temperature=setting).requests.values()} == {used}


def test_each_prompt_counts_once_whatever_is_delivered_twice() -> None:
    evaluation = begun(3)
    for index, reward in ((0, 1.0), (0, 0.0), (1, 0.0), (1, 1.0), (0, 0.0), (2, 1.0)):
        evaluation.take(result(index, reward))
    assert evaluation.is_complete
    assert evaluation.row()["prompts"] == 3
    assert evaluation.row()["correct"] == [1.0, 0.0, 1.0]


def test_results_of_training_and_of_other_evaluations_are_ignored() -> None:
    evaluation = begun(2)
    evaluation.take(scored(gid(0, epoch=3)))
    evaluation.take(scored(gid(0, epoch=2, purpose="eval")))
    evaluation.take(scored(gid(7, epoch=3, purpose="eval")))
    assert evaluation.results == {}
    assert evaluation.row()["accuracy"] is None


def test_missing_is_what_has_no_result_and_is_in_no_queue_and_no_lease() -> None:
    evaluation = begun(4)
    evaluation.take(result(1, 1.0))
    present = {gid(2, epoch=3, purpose="eval"), gid(0)}
    assert [request.id.index for request in evaluation.missing(present)] == [0, 3]
    assert not evaluation.is_complete
    for index in (0, 2, 3):
        evaluation.take(result(index, 1.0))
    assert evaluation.missing(set()) == []
    assert evaluation.is_complete


def test_a_prompt_too_long_counts_as_wrong() -> None:
    evaluation = begun(4)
    for index, rewards in enumerate([(1.0,), (), (1.0,), ()]):
        evaluation.take(result(index, *rewards))
    row = evaluation.row()
    assert (row["accuracy"], row["prompts"], row["too_long"]) == (0.5, 4, 2)
    assert row["correct"] == [1.0, 0.0, 1.0, 0.0]


def test_a_prompt_given_up_counts_as_wrong_and_a_result_that_is_there_stays() -> None:
    evaluation = begun(3)
    evaluation.take(result(0, 1.0))
    evaluation.give_up([gid(0, epoch=3, purpose="eval"), gid(1, epoch=3, purpose="eval"), gid(1)])
    evaluation.take(result(1, 1.0))
    evaluation.take(result(2, 1.0))
    assert evaluation.is_complete
    assert evaluation.row()["correct"] == [1.0, 0.0, 1.0]


def test_accuracy_is_the_mean_over_prompts_of_the_mean_over_responses() -> None:
    evaluation = begun(2, responses_per_prompt=4)
    evaluation.take(result(0, 1.0, 0.0, 0.0, 0.0))
    evaluation.take(result(1, 1.0, 1.0, 1.0, 1.0))
    row = evaluation.row()
    assert row["correct"] == [0.25, 1.0]
    assert row["accuracy"] == 0.625
    assert row["interval_95"][0] <= 0.625 <= row["interval_95"][1]


def test_results_stand_in_the_order_of_the_prompts_whenever_they_came() -> None:
    evaluation = begun(12)
    for index in reversed(range(12)):
        evaluation.take(result(index, float(index % 3 == 0)))
    assert evaluation.row()["correct"] == [float(index % 3 == 0) for index in range(12)]


def test_a_result_says_which_versions_its_tokens_came_from() -> None:
    evaluation = begun(2)
    evaluation.take(result(0, 1.0, lengths=(4,), version=3))
    evaluation.take(result(1, 1.0, lengths=(8,), version=5))
    row = evaluation.row()
    assert (row["label"], row["version"], row["versions"], row["response_length"]) == ("during", 3, [3, 5], 6.0)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    responses = [i < correct for i in range(n)]
    chosen = [any(some) for some in combinations(responses, k)]
    assert pass_at_k(n, correct, k) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Over many draws of n = 6 responses of chance 0.3 its mean is 1 - 0.7^k; the naive 1 - (1 - c/n)^k is below."""
    correct = np.random.default_rng(0).binomial(6, 0.3, 20_000)
    for k in (1, 2, 4):
        estimates = np.array([pass_at_k(6, c, k) for c in range(7)])[correct]
        assert estimates.mean() == pytest.approx(1 - 0.7**k, abs=4 * float(estimates.std()) / 20_000**0.5)


@pytest.mark.parametrize(("n", "powers"), [(1, "1"), (2, "1 2"), (3, "1 2"), (4, "1 2 4"), (9, "1 2 4 8")])
def test_pass_at_k_is_told_for_powers_of_two_up_to_n(n: int, powers: str) -> None:
    told = pass_at([(n, 1), (n, 0)])
    assert list(told) == powers.split()
    values = [entry["value"] for entry in told.values()]
    assert values == sorted(values)
    for entry in told.values():
        low, high = entry["interval_95"]
        assert 0.0 <= low <= entry["value"] <= high <= 1.0


def test_pass_at_1_is_the_accuracy_and_a_prompt_too_long_counts_as_wrong() -> None:
    evaluation = begun(3, responses_per_prompt=4)
    for index, rewards in enumerate([(1.0, 0.0, 0.0, 0.0), (), (1.0, 1.0, 1.0, 1.0)]):
        evaluation.take(result(index, *rewards))
    row = evaluation.row()
    assert row["pass_at"]["1"]["value"] == pytest.approx(row["accuracy"]) == pytest.approx(1.25 / 3)
    assert row["pass_at"]["1"]["interval_95"] == pytest.approx(row["interval_95"])
    assert row["pass_at"]["4"]["value"] == pytest.approx(2 / 3)
    assert begun(0).row()["pass_at"] == {}


@pytest.mark.parametrize(
    ("label", "version", "checkpoint"),
    [("before", 0, None), ("during", 10, 10), ("during", 13, 10), ("during", 20, 20), ("after", 23, 23)],
)
def test_an_evaluation_belongs_to_the_checkpoint_that_was_made_for_it(
    label: str, version: int, checkpoint: int | None
) -> None:
    evaluation = Evaluation.of(label, version, [prompt(0)], run_config(evaluation={"every": 10}))
    assert evaluation.checkpoint == evaluation.row()["checkpoint"] == checkpoint


def test_the_best_checkpoint_is_the_earliest_of_the_most_accurate() -> None:
    rows = [(None, 0.9), (10, 0.5), (20, 0.7), (30, 0.7), (40, None)]
    told = [{"checkpoint": version, "accuracy": accuracy} for version, accuracy in rows]
    assert best_of(told) == {"version": 20, "accuracy": 0.7}
    assert best_of(told[:1]) is best_of([]) is None
    assert best_of([{"label": "during", "version": 3, "accuracy": 1.0}]) is None, "a row of an older deltal"
