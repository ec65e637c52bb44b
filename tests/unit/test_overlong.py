"""Laws of the length limit: what it does to a reward, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal.config import VerifyConfig
from deltal.verify.tasks.overlong import punished, soft_punishment, unjudged
from tests.unit.builders import response, verdict

LIMIT, CACHE = 40, 10
SOFT = VerifyConfig(overlong="soft", overlong_cache_tokens=CACHE)
HARD: list[Any] = ["wrong", "verify", "filter"]


def slow(length: int) -> float:
    """Equation 13 of DAPO, case by case."""
    if length <= LIMIT - CACHE:
        return 0.0
    if length <= LIMIT:
        return ((LIMIT - CACHE) - length) / CACHE
    return -1.0


@given(st.integers(1, LIMIT))
def test_the_soft_punishment_is_that_of_the_paper(length: int) -> None:
    assert soft_punishment(response(length), limit=LIMIT, cache=CACHE) == pytest.approx(slow(length), abs=1e-12)


@given(st.integers(1, LIMIT))
def test_a_response_that_was_cut_loses_one_whatever_its_length(length: int) -> None:
    """In several turns a response may be cut before the policy itself wrote so much."""
    assert soft_punishment(response(length, finish="length"), limit=LIMIT, cache=CACHE) == -1.0


def test_only_what_the_policy_wrote_counts_as_length() -> None:
    mask = np.arange(LIMIT) < 5
    assert soft_punishment(response(LIMIT, mask=mask.tolist()), limit=LIMIT, cache=CACHE) == 0.0


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_punished_verdict_changes_in_its_reward_only(reward: float) -> None:
    before = verdict(reward)
    after = punished(before, response(35), SOFT, limit=LIMIT)
    assert after.reward == reward - 0.5
    assert dataclasses.replace(after, reward=reward) == before


@pytest.mark.parametrize("kind", HARD)
def test_without_soft_punishment_a_verdict_stays_as_it_is(kind: Any) -> None:
    before = verdict(1.0)
    assert punished(before, response(LIMIT, finish="length"), VerifyConfig(overlong=kind), limit=LIMIT) is before


@pytest.mark.parametrize("kind", [*HARD, "soft"])
@pytest.mark.parametrize("finish", ["stop", "length", "abort"])
def test_only_a_cut_response_under_wrong_is_not_judged(kind: Any, finish: str) -> None:
    found = unjudged(response(LIMIT, finish=finish), VerifyConfig(overlong=kind))
    if (kind, finish) == ("wrong", "length"):
        assert found is not None
        assert (found.reward, found.correct, found.reason) == (0.0, False, "overlong")
    else:
        assert found is None
