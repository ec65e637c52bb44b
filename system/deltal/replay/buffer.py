"""The replay buffer as a plain object: what may be issued, what is admitted, which groups make a batch.

Each operation looks at the state and returns a record (or None when nothing changes); the caller journals it.
`apply` folds a record, live and after a restart alike, so a rebuilt buffer equals the one that died.

Staleness bound by construction (S = max_staleness, A = max_ahead ≤ S, P groups a batch): (A + 1) P slots, one taken
at issue, freed when the group's batch is published or another fate recorded. Batch v takes finished groups in issue
order; unfinished ones may be passed over only if for every k = 0…S at most k P of those left behind were issued at
version ≤ v + k - S. Example, P = 2, S = 1, A = 1: a group issued at version 0 must be in batch 0 or 1; if three such
groups were left behind after batch 0, one of them would miss batch 1, so the learner waits for one more to finish.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from deltal.config import ReplayConfig
from deltal.errors import DataError, DeltalError, FilteredTooManyError, LearnerError
from deltal.replay.ledger import Admitted, BatchFormed, Evicted, Issued, Ledger, Record, Trained
from deltal.types import Fate, GroupId, Receipt, ScoredGroup

ROUNDING = 1e-3
"""Nats by which a log-probability may be above 0 through rounding, in bfloat16 too."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """No batch yet; `why` says for whom the learner waits."""

    why: str


class ReplayBuffer:
    """State of one run's replay.

    Args:
        settings: the room's settings.
        batches: how many batches the run trains in all; no more groups are issued than they need.
        responses: of a group.
        max_length: M, most tokens of a response.
    """

    def __init__(self, settings: ReplayConfig, *, batches: int, responses: int, max_length: int) -> None:
        self._responses, self._max_length = responses, max_length
        self.ledger = Ledger()
        self.settings = settings
        self.batches = batches
        self.ready: dict[GroupId, ScoredGroup] = {}
        self.duplicates = self.refused = 0
        self._filtered_in_a_row = Counter[str]()

    def apply(self, record: Record) -> None:
        """Fold one record into the state. Raises LedgerError when it breaks the law."""
        self.ledger.apply(record)
        match record:
            case Admitted(scored, None):
                self.ready[scored.group.id] = scored
            case Admitted(_, reason):
                self._filtered_in_a_row[str(reason)] += 1
            case Evicted(id):
                self.ready.pop(id, None)
            case BatchFormed():
                self._filtered_in_a_row.clear()
            case Trained(version):
                # Kept until here, so that ranks and a quickly restarted learner get the batch from memory.
                for id in self.ledger.batches[version]:
                    self.ready.pop(id, None)

    def open_slots(self) -> int:
        """How many groups may be issued now."""
        settings, ledger = self.settings, self.ledger
        in_flight = len(ledger.open)
        unpublished = sum(len(batch) for batch in ledger.batches[ledger.policy_version :])
        slots = (settings.max_ahead + 1) * settings.prompts_per_batch - in_flight - unpublished
        needed = (self.batches - len(ledger.batches)) * settings.prompts_per_batch - in_flight
        return max(0, min(slots, needed))

    def issue(self, ids: Iterable[GroupId], cursor: tuple[int, int], *, at: float) -> Issued | None:
        """Record that `ids` exist and the cursor after them; ids known already are left out (a re-sent call)."""
        new = tuple(id for id in ids if id not in self.ledger.entries)
        if not new:
            return None
        return Issued(new, self.ledger.policy_version, cursor[0], cursor[1], at)

    def admit(self, scored: ScoredGroup) -> tuple[Receipt, Admitted | Evicted | None]:
        """Admit a group once. A known outcome is given again (duplicate), an id never issued is refused."""
        id = scored.group.id
        entry = self.ledger.entries.get(id)
        if entry is None:
            self.refused += 1
            return Receipt(group=id, fate=None, step=None, reason="never issued: refused"), None
        if entry.fate is not None or entry.admitted:
            self.duplicates += 1
            return Receipt(group=id, fate=entry.fate, step=entry.step, reason=entry.reason, duplicate=True), None
        if self.ledger.policy_version - scored.group.oldest_version > self.settings.max_staleness:
            return Receipt(group=id, fate="evicted", step=None, reason="stale"), Evicted(id, "stale")
        if self._is_malformed(scored):
            # A batch record that names it could never be trained, and would be redone at every resume.
            return Receipt(group=id, fate="evicted", step=None, reason="malformed"), Evicted(id, "malformed")
        reason = self._filter_reason(scored)
        fate: Fate | None = "filtered" if reason else None
        return Receipt(group=id, fate=fate, step=None, reason=reason or ""), Admitted(scored, reason)

    def sample(self, version: int) -> BatchFormed | tuple[GroupId, ...] | Waiting:
        """Batch `version`: a new record, the ids of a recorded one, or why there is none yet.

        Raises LearnerError when `version` is above the next one, FilteredTooManyError when filtering starves it, and
        DataError when prompts that are all too long do.
        """
        ledger, settings = self.ledger, self.settings
        if version < len(ledger.batches):
            return ledger.batches[version]
        if version > len(ledger.batches):
            raise LearnerError(f"the learner asked for batch {version}, but batch {len(ledger.batches)} is the next")
        if version > ledger.policy_version:
            return Waiting(why=f"batch {version - 1} to be published")
        finished = [id for id in ledger.open if id in self.ready]
        if len(finished) < settings.prompts_per_batch:
            if self._filtered_in_a_row.total() > settings.max_refill * settings.prompts_per_batch:
                raise self._starved(version)
            missing = settings.prompts_per_batch - len(finished)
            return Waiting(why=f"{missing} of {settings.prompts_per_batch} groups, {self._in_flight_text()}")
        chosen = tuple(finished[: settings.prompts_per_batch])
        held_up = self._must_not_leave_behind(version, set(chosen))
        if held_up is not None:
            return Waiting(why=f"group {held_up}, which would be too stale later, {self._in_flight_text()}")
        return BatchFormed(version, chosen)

    def trained(self, version: int, *, skipped: bool) -> Trained | None:
        """Record that batch `version` was trained and published; None when that is known (a redone step)."""
        return None if version < self.ledger.policy_version else Trained(version, skipped)

    def evict(self, ids: Iterable[GroupId], reason: str) -> list[Evicted]:
        """Evict groups that are in flight without an outcome."""
        open = self.ledger.open
        return [Evicted(id, reason) for id in ids if id in open and not open[id].admitted]

    def overdue(self, *, at: float) -> list[Evicted]:
        """Evictions of groups older than `group_deadline` seconds that have no outcome."""
        late = [id for id, entry in self.ledger.open.items() if at - entry.at > self.settings.group_deadline]
        return self.evict(late, "deadline")

    def unaccounted(self, present: set[GroupId]) -> list[GroupId]:
        """Issued groups without an outcome that are not in `present` (queues and leases), in issue order."""
        return [id for id, entry in self.ledger.open.items() if not entry.admitted and id not in present]

    def _starved(self, version: int) -> DeltalError:
        """Why there is no batch, with the setting to change."""
        count, too_long = self._filtered_in_a_row.total(), self._filtered_in_a_row["prompt_too_long"]
        if too_long == count:
            return DataError(
                f"{count} prompts in a row were longer than chat.max_prompt_tokens before batch {version}: raise it, "
                "or take longer rows out of data"
            )
        beside = f", {too_long} of them for prompts longer than chat.max_prompt_tokens" if too_long else ""
        return FilteredTooManyError(
            f"{count} groups in a row were filtered before batch {version}{beside}: all responses to a prompt got the "
            "same reward; the task is too easy or too hard, or its verifier does not find what the responses answer, "
            "or replay.filter should be `none`"
        )

    def _is_malformed(self, scored: ScoredGroup) -> bool:
        """Whether no engine can have sampled this, or no learner could train on it."""
        responses = scored.group.responses
        if not responses:
            return False  # a prompt too long
        return (
            len(responses) != self._responses
            or any(
                len(response.tokens) > self._max_length
                or not np.isfinite(response.logprobs).all()
                or bool((response.logprobs > ROUNDING).any())
                for response in responses
            )
            or not all(math.isfinite(verdict.reward) for verdict in scored.verdicts)
        )

    def _filter_reason(self, scored: ScoredGroup) -> str | None:
        if not scored.group.responses:
            return "prompt_too_long"
        rewards = {verdict.reward for verdict in scored.verdicts}
        if self.settings.filter == "equal_rewards" and len(rewards) == 1:
            return "equal_rewards"
        return None

    def _must_not_leave_behind(self, version: int, chosen: set[GroupId]) -> GroupId | None:
        """First group whose staleness bound breaks if this batch is taken, None when the bound holds."""
        behind = [(entry.version, id) for id, entry in self.ledger.open.items() if id not in chosen]
        for k in range(self.settings.max_staleness + 1):
            old = [id for issued, id in behind if issued <= version + k - self.settings.max_staleness]
            if len(old) > k * self.settings.prompts_per_batch:
                return next((id for id in old if id not in self.ready), old[0])
        return None

    def _in_flight_text(self) -> str:
        unfinished = [entry for entry in self.ledger.open.values() if not entry.admitted]
        return f"{len(unfinished)} in flight, {self.open_slots()} slots open"
