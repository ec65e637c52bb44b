"""Laws of the ledger: every group has one fate at most, and a record that says otherwise is refused in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal.errors import LedgerError
from deltal.replay.ledger import Admitted, BatchFormed, Evicted, Issued, Ledger, Opened, Record, Trained, audit
from tests.unit.builders import gid, scored

FILTERS = ["equal_rewards", "overlong", "prompt_too_long"]
EVICTIONS = ["stale", "deadline", "poisoned"]


def issued(*indices: int, version: int = 0) -> Issued:
    return Issued(tuple(gid(i) for i in indices), version, 0, max(indices) + 1, 0.0)


def admitted(index: int, *, version: int = 0, filtered: str | None = None) -> Admitted:
    return Admitted(scored(index, version=version), filtered)


def formed(version: int, *indices: int) -> BatchFormed:
    return BatchFormed(version, tuple(gid(i) for i in indices))


def folded(records: Sequence[Record]) -> Ledger:
    ledger = Ledger()
    for record in records:
        ledger.apply(record)
    return ledger


GOOD: list[Record] = [
    Opened(1, 0.0),
    issued(0, 1, 2, 3, 4, 5),
    admitted(0),
    admitted(1),
    admitted(2, filtered="equal_rewards"),
    Evicted(gid(3), "deadline"),
    formed(0, 0, 1),
    Trained(0, False),
    admitted(4),
]
"""Groups 0 and 1 trained, 2 filtered, 3 evicted, 4 admitted, 5 in flight."""


@st.composite
def journals(draw: st.DrawFn) -> list[Record]:
    """A valid sequence of records: at each place one of those that may follow."""
    records: list[Record] = [Opened(1, 0.0)]
    waiting: list[int] = []
    ready: list[int] = []
    next_index = batches = trained = 0
    for _ in range(draw(st.integers(0, 60))):
        choices = ["issue", "open"] + ["admit", "evict"] * bool(waiting) + ["batch", "drop"] * bool(ready)
        choices += ["train"] * (trained < batches)
        match draw(st.sampled_from(choices)):
            case "issue":
                count = draw(st.integers(1, 4))
                fresh = range(next_index, next_index + count)
                records.append(issued(*fresh, version=trained))
                waiting += fresh
                next_index += count
            case "open":
                records.append(Opened(len(records), 0.0))
            case "admit":
                index = waiting.pop(draw(st.integers(0, len(waiting) - 1)))
                filtered = draw(st.sampled_from([None, None, None, *FILTERS]))
                records.append(admitted(index, version=trained, filtered=filtered))
                ready += [] if filtered else [index]
            case "evict":
                index = waiting.pop(draw(st.integers(0, len(waiting) - 1)))
                records.append(Evicted(gid(index), draw(st.sampled_from(EVICTIONS))))
            case "drop":
                index = ready.pop(draw(st.integers(0, len(ready) - 1)))
                records.append(Evicted(gid(index), draw(st.sampled_from(EVICTIONS))))
            case "batch":
                count = draw(st.integers(1, len(ready)))
                records.append(formed(batches, *ready[:count]))
                ready = ready[count:]
                batches += 1
            case "train":
                records.append(Trained(trained, draw(st.booleans())))
                trained += 1
    return records


@settings(max_examples=80)
@given(journals())
def test_issued_is_consumed_and_filtered_and_evicted_and_in_flight_after_every_record(records: list[Record]) -> None:
    ledger = Ledger()
    for record in records:
        ledger.apply(record)
        ledger.check()
        counts = ledger.counts()
        assert counts["issued"] == sum(counts[fate] for fate in ("consumed", "filtered", "evicted", "in_flight"))
        assert set(ledger.open) == {id for id, entry in ledger.entries.items() if entry.fate is None}


@settings(max_examples=80)
@given(journals())
def test_an_audit_counts_what_the_records_say(records: list[Record]) -> None:
    result = audit(records, max_staleness=1_000)
    assert result.violations == ()
    assert result.counts["issued"] == sum(len(r.ids) for r in records if isinstance(r, Issued))
    assert result.counts["consumed"] == sum(len(r.ids) for r in records if isinstance(r, BatchFormed))
    assert result.counts["filtered"] == sum(isinstance(r, Admitted) and r.filtered is not None for r in records)
    assert result.counts["evicted"] == sum(isinstance(r, Evicted) for r in records)
    for fate, reason_of, reasons in (
        ("filtered", lambda r: r.filtered if isinstance(r, Admitted) else None, FILTERS),
        ("evicted", lambda r: r.reason if isinstance(r, Evicted) else None, EVICTIONS),
    ):
        for reason in reasons:
            assert result.reasons.get(f"{fate}:{reason}", 0) == sum(reason_of(r) == reason for r in records)
    assert result.batches == sum(isinstance(r, BatchFormed) for r in records)
    assert result.policy_version == sum(isinstance(r, Trained) for r in records)
    assert result.skipped == sum(isinstance(r, Trained) and r.skipped for r in records)


@settings(max_examples=40)
@given(journals(), st.data())
def test_no_record_of_a_fate_may_be_told_twice(records: list[Record], data: st.DataObject) -> None:
    again = data.draw(st.sampled_from([r for r in records if not isinstance(r, Opened)] or [issued(0)]))
    if not any(r is again for r in records):
        records = [*records, again]
    with pytest.raises(LedgerError):
        folded([*records, again])


BROKEN: list[tuple[str, Record, str]] = [
    ("issued twice", issued(6, 2), r"group train/0/2 was issued twice"),
    ("issued twice in one record", issued(6, 6), r"group train/0/6 was issued twice"),
    ("admitted, never issued", admitted(9), r"group train/0/9 was admitted but never issued"),
    ("admitted twice", admitted(4), r"group train/0/4 was admitted twice"),
    ("admitted after its batch", admitted(0), r"train/0/0 was admitted after it had been consumed"),
    ("admitted after filtering", admitted(2), r"train/0/2 was admitted after it had been filtered"),
    ("admitted after eviction", admitted(3), r"train/0/3 was admitted after it had been evicted"),
    ("consumed twice", formed(1, 4, 0), r"train/0/0 was consumed by batch 1 after it had been consumed"),
    ("twice in one batch", formed(1, 4, 4), r"train/0/4 was consumed by batch 1 after it had been consumed"),
    ("consumed after filtering", formed(1, 2), r"train/0/2 was consumed by batch 1 after it had been filtered"),
    ("consumed, never issued", formed(1, 9), r"train/0/9 was consumed by batch 1 but never issued"),
    ("consumed, never admitted", formed(1, 5), r"batch 1 names group train/0/5, which was never admitted"),
    ("evicted after its batch", Evicted(gid(1), "stale"), r"train/0/1 was evicted after it had been consumed"),
    ("evicted twice", Evicted(gid(3), "stale"), r"train/0/3 was evicted after it had been evicted"),
    ("evicted, never issued", Evicted(gid(9), "stale"), r"train/0/9 was evicted but never issued"),
    ("batch too early", formed(2, 4), r"batch 2 follows batch 0"),
    ("batch again", formed(0, 4), r"batch 0 follows batch 0"),
    ("trained again", Trained(0, False), r"version 0 was trained out of turn"),
    ("trained too early", Trained(2, False), r"version 2 was trained out of turn"),
    ("trained without batch", Trained(1, False), r"version 1 was trained without a batch record"),
]


@pytest.mark.parametrize(("record", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_record_that_breaks_the_law_is_refused_in_words(record: Record, message: str) -> None:
    ledger = folded(GOOD)
    with pytest.raises(LedgerError, match=message):
        ledger.apply(record)
    ledger.check()


@pytest.mark.parametrize(("record", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_an_audit_names_every_broken_record_and_goes_on(record: Record, message: str) -> None:
    result = audit([*GOOD, record, admitted(5)], max_staleness=4)
    assert len(result.violations) == 1
    with pytest.raises(LedgerError, match=message):
        raise LedgerError(result.violations[0])
    assert result.policy_version == 1


def doctored(change: Callable[[list[Any]], None]) -> list[Record]:
    """The records of four groups in two batches, after `change`."""
    records: list[Any] = [
        Opened(1, 0.0),
        issued(0, 1, 2, 3),
        *(admitted(i) for i in range(4)),
        formed(0, 0, 1),
        Trained(0, False),
        formed(1, 2, 3),
        Trained(1, True),
    ]
    change(records)
    return records


def put(place: int, record: Record) -> Callable[[list[Any]], None]:
    return lambda records: records.__setitem__(place, record)


def test_an_audit_finds_nothing_in_an_honest_journal() -> None:
    result = audit(doctored(lambda records: None), max_staleness=1)
    assert result.violations == ()
    assert (result.staleness_max, result.skipped, result.batches, result.policy_version) == (1, 1, 2, 2)
    assert result.counts == {"issued": 4, "consumed": 4, "filtered": 0, "evicted": 0, "in_flight": 0}


def test_an_audit_sees_a_group_in_two_batches() -> None:
    result = audit(doctored(put(8, formed(1, 1, 3))), max_staleness=4)
    assert "group train/0/1 was consumed by batch 1 after it had been consumed" in result.violations


def test_an_audit_sees_a_group_staler_than_allowed() -> None:
    result = audit(doctored(lambda records: None), max_staleness=0)
    assert len(result.violations) == 2
    assert result.violations[0] == "group train/0/2 was 1 versions stale in batch 1, at most 0 are allowed"


def test_an_audit_counts_staleness_from_the_oldest_token() -> None:
    fresh = doctored(lambda records: (put(4, admitted(2, version=1))(records), put(5, admitted(3, version=1))(records)))
    assert audit(fresh, max_staleness=0).staleness_max == 0


def test_an_audit_sees_a_missing_admission() -> None:
    result = audit(doctored(lambda records: records.pop(4)), max_staleness=4)
    assert "batch 1 names group train/0/2, which was never admitted" in result.violations


def test_an_audit_sees_a_missing_issue() -> None:
    result = audit(doctored(lambda records: records.pop(1)), max_staleness=4)
    assert "group train/0/0 was admitted but never issued" in result.violations


def test_an_audit_sees_a_missing_batch_record() -> None:
    result = audit(doctored(lambda records: records.pop(6)), max_staleness=4)
    assert "version 0 was trained without a batch record" in result.violations


def test_an_audit_sees_a_journal_that_ends_before_the_steps_it_led_to() -> None:
    batches = audit(GOOD, max_staleness=4).batches
    assert audit(GOOD, max_staleness=4, steps=batches).violations == ()
    (violation,) = audit(GOOD, max_staleness=4, steps=batches + 1).violations
    assert f"tells of {batches + 1} steps, the journal of {batches} batches" in violation
    assert audit([], max_staleness=4, steps=1).violations


def test_the_cursor_stands_after_the_last_issue() -> None:
    records = [Issued((gid(0),), 0, 0, 1, 0.0), Issued((gid(0, epoch=1),), 0, 1, 1, 0.0)]
    assert folded(records).cursor == (1, 1)
