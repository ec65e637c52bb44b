"""Laws of the order of prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal.data.cursor import PromptCursor, epoch_order
from deltal.types import GroupId

sizes = st.integers(1, 50)
seeds = st.integers(-(2**63), 2**63)

PINNED_ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


@given(sizes, seeds, st.integers(0, 1000))
def test_every_epoch_visits_each_row_once(size: int, seed: int, epoch: int) -> None:
    cursor = PromptCursor(size, seed, epoch)
    groups = [cursor.next() for _ in range(size)]
    assert sorted(cursor.row(group) for group in groups) == list(range(size))
    assert {group.epoch for group in groups} == {epoch}
    assert (cursor.epoch, cursor.index) == (epoch + 1, 0)


@given(sizes, seeds, st.integers(0, 120), st.integers(1, 60))
def test_resuming_anywhere_continues_the_same_order(size: int, seed: int, before: int, after: int) -> None:
    straight = PromptCursor(size, seed)
    groups = [straight.next() for _ in range(before + after)]
    stopped = PromptCursor(size, seed)
    for _ in range(before):
        stopped.next()
    resumed = PromptCursor(size, seed, stopped.epoch, stopped.index)
    again = [resumed.next() for _ in range(after)]
    assert again == groups[before:]
    assert [resumed.row(group) for group in again] == [straight.row(group) for group in groups[before:]]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(10, 0, 0).tolist() == PINNED_ORDER


def test_an_evaluation_group_is_about_its_index() -> None:
    assert PromptCursor(3, 0).row(GroupId(purpose="eval", epoch=7, index=12)) == 12


def test_positions_outside_are_refused() -> None:
    assert PromptCursor(3, 0, 0, 3).next() == GroupId(purpose="train", epoch=1, index=0)
    with pytest.raises(ValueError, match="size = 0"):
        PromptCursor(0, 0)
    with pytest.raises(ValueError, match="index = 4"):
        PromptCursor(3, 0, 0, 4)
    with pytest.raises(ValueError, match="train/0/3 is outside"):
        PromptCursor(3, 0).row(GroupId(purpose="train", epoch=0, index=3))
