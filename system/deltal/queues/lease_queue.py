"""A queue whose entries are leased, renewed and acked: pure, the clock is passed in, no Ray.

Entry: `waiting -> leased -> acked`, and back to the front of waiting when its lease ends without an ack.
Soft state on purpose: whoever knows what should exist (the replay ledger) puts it again after a loss.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from deltal.types import GroupId, Lease

T = TypeVar("T")


SUSPECT = 2
"""Leases that ended without an ack, after which an entry may be what ends its readers: no other is to fall with it."""
REMEMBERED = 10_000
"""Removed keys that are kept, to tell those who still hold them."""


@dataclass(slots=True)
class _Leased(Generic[T]):
    key: GroupId
    item: T | None  # None: re-created by a renewal after the queue lost its state
    deadline: float


class LeaseQueue(Generic[T]):
    """First in, first out, at most one entry a key.

    Args:
        lease_seconds: how long a lease lasts without renewal.
        incarnation: makes tokens of different lives of the queue differ.
    """

    def __init__(self, *, lease_seconds: float, incarnation: str = "0") -> None:
        self.lease_seconds = lease_seconds
        self.puts = self.acks = self.expired = 0
        self._incarnation = incarnation
        self._counter = itertools.count()
        self._waiting: OrderedDict[GroupId, tuple[T, float]] = OrderedDict()
        self._leased: dict[str, _Leased[T]] = {}
        self._deliveries: dict[GroupId, int] = {}
        self._removed: OrderedDict[GroupId, None] = OrderedDict()

    def put(self, entries: Iterable[tuple[GroupId, T]], *, now: float) -> int:
        """Append entries; a key that is here already, waiting or leased, is left alone. Returns how many were new."""
        leased = {entry.key for entry in self._leased.values() if entry.item is not None}
        new = 0
        for key, item in entries:
            if key in self._waiting or key in leased:
                continue
            self._waiting[key] = (item, now)
            self._removed.pop(key, None)
            new += 1
        self.puts += new
        return new

    def lease(self, count: int, *, now: float) -> list[Lease[T]]:
        """Up to `count` entries from the front, each with its own token. A suspect comes alone."""
        self.expire(now=now)
        leases: list[Lease[T]] = []
        is_suspect = False
        while self._waiting and len(leases) < count and not is_suspect:
            is_suspect = self._deliveries.get(next(iter(self._waiting)), 0) >= SUSPECT
            if is_suspect and leases:
                break
            key, (item, _) = self._waiting.popitem(last=False)
            token = f"{self._incarnation}-{next(self._counter)}"
            deadline = now + self.lease_seconds
            self._deliveries[key] = self._deliveries.get(key, 0) + 1
            self._leased[token] = _Leased(key, item, deadline)
            leases.append(Lease(key=key, item=item, token=token, deadline=deadline, deliveries=self._deliveries[key]))
        return leases

    def renew(self, held: Sequence[tuple[str, GroupId]], *, now: float) -> list[GroupId]:
        """Extend leases given as (token, key). An unknown token is re-created, so that a restarted queue
        knows again what its readers hold; a waiting copy of that key is taken back from the queue.

        Returns the keys that were removed meanwhile: their groups have their fate, nobody waits for them.
        """
        gone = [key for _, key in held if key in self._removed]
        for token, key in held:
            if key in self._removed:
                continue
            entry = self._leased.get(token)
            if entry is None:
                waiting = self._waiting.pop(key, None)
                entry = self._leased[token] = _Leased(key, waiting[0] if waiting else None, 0.0)
            entry.deadline = now + self.lease_seconds
        return gone

    def ack(self, tokens: Iterable[str]) -> None:
        """End leases for good. Acking twice, or an unknown token, is no error: acks may be re-sent."""
        for token in tokens:
            entry = self._leased.pop(token, None)
            if entry is not None:
                self.acks += 1
                self._deliveries.pop(entry.key, None)

    def give_back(self, tokens: Iterable[str], *, now: float) -> None:
        """Return leases unread to the front: the reader leaves and did nothing wrong."""
        for token in tokens:
            entry = self._leased.pop(token, None)
            if entry is not None and entry.item is not None:
                self._deliveries[entry.key] -= 1
                self._to_front(entry.key, entry.item, now)

    def expire(self, *, now: float) -> list[GroupId]:
        """End leases whose deadline is over; their entries go to the front. Returns their keys."""
        over = [token for token, entry in self._leased.items() if entry.deadline <= now]
        keys = []
        for token in over:
            entry = self._leased.pop(token)
            keys.append(entry.key)
            if entry.item is not None:
                self._to_front(entry.key, entry.item, now)
        self.expired += len(over)
        return keys

    def remove(self, keys: Iterable[GroupId]) -> None:
        """Forget entries whose group has its fate already."""
        gone = set(keys)
        for key in gone:
            self._waiting.pop(key, None)
            self._deliveries.pop(key, None)
            self._removed[key] = None
        while len(self._removed) > REMEMBERED:
            self._removed.popitem(last=False)
        for token in [token for token, entry in self._leased.items() if entry.key in gone]:
            del self._leased[token]

    def keys(self, *, now: float) -> set[GroupId]:
        """Keys of everything waiting or leased."""
        self.expire(now=now)
        return set(self._waiting) | {entry.key for entry in self._leased.values()}

    def delivered(self, times: int) -> list[GroupId]:
        """Keys waiting that were already leased `times` times or more without an ack."""
        return [key for key in self._waiting if self._deliveries.get(key, 0) >= times]

    @property
    def waiting(self) -> int:
        """Entries nobody holds."""
        return len(self._waiting)

    @property
    def leased(self) -> int:
        """Entries somebody holds."""
        return len(self._leased)

    def oldest(self, *, now: float) -> float:
        """Seconds the front entry has waited; 0 when nothing waits."""
        first = next(iter(self._waiting.values()), None)
        return 0.0 if first is None else now - first[1]

    def _to_front(self, key: GroupId, item: T, now: float) -> None:
        self._waiting[key] = (item, now)
        self._waiting.move_to_end(key, last=False)
