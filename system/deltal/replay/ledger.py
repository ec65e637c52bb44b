"""What the journal says and the law it must obey: issued = consumed + filtered + evicted + in flight, always.

Records are facts in the order they happened. `Ledger.apply` folds one; `audit` folds all and lists what is wrong.
A group is consumed when a batch record names it; *trained once* means that exactly one does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from deltal.errors import LedgerError
from deltal.types import Fate, GroupId, ScoredGroup


class Opened(msgspec.Struct, tag="opened", frozen=True):
    """A ReplayBuffer began to write; first record of each incarnation."""

    incarnation: int
    at: float
    """Seconds since the epoch."""


class Issued(msgspec.Struct, tag="issued", frozen=True):
    """Groups got the right to exist, and where the prompt cursor stands after them."""

    ids: tuple[GroupId, ...]
    version: int
    """Policy version at issue."""
    epoch: int
    index: int
    at: float


class Admitted(msgspec.Struct, tag="admitted", frozen=True):
    """A scored group came in; with a fate when filtering ended it in the same breath."""

    scored: ScoredGroup
    filtered: str | None = None
    """equal_rewards, overlong or prompt_too_long."""


class Evicted(msgspec.Struct, tag="evicted", frozen=True):
    """A group was removed: stale, deadline, poisoned or malformed."""

    id: GroupId
    reason: str


class BatchFormed(msgspec.Struct, tag="batch", frozen=True):
    """Batch `version` is made of `ids`, in order; written before the learner sees it."""

    version: int
    ids: tuple[GroupId, ...]


class Trained(msgspec.Struct, tag="trained", frozen=True):
    """Batch `version` was trained and `version + 1` published; `skipped`: with unchanged weights."""

    version: int
    skipped: bool


Record = Opened | Issued | Admitted | Evicted | BatchFormed | Trained


@dataclass(slots=True)
class Entry:
    """What is known of one group: `issued -> admitted -> fate`."""

    version: int
    at: float
    admitted: bool = False
    oldest_version: int | None = None
    fate: Fate | None = None
    reason: str = ""
    step: int | None = None


@dataclass
class Ledger:
    """State folded from records. `apply` raises LedgerError on a record that breaks the law."""

    entries: dict[GroupId, Entry] = field(default_factory=dict)
    """In issue order."""
    open: dict[GroupId, Entry] = field(default_factory=dict)
    """In flight: issued without a fate, in issue order."""
    batches: list[tuple[GroupId, ...]] = field(default_factory=list)
    """Batch v at place v."""
    policy_version: int = 0
    """Newest published version: number of batches trained."""
    skipped: int = 0
    cursor: tuple[int, int] = (0, 0)
    """Epoch and index of the next prompt."""
    fates: Counter[str] = field(default_factory=Counter)
    """By fate, and by `fate:reason`."""

    def apply(self, record: Record) -> None:
        """Fold one record. Raises LedgerError when it contradicts an earlier one."""
        match record:
            case Issued(ids, version, epoch, index, at):
                for id in ids:
                    self._require(id not in self.entries, f"group {id} was issued twice")
                    self.entries[id] = self.open[id] = Entry(version=version, at=at)
                self.cursor = (epoch, index)
            case Admitted(scored, filtered):
                entry = self._in_flight(scored.group.id, "admitted")
                self._require(not entry.admitted, f"group {scored.group.id} was admitted twice")
                entry.admitted = True
                entry.oldest_version = scored.group.oldest_version
                if filtered:
                    self._end(scored.group.id, "filtered", filtered)
            case Evicted(id, reason):
                self._in_flight(id, "evicted")
                self._end(id, "evicted", reason)
            case BatchFormed(version, ids):
                self._require(version == len(self.batches), f"batch {version} follows batch {len(self.batches) - 1}")
                for id in ids:
                    entry = self._in_flight(id, f"consumed by batch {version}")
                    self._require(entry.admitted, f"batch {version} names group {id}, which was never admitted")
                    self._end(id, "consumed", "", step=version)
                self.batches.append(ids)
            case Trained(version, skipped):
                self._require(version == self.policy_version, f"version {version} was trained out of turn")
                self._require(version < len(self.batches), f"version {version} was trained without a batch record")
                self.policy_version = version + 1
                self.skipped += skipped
            case Opened():
                pass

    def counts(self) -> dict[str, int]:
        """The ledger line: issued, consumed, filtered, evicted, in_flight."""
        return {
            "issued": len(self.entries),
            "consumed": self.fates["consumed"],
            "filtered": self.fates["filtered"],
            "evicted": self.fates["evicted"],
            "in_flight": len(self.open),
        }

    def check(self) -> None:
        """Raises LedgerError when issued differs from the sum of all fates and the groups in flight."""
        counts = self.counts()
        total = counts["consumed"] + counts["filtered"] + counts["evicted"] + counts["in_flight"]
        self._require(counts["issued"] == total, f"issued {counts['issued']} groups but accounts for {total}")

    def _end(self, id: GroupId, fate: Fate, reason: str, step: int | None = None) -> None:
        entry = self.open.pop(id)
        entry.fate, entry.reason, entry.step = fate, reason, step
        self.fates[fate] += 1
        if reason:
            self.fates[f"{fate}:{reason}"] += 1

    def _in_flight(self, id: GroupId, what: str) -> Entry:
        entry = self.entries.get(id)
        if entry is None:
            raise LedgerError(f"group {id} was {what} but never issued")
        if entry.fate is not None:
            raise LedgerError(f"group {id} was {what} after it had been {entry.fate}")
        return entry

    @staticmethod
    def _require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise LedgerError(otherwise)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Result of `audit`: the counts, and every break of the law, each in one line."""

    counts: dict[str, int]
    reasons: dict[str, int]
    batches: int
    policy_version: int
    skipped: int
    staleness_max: int
    violations: tuple[str, ...]


def audit(records: Iterable[Record], *, max_staleness: int, steps: int = 0) -> Audit:
    """Fold all records and prove the law: one fate a group, one batch a consumed group, staleness within
    `max_staleness` versions, batches and versions in turn.

    `steps`: of how many trained batches others tell; with fewer in the records, their end is missing.
    """
    ledger, violations, worst = Ledger(), [], 0
    for record in records:
        try:
            ledger.apply(record)
        except LedgerError as error:
            violations.append(str(error))
            continue
        if isinstance(record, BatchFormed):
            for id in record.ids:
                oldest = ledger.entries[id].oldest_version
                staleness = record.version - (record.version if oldest is None else oldest)
                worst = max(worst, staleness)
                if staleness > max_staleness:
                    violations.append(
                        f"group {id} was {staleness} versions stale in batch {record.version}, at most "
                        f"{max_staleness} are allowed"
                    )
    try:
        ledger.check()
    except LedgerError as error:
        violations.append(str(error))
    if len(ledger.batches) < steps:
        violations.append(
            f"metrics.jsonl tells of {steps} steps, the journal of {len(ledger.batches)} batches: its end is missing"
        )
    named = Counter(id for batch in ledger.batches for id in batch)
    violations += [f"group {id} stands in {times} batch records" for id, times in named.items() if times > 1]
    return Audit(
        counts=ledger.counts(),
        reasons={key: count for key, count in sorted(ledger.fates.items()) if ":" in key},
        batches=len(ledger.batches),
        policy_version=ledger.policy_version,
        skipped=ledger.skipped,
        staleness_max=worst,
        violations=tuple(violations),
    )
