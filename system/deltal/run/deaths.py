"""How many deaths of a role are borne, and how soon the next member starts: pure, the clock is passed in."""

from __future__ import annotations

from collections import Counter, deque

WINDOW = 600.0
"""Seconds over which deaths of one role are counted."""
LONGEST_BACKOFF = 60.0


class DeathBudget:
    """Deaths by role. A large fleet has as many accidents more: the limit is `most` or the members wanted.

    Args:
        most: deaths of a role in WINDOW seconds that a small fleet may have.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._recent: dict[str, deque[float]] = {}
        self.told: Counter[str] = Counter()
        """All deaths ever, by role."""

    def note(self, role: str, members: int, *, now: float, blameless: bool = False) -> bool:
        """Note a death among so many wanted members; False when it was one too many. A `blameless` one is told only."""
        self.told[role] += 1
        recent = self._recent.setdefault(role, deque())
        if not blameless:
            recent.append(now)
        while recent and recent[0] < now - WINDOW:
            recent.popleft()
        return len(recent) <= max(self._most, members)

    def count(self, role: str) -> int:
        """Deaths of a role in the window, as of the last one."""
        return len(self._recent.get(role, ()))

    def backoff(self, role: str) -> float:
        """Seconds to wait before the next member starts: none after a first death, then 1, 3, 7 … up to a minute."""
        return min(LONGEST_BACKOFF, 2.0 ** max(0, self.count(role) - 1) - 1.0)


def is_blameless(error: BaseException) -> bool:
    """Whether an actor died of nothing it did: its node is gone, or it had to make room."""
    text = str(error)
    return bool(getattr(error, "preempted", False)) or "node has died" in text or "node was terminated" in text
