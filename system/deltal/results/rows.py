"""Reading metrics.jsonl's rows with care: any key may be missing, None or NaN, and a step may have several rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
MISSING = "–"
NAN = float("nan")


def last_rows(rows: Iterable[Row]) -> list[Row]:
    """The row that counts of each step (a redone step's row replaces the old one), in the order of steps."""
    by_step = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [by_step[step] for step in sorted(by_step)]


def number(value: Any) -> float:
    """`value` as a float; NaN when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NAN
    return float(value) if math.isfinite(value) else NAN


def at(facts: Any, *path: str) -> Any:
    """The value under `path` in nested mappings; None when anything on the way is missing or no mapping."""
    for key in path:
        facts = facts.get(key) if isinstance(facts, Mapping) else None
    return facts


def column(rows: Iterable[Row], *path: str) -> list[float]:
    """One number a row, NaN where it has none."""
    return [number(at(row, *path)) for row in rows]


STALLED_STEPS = 3
"""So many steps in a row without a group to learn from are no accident."""


def stalled(rows: Iterable[Row]) -> str | None:
    """One line when the last steps had no gradient, since no group's rewards differed; else None."""
    last = last_rows(rows)[-STALLED_STEPS:]
    moved = any(number(row.get(name)) != 0 for row in last for name in ("mixed_groups", "grad_norm"))
    if len(last) < STALLED_STEPS or moved:
        return None
    reward, cut = (sum(column(last, name)) / len(last) for name in ("reward", "overlong"))
    because = "; all responses were cut at rollout.max_response_tokens" if cut == 1.0 else ""
    return (
        f"nothing was learned in the last {STALLED_STEPS} steps: all responses to a prompt got the same reward (mean "
        f"{reward:.3f}{because}); look at task, template and difficulty of data"
    )


def items(value: Any) -> list[Any]:
    """The entries of a JSON list; none when `value` is no list."""
    return list(value) if isinstance(value, list | tuple) else []


def interval(value: Any) -> tuple[float, float]:
    """A pair of numbers [low, high]; NaN where there is none."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return number(value[0]), number(value[1])
    return NAN, NAN


def show(value: Any, digits: int = 3) -> str:
    """A number, a word or a yes for people; a dash for None, NaN and what cannot be said in a cell."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    known = number(value)
    if math.isnan(known):
        return MISSING
    if known == int(known) and abs(known) < 1e15:
        return f"{int(known):,}"
    return f"{known:,.{digits}f}" if abs(known) >= 10**-digits else f"{known:.{digits - 1}e}"


def show_interval(value: Any, digits: int = 3) -> str:
    """`[low, high]`, or a dash."""
    low, high = interval(value)
    return MISSING if math.isnan(low) or math.isnan(high) else f"[{low:.{digits}f}, {high:.{digits}f}]"
