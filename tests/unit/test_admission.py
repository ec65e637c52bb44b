"""Laws of admission: the buffer's slots are the limit, and nothing is issued that no worker could sample."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal.run.admission import open_slots

versions = st.integers(0, 1000)


@given(versions, st.integers(0, 100), st.integers(0, 1000))
def test_open_admission_issues_what_the_buffer_has_room_for(policy: int, slots: int, ahead: int) -> None:
    replay = {"policy_version": policy, "open_slots": slots}
    assert open_slots(replay, newest_version=policy + ahead, is_open=True) == slots


@given(versions, st.integers(0, 100))
def test_nothing_is_issued_while_paused(policy: int, slots: int) -> None:
    assert open_slots({"policy_version": policy, "open_slots": slots}, newest_version=policy, is_open=False) == 0


@given(versions, st.data())
def test_nothing_is_issued_before_the_recorded_batches_are_redone(policy: int, data: st.DataObject) -> None:
    older = data.draw(st.integers(0, policy - 1)) if policy else None
    assert open_slots({"policy_version": policy, "open_slots": 8}, newest_version=older, is_open=True) == 0


@pytest.mark.parametrize("is_open", [True, False])
def test_nothing_is_issued_before_the_first_version_is_out(is_open: bool) -> None:
    assert open_slots({"policy_version": 0, "open_slots": 8}, newest_version=None, is_open=is_open) == 0
