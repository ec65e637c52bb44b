"""Laws of evaluation: each prompt counts once, and the intervals hold the truth as often as they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deltal.run.evaluation import Evaluation, mean_interval, paired_gain
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
