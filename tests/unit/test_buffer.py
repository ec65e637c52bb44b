"""Laws of the replay buffer: bounded slots and staleness, one batch a group, no deadlock, and a rebuild that equals."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deltal.config import ReplayConfig
from deltal.errors import DataError, FilteredTooManyError, LearnerError
from deltal.replay.buffer import ReplayBuffer, Waiting
from deltal.replay.journal import decode, encode
from deltal.replay.ledger import Admitted, BatchFormed, Evicted, Issued, Record, Trained
from deltal.types import GroupId, Receipt, ScoredGroup
from tests.unit.builders import gid, scored

DEADLINE = 100.0
MIXED, EQUAL, TOO_LONG = (0.0, 1.0), (1.0, 1.0), ()
LONGEST = 8
"""M, in tokens."""


class Run:
    """A buffer with its journal in memory, and workers that obey: no token older than the issued version."""

    def __init__(
        self, *, batches: int = 4, per_batch: int = 2, ahead: int = 1, staleness: int = 1, **more: Any
    ) -> None:
        self.settings = ReplayConfig(
            prompts_per_batch=per_batch, max_ahead=ahead, max_staleness=staleness, group_deadline=DEADLINE, **more
        )
        self.batches = batches
        self.records: list[Record] = []
        self.buffer = ReplayBuffer(self.settings, batches=batches, responses=len(MIXED), max_length=LONGEST)
        self.next_index = 0
        self.clock = 0.0

    @property
    def version(self) -> int:
        return self.buffer.ledger.policy_version

    @property
    def unfinished(self) -> list[GroupId]:
        return [id for id, entry in self.buffer.ledger.open.items() if not entry.admitted]

    def commit(self, record: Record | None) -> None:
        if record is not None:
            self.records.append(record)
            self.buffer.apply(record)

    def issue(self, count: int | None = None) -> list[GroupId]:
        """Issue `count` groups, by default as many as there are slots."""
        slots = self.buffer.open_slots()
        ids = [gid(self.next_index + i) for i in range(slots if count is None else min(count, slots))]
        self.next_index += len(ids)
        self.commit(self.buffer.issue(ids, (0, self.next_index), at=self.clock))
        return ids

    def finish(self, id: GroupId, *, rewards: tuple[float, ...] = MIXED, version: int | None = None) -> Receipt:
        issued = self.buffer.ledger.entries[id].version
        group = scored(id, rewards=rewards, version=issued if version is None else version, issued=issued)
        receipt, record = self.buffer.admit(group)
        self.commit(record)
        return receipt

    def sample(self, version: int | None = None) -> tuple[GroupId, ...] | Waiting:
        outcome = self.buffer.sample(len(self.buffer.ledger.batches) if version is None else version)
        if isinstance(outcome, BatchFormed):
            self.commit(outcome)
            return outcome.ids
        return outcome

    def train(self, *, skipped: bool = False) -> None:
        self.commit(self.buffer.trained(self.version, skipped=skipped))

    def rebuilt(self) -> ReplayBuffer:
        """What a restart makes of the journal."""
        buffer = ReplayBuffer(self.settings, batches=self.batches, responses=len(MIXED), max_length=LONGEST)
        for record in decode(encode(self.records), "memory"):
            buffer.apply(record)
        return buffer

    def staleness(self) -> list[int]:
        """Of every group in every batch."""
        ledger = self.buffer.ledger
        return [
            version - (ledger.entries[id].oldest_version or 0)
            for version, ids in enumerate(ledger.batches)
            for id in ids
        ]


def outcome_of(buffer: ReplayBuffer, version: int) -> Any:
    """What `sample` would answer, errors included; changes nothing."""
    try:
        return buffer.sample(version)
    except (FilteredTooManyError, DataError) as error:
        return str(error)


def assert_equal(one: ReplayBuffer, other: ReplayBuffer) -> None:
    assert one.ledger == other.ledger
    assert list(one.ledger.open) == list(other.ledger.open)
    assert one.open_slots() == other.open_slots()
    assert list(one.ready) == list(other.ready)
    for version in range(len(one.ledger.batches) + 1):
        assert outcome_of(one, version) == outcome_of(other, version)


class ReplayMachine(RuleBasedStateMachine):
    """Any interleaving of what the Controller, the fleet, the learner and a crash may do."""

    @initialize(
        per_batch=st.integers(1, 3),
        bounds=st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (0, 0), (0, 2)]),
        batches=st.sampled_from([12, 6, 3, 1]),
        filter=st.sampled_from(["none", "equal_rewards"]),
    )
    def begin(self, per_batch: int, bounds: tuple[int, int], batches: int, filter: str) -> None:
        ahead, staleness = bounds
        self.run = Run(
            batches=batches, per_batch=per_batch, ahead=ahead, staleness=staleness, filter=filter, max_refill=2
        )
        self.samples: dict[int, tuple[GroupId, ...]] = {}
        self.outcomes: dict[GroupId, Receipt] = {}
        self.filtered_in_a_row = 0

    @rule(count=st.integers(1, 6))
    def issue(self, count: int) -> None:
        self.run.issue(count)

    @precondition(lambda self: self.run.unfinished)
    @rule(data=st.data(), rewards=st.sampled_from([MIXED, MIXED, MIXED, EQUAL, TOO_LONG]))
    def finish_in_any_order(self, data: st.DataObject, rewards: tuple[float, ...]) -> None:
        id = data.draw(st.sampled_from(self.run.unfinished))
        oldest = data.draw(st.integers(self.run.buffer.ledger.entries[id].version, self.run.version))
        receipt = self.run.finish(id, rewards=rewards, version=oldest)
        filtered = rewards == TOO_LONG or (rewards == EQUAL and self.run.settings.filter == "equal_rewards")
        assert receipt.fate == ("filtered" if filtered else None)
        assert not receipt.duplicate
        self.filtered_in_a_row += filtered

    @precondition(lambda self: any(entry.admitted for entry in self.run.buffer.ledger.entries.values()))
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        entries = self.run.buffer.ledger.entries
        id = data.draw(st.sampled_from([id for id, entry in entries.items() if entry.admitted]))
        receipt, record = self.run.buffer.admit(scored(id, rewards=(5.0,)))
        assert record is None
        assert receipt.duplicate
        assert (receipt.fate, receipt.step) == (entries[id].fate, entries[id].step)

    @rule()
    def deliver_what_was_never_issued(self) -> None:
        receipt, record = self.run.buffer.admit(scored(gid(self.run.next_index, epoch=9)))
        assert record is None
        assert "never issued" in receipt.reason

    @rule(data=st.data())
    def sample(self, data: st.DataObject) -> None:
        version = data.draw(st.integers(0, len(self.run.buffer.ledger.batches)))
        known = version < len(self.run.buffer.ledger.batches)
        if not known and version == self.run.batches:
            return
        limit = self.run.settings.max_refill * self.run.settings.prompts_per_batch
        try:
            outcome = self.run.sample(version)
        except (FilteredTooManyError, DataError):
            assert not known
            assert self.filtered_in_a_row > limit
            return
        if isinstance(outcome, Waiting):
            assert not known
            assert outcome.why
            if outcome.why.startswith("group "):
                named = GroupId.parse(outcome.why.split()[1].rstrip(","))
                assert named in self.run.unfinished
            return
        assert self.samples.setdefault(version, outcome) == outcome
        if not known:
            self.filtered_in_a_row = 0

    @precondition(lambda self: self.run.version < len(self.run.buffer.ledger.batches))
    @rule(skipped=st.booleans())
    def train(self, skipped: bool) -> None:
        self.run.train(skipped=skipped)

    @precondition(lambda self: self.run.buffer.ledger.entries)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(list(self.run.buffer.ledger.entries)))
        was_unfinished = id in self.run.unfinished
        evicted = self.run.buffer.evict([id], "poisoned")
        assert [record.id for record in evicted] == [id] * was_unfinished
        for record in evicted:
            self.run.commit(record)

    @rule(seconds=st.sampled_from([1.0, 40.0, 150.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.run.clock += seconds
        entries = self.run.buffer.ledger.entries
        late = [id for id in self.run.unfinished if self.run.clock - entries[id].at > DEADLINE]
        overdue = self.run.buffer.overdue(at=self.run.clock)
        assert overdue == [Evicted(id, "deadline") for id in late]
        for record in overdue:
            self.run.commit(record)

    @rule(laggards=st.integers(1, 4), steps=st.integers(2, 4))
    def step_on_while_the_oldest_lag_behind(self, laggards: int, steps: int) -> None:
        """All but the oldest groups finish, with the oldest tokens allowed; the learner takes what it may."""
        for _ in range(steps):
            self.run.issue()
            for id in self.run.unfinished[laggards:]:
                self.run.finish(id)
            version = len(self.run.buffer.ledger.batches)
            if version < self.run.batches and self.filtered_in_a_row == 0:
                outcome = self.run.sample()
                if isinstance(outcome, tuple):
                    self.samples[version] = outcome
            if self.run.version < len(self.run.buffer.ledger.batches):
                self.run.train()

    @rule()
    def crash_and_rebuild(self) -> None:
        rebuilt = self.run.rebuilt()
        assert_equal(rebuilt, self.run.buffer)
        self.run.buffer = rebuilt

    @rule()
    def finish_all_that_may_be_issued(self) -> None:
        """Never a deadlock: with every slot issued and every group finished there is a batch."""
        if self.run.version < len(self.run.buffer.ledger.batches):
            self.run.train()
        if len(self.run.buffer.ledger.batches) == self.run.batches:
            return
        self.run.issue()
        for id in self.run.unfinished:
            self.run.finish(id)
        version = len(self.run.buffer.ledger.batches)
        outcome = self.run.sample()
        assert not isinstance(outcome, Waiting), outcome
        self.samples[version] = outcome
        self.filtered_in_a_row = 0

    @invariant()
    def groups_never_exceed_the_slots(self) -> None:
        ledger, bounds = self.run.buffer.ledger, self.run.settings
        unpublished = sum(len(ids) for ids in ledger.batches[ledger.policy_version :])
        assert len(ledger.open) + unpublished <= (bounds.max_ahead + 1) * bounds.prompts_per_batch

    @invariant()
    def no_more_groups_exist_than_the_batches_need(self) -> None:
        counts = self.run.buffer.ledger.counts()
        needed = self.run.batches * self.run.settings.prompts_per_batch
        assert counts["consumed"] + counts["in_flight"] <= needed

    @invariant()
    def each_group_is_in_one_batch_and_fresh_enough(self) -> None:
        batches = self.run.buffer.ledger.batches
        ids = [id for batch in batches for id in batch]
        assert len(ids) == len(set(ids))
        assert all(len(batch) == self.run.settings.prompts_per_batch for batch in batches)
        assert all(staleness <= self.run.settings.max_staleness for staleness in self.run.staleness())
        self.run.buffer.ledger.check()


TestEveryInterleavingKeepsTheLaws = ReplayMachine.TestCase
TestEveryInterleavingKeepsTheLaws.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

BOUNDS = [
    (ahead, staleness, per_batch) for staleness in range(4) for ahead in range(staleness + 1) for per_batch in (1, 3)
]


@pytest.mark.parametrize(("ahead", "staleness", "per_batch"), BOUNDS)
def test_staleness_stays_in_bounds_and_every_run_ends(ahead: int, staleness: int, per_batch: int) -> None:
    for seed in range(6):
        run = Run(batches=10, per_batch=per_batch, ahead=ahead, staleness=staleness)
        pick = random.Random(seed)
        for _ in range(2_000):
            run.issue(pick.randint(0, 2 * per_batch))
            for id in pick.sample(run.unfinished, pick.randint(0, len(run.unfinished))):
                # The slowest worker's tokens are as old as they may be.
                assert run.finish(id).fate is None
            if run.version < len(run.buffer.ledger.batches) or not isinstance(run.sample(), Waiting):
                run.train()
            if run.version == run.batches:
                break
        assert max(run.staleness()) <= staleness
        counts = run.buffer.ledger.counts()
        assert counts == {"issued": 10 * per_batch, "consumed": 10 * per_batch} | dict.fromkeys(
            ("filtered", "evicted", "in_flight"), 0
        )


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_ahead_as_far_as_staleness_makes_batches_in_issue_order(ahead: int) -> None:
    """After the first window of (A + 1) P groups, whose order is free, batch v is the v-th P groups issued."""
    for seed in range(6):
        run = Run(batches=12, per_batch=2, ahead=ahead, staleness=ahead)
        pick = random.Random(seed)
        while run.version < run.batches:
            run.issue()
            while isinstance(run.sample(), Waiting):
                run.finish(pick.choice(run.unfinished))
            run.train()
        batches = run.buffer.ledger.batches
        issued = list(run.buffer.ledger.entries)
        window = (ahead + 1) * 2
        assert sorted(id for batch in batches[: ahead + 1] for id in batch) == issued[:window]
        assert [id for batch in batches[ahead + 1 :] for id in batch] == issued[window:]
        assert all(list(batch) == sorted(batch) for batch in batches)


def test_without_ahead_and_staleness_training_is_on_policy() -> None:
    run = Run(batches=3, per_batch=2, ahead=0, staleness=0)
    for version in range(3):
        ids = run.issue()
        assert len(ids) == 2
        assert run.buffer.ledger.entries[ids[0]].version == version
        for id in reversed(ids):
            run.finish(id)
        assert run.sample() == tuple(ids)
        assert run.issue() == []
        run.train()
    assert set(run.staleness()) == {0}


def test_the_worked_example_waits_for_one_more_group() -> None:
    run = Run(batches=9, per_batch=2, ahead=1, staleness=1)
    first, second, third, fourth = run.issue()
    run.finish(fourth)
    run.finish(second)
    assert run.sample() == (second, fourth)
    run.train()
    fifth, sixth = run.issue()
    run.finish(fifth)
    run.finish(sixth)
    run.finish(third)
    # The third and the fifth are finished, but the first would miss its last batch.
    waiting = run.sample()
    assert isinstance(waiting, Waiting)
    assert waiting.why.startswith(f"group {first}, which would be too stale later, 1 in flight")
    run.finish(first)
    assert run.sample() == (first, third)


def test_a_batch_has_its_groups_in_issue_order() -> None:
    run = Run(per_batch=3, ahead=0, staleness=2)
    ids = run.issue()
    for id in reversed(ids):
        run.finish(id)
    assert run.sample() == tuple(ids)


def test_a_batch_asked_for_again_is_the_same_before_and_after_training_and_a_crash() -> None:
    run = Run()
    for id in run.issue():
        run.finish(id)
    ids = run.sample(0)
    assert run.sample(0) == ids
    run.train()
    assert run.sample(0) == ids
    assert run.rebuilt().sample(0) == ids


def test_the_groups_of_a_batch_stay_at_hand_until_it_is_published() -> None:
    run = Run()
    for id in run.issue():
        run.finish(id)
    ids = run.sample(0)
    assert isinstance(ids, tuple)
    assert all(id in run.buffer.ready and id in run.rebuilt().ready for id in ids)
    run.train()
    assert not any(id in run.buffer.ready or id in run.rebuilt().ready for id in ids)


def test_the_learner_is_told_for_whom_it_waits() -> None:
    run = Run()
    run.issue()
    waiting = run.sample(0)
    assert isinstance(waiting, Waiting)
    assert waiting.why == "2 of 2 groups, 4 in flight, 0 slots open"
    for id in run.unfinished:
        run.finish(id)
    run.sample(0)
    assert run.sample(1) == Waiting(why="batch 0 to be published")
    with pytest.raises(LearnerError, match="asked for batch 3, but batch 1 is the next"):
        run.buffer.sample(3)


def test_slots_open_when_a_batch_is_published_and_not_when_it_is_formed() -> None:
    run = Run()
    for id in run.issue():
        run.finish(id)
    assert run.buffer.open_slots() == 0
    run.sample()
    assert run.buffer.open_slots() == 0
    run.train()
    assert run.buffer.open_slots() == 2


def test_an_evicted_or_filtered_group_frees_its_slot() -> None:
    run = Run(filter="equal_rewards")
    first, second, *_ = run.issue()
    run.finish(first, rewards=EQUAL)
    assert run.buffer.open_slots() == 1
    for record in run.buffer.evict([second], "poisoned"):
        run.commit(record)
    assert run.buffer.open_slots() == 2


def test_the_last_batches_are_not_overfilled() -> None:
    run = Run(batches=1, ahead=1, staleness=1)
    assert len(run.issue()) == 2
    assert run.buffer.open_slots() == 0


def test_a_second_delivery_gets_the_first_outcome() -> None:
    run = Run(filter="equal_rewards", per_batch=1, ahead=3, staleness=3)
    consumed, filtered, evicted, waiting = run.issue()
    run.finish(consumed)
    run.finish(filtered, rewards=EQUAL)
    run.commit(run.buffer.evict([evicted], "deadline")[0])
    run.finish(waiting)
    run.sample(0)
    outcomes = {consumed: ("consumed", 0, ""), filtered: ("filtered", None, "equal_rewards"),
                evicted: ("evicted", None, "deadline"), waiting: (None, None, "")}  # fmt: skip
    for id, (fate, step, reason) in outcomes.items():
        receipt, record = run.buffer.admit(scored(id))
        assert record is None
        assert receipt == Receipt(group=id, fate=fate, step=step, reason=reason, duplicate=True)  # type: ignore[arg-type]
    assert run.buffer.duplicates == 4


def with_logprob(group: ScoredGroup, value: float) -> ScoredGroup:
    """The group with one log-probability of its last response replaced."""
    first, last = group.group.responses
    logprobs = last.logprobs.copy()
    logprobs[0] = value
    changed = dataclasses.replace(last, logprobs=logprobs)
    return dataclasses.replace(group, group=dataclasses.replace(group.group, responses=(first, changed)))


@pytest.mark.parametrize(
    "broken",
    [
        lambda id: scored(id, lengths=(3, LONGEST + 1)),
        lambda id: scored(id, rewards=(1.0,)),
        lambda id: scored(id, rewards=(1.0, 0.0, 1.0)),
        lambda id: scored(id, rewards=(1.0, float("nan"))),
        lambda id: with_logprob(scored(id), float("nan")),
        lambda id: with_logprob(scored(id), float("-inf")),
        lambda id: with_logprob(scored(id), 0.5),
    ],
    ids=["too long", "too few", "too many", "no reward", "nan", "impossible", "above certainty"],
)
def test_what_cannot_have_been_sampled_is_evicted_and_never_in_a_batch(
    broken: Callable[[GroupId], ScoredGroup],
) -> None:
    run = Run()
    first, *others = run.issue()
    receipt, record = run.buffer.admit(broken(first))
    run.commit(record)
    assert (receipt.fate, receipt.reason) == ("evicted", "malformed")
    assert run.buffer.ledger.fates["evicted:malformed"] == 1
    for id in others:
        run.finish(id)
    batch = run.sample()
    assert isinstance(batch, tuple)
    assert first not in batch


def test_the_longest_response_and_a_certain_token_are_no_fault() -> None:
    run = Run()
    first, *_ = run.issue()
    receipt, _ = run.buffer.admit(with_logprob(scored(first, lengths=(LONGEST, LONGEST)), 0.0))
    assert receipt.fate is None


def test_a_group_that_was_never_issued_is_refused() -> None:
    run = Run()
    run.issue()
    receipt, record = run.buffer.admit(scored(gid(99)))
    assert record is None
    assert receipt == Receipt(group=gid(99), fate=None, step=None, reason="never issued: refused")
    assert run.buffer.refused == 1
    assert gid(99) not in run.buffer.ledger.entries


def test_a_group_sampled_on_weights_too_old_is_evicted() -> None:
    run = Run(batches=9, per_batch=1, ahead=0, staleness=0)
    for _ in range(2):
        run.finish(run.issue()[0])
        run.sample()
        run.train()
    (id,) = run.issue()
    receipt = run.finish(id, version=1)
    assert (receipt.fate, receipt.reason) == ("evicted", "stale")
    assert run.records[-1] == Evicted(id, "stale")
    assert run.buffer.open_slots() == 1


def test_a_prompt_too_long_is_filtered_under_every_filter() -> None:
    for filter in ("none", "equal_rewards"):
        run = Run(filter=filter)
        receipt = run.finish(run.issue()[0], rewards=TOO_LONG)
        assert (receipt.fate, receipt.reason) == ("filtered", "prompt_too_long")
        assert run.buffer.open_slots() == 1


def test_equal_rewards_are_filtered_only_when_asked_for() -> None:
    for filter, fate in (("none", None), ("equal_rewards", "filtered")):
        run = Run(filter=filter)
        receipt = run.finish(run.issue()[0], rewards=EQUAL)
        assert receipt.fate == fate
        assert isinstance(run.records[-1], Admitted)


def test_filtering_refills_a_batch_until_too_many_in_a_row_were_filtered() -> None:
    run = Run(filter="equal_rewards", max_refill=3, per_batch=2, ahead=0, staleness=0)
    for _ in range(2):
        # Two batches: what was filtered before the first does not count for the second.
        for _ in range(3 * 2):
            run.finish(run.issue()[0], rewards=EQUAL)
            assert isinstance(run.sample(), Waiting)
        for id in [*run.unfinished, *run.issue()]:
            run.finish(id)
        assert isinstance(run.sample(), tuple)
        run.train()
    for _ in range(7):
        run.finish(run.issue(1)[0] if not run.unfinished else run.unfinished[0], rewards=EQUAL)
    with pytest.raises(FilteredTooManyError, match=r"7 groups in a row were filtered before batch 2"):
        run.buffer.sample(2)
    with pytest.raises(FilteredTooManyError):
        run.rebuilt().sample(2)


def test_prompts_that_are_all_too_long_are_the_users_mistake_and_name_the_setting() -> None:
    run = Run(max_refill=1, per_batch=2, ahead=0, staleness=0)
    for _ in range(3):
        run.finish(run.issue(1)[0] if not run.unfinished else run.unfinished[0], rewards=())
    for buffer in (run.buffer, run.rebuilt()):
        with pytest.raises(DataError, match=r"3 prompts in a row were longer than chat\.max_prompt_tokens") as caught:
            buffer.sample(0)
        assert caught.value.exit_code == 2
    mixed = Run(filter="equal_rewards", max_refill=1, per_batch=2, ahead=0, staleness=0)
    for rewards in ((), EQUAL, ()):
        mixed.finish(mixed.issue(1)[0] if not mixed.unfinished else mixed.unfinished[0], rewards=rewards)
    with pytest.raises(FilteredTooManyError, match=r"3 groups in a row were filtered .* 2 of them for prompts longer"):
        mixed.buffer.sample(0)


def test_a_batch_that_is_whole_is_given_however_many_were_filtered() -> None:
    run = Run(filter="equal_rewards", max_refill=1, per_batch=2, ahead=1, staleness=1)
    run.issue()
    for _ in range(5):
        run.finish(run.unfinished[0], rewards=EQUAL)
        run.issue()
    ids = run.unfinished[:2]
    for id in ids:
        run.finish(id)
    assert run.sample() == tuple(ids)


def test_a_call_sent_twice_issues_and_trains_once() -> None:
    run = Run()
    ids = run.issue()
    assert run.buffer.issue(ids, (0, 4), at=0.0) is None
    again = run.buffer.issue([*ids, gid(50)], (0, 51), at=0.0)
    assert isinstance(again, Issued)
    assert again.ids == (gid(50),)
    for id in ids:
        run.finish(id)
    run.sample()
    assert run.buffer.trained(0, skipped=False) == Trained(0, False)
    run.train()
    assert run.buffer.trained(0, skipped=False) is None


def test_only_groups_without_an_outcome_are_unaccounted_for() -> None:
    run = Run()
    first, second, third, fourth = run.issue()
    run.finish(second)
    run.commit(run.buffer.evict([fourth], "poisoned")[0])
    assert run.buffer.unaccounted(set()) == [first, third]
    assert run.buffer.unaccounted({first}) == [third]


def test_a_finished_group_is_never_overdue() -> None:
    run = Run()
    first, *others = run.issue()
    run.finish(first)
    assert run.buffer.overdue(at=DEADLINE) == []
    assert [record.id for record in run.buffer.overdue(at=DEADLINE + 1)] == others
