"""What a run looks like in a terminal: the live display of `train`, and the table it ends with.

Pure: from the status (the live page's /status.json) and the rows of metrics.jsonl to something rich can print. Text of
a run is never read as rich markup, and control characters never reach the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deltal.results.rows import MISSING, Row, at, column, last_rows, number, show, show_interval

BARS = "▁▂▃▄▅▆▇█"
TREND_STEPS = 40
"""How many of the last steps a trend shows."""
VALUE_WIDTH = 9
"""Columns kept for a number before its remark."""


def render(status: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
    """The live display. Any key of `status` may be missing or None; `rows` may be empty."""
    counted = last_rows(rows)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, value, remark in _lines(status, counted):
        facts.add_row(Text(name), printable(f"{value:<{VALUE_WIDTH}} {remark}" if remark else value))
    parts: list[RenderableType] = [_bar(status), facts]
    message = status.get("error") or status.get("message")
    if message:
        parts.append(printable(str(message), style="yellow"))
    title = printable(f"deltal {show(status.get('name'))} · {show(status.get('state'))}")
    return Panel(Group(*parts), title=title, title_align="left", border_style="blue")


def before_after_table(summary: Row) -> Table:
    """Held-out accuracy before and after, the gain with its 95% interval, and what it took."""
    before, after = number(summary.get("accuracy_before")), number(summary.get("accuracy_after"))
    table = Table(title=printable(f"deltal {show(summary.get('name'))}"), title_justify="left")
    for heading in ("before", "after", "gain", "95% interval", "steps"):
        table.add_column(heading, justify="right")
    gain = after - before
    table.add_row(
        Text(show(before)),
        Text(show(after)),
        Text(MISSING if math.isnan(gain) else f"{gain:+.3f}"),
        Text(show_interval(summary.get("gain_interval_95"))),
        printable(show(summary.get("steps"))),
    )
    return table


def printable(text: str, style: str = "") -> Text:
    """`text` as one line without markup and without control characters: an escape sequence could fake a display."""
    return Text("".join(letter if letter.isprintable() else " " for letter in text), style=style)


def duration(seconds: Any) -> str:
    """Seconds as `1 h 02 min`, `3 min 20 s` or `45 s`; a dash for none."""
    known = number(seconds)
    if math.isnan(known) or known < 0:
        return MISSING
    whole = round(known)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def trend(values: Sequence[float]) -> str:
    """The last values as small bars from 0 (or the least, if below) to the largest; a space where there is none."""
    shown = list(values)[-TREND_STEPS:]
    known = [value for value in shown if not math.isnan(value)]
    if not known:
        return ""
    low = min(0.0, *known)
    span = (max(known) - low) or 1.0
    return "".join(" " if math.isnan(value) else BARS[round((value - low) / span * (len(BARS) - 1))] for value in shown)


def _bar(status: Row) -> RenderableType:
    """Step x of y and a bar; during an evaluation, its own progress behind it."""
    step, steps = number(status.get("step")), number(status.get("steps"))
    grid = Table.grid(padding=(0, 2))
    left = Text(f"step {show(step)}/{show(steps)}", style="bold")
    known = not math.isnan(step) and steps > 0
    bar = ProgressBar(total=steps if known else 1.0, completed=min(step, steps) if known else 0.0, width=30)
    right = Text(f"{duration(status.get('seconds_left'))} left" if status.get("alive", True) else "")
    if isinstance(status.get("evaluation"), Mapping):
        done, of = at(status, "evaluation", "done"), at(status, "evaluation", "of")
        right = printable(f"evaluation {show(done)}/{show(of)}", style="magenta")
    grid.add_row(left, bar, right)
    return grid


def _lines(status: Row, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Name, value and remark of every line."""

    def said(*path: str, digits: int = 3) -> str:
        return show(at(status, *path), digits)

    skipped = number(status.get("prompts_skipped"))
    lines = [
        ("reward", said("reward"), trend(column(rows, "reward"))),
        ("accuracy", said("accuracy"), trend(column(rows, "accuracy"))),
        ("response length", said("response_length", digits=1), trend(column(rows, "response_length"))),
        ("held-out", said("accuracy_before"), f"before; after {said('accuracy_after')}"),
        ("tokens a second", said("tokens_per_second", "rollout", digits=0), "rollout"),
        ("", said("tokens_per_second", "learner", digits=0), "learner"),
        ("policy version", said("policy_version"), ""),
        ("staleness", said("staleness", "mean"), f"mean; largest {said('staleness', 'max')}"),
        ("prompt queue", said("queues", "prompt", "waiting"), f"waiting; {said('queues', 'prompt', 'leased')} leased"),
        (
            "rollout queue",
            said("queues", "rollout", "waiting"),
            f"waiting; {said('queues', 'rollout', 'leased')} leased",
        ),
        ("workers", _counts(status.get("workers")), _pending(status.get("pending"))),
        ("ledger", said("ledger", "issued"), f"issued; {_counts(at(status, 'ledger'), without='issued')}"),
    ]
    restarts = _counts(status.get("restarts"))
    if restarts != MISSING:
        lines.append(("restarts", restarts, ""))
    if skipped > 0:
        lines.append(("prompts skipped", show(skipped), "longer than chat.max_prompt_tokens"))
    left_out = number(status.get("rows_skipped"))
    if left_out > 0:
        lines.append(("rows left out", show(left_out), "data.on_bad_rows: skip"))
    if status.get("address"):
        lines.append(("live page", str(status["address"]), ""))
    return lines


def _pending(facts: Any) -> str:
    """`7 rollout wait for CPU 0.5 each, 0.25 free`; those for whom there is room are only starting."""
    said = []
    for role, told in facts.items() if isinstance(facts, Mapping) else ():
        needs, free = at(told, "needs") or {}, at(told, "free") or {}
        lacking = [name for name, needed in needs.items() if number(free.get(name)) < number(needed)]
        who = f"{show(at(told, 'count'))} {role}"
        wants = ", ".join(f"{name} {show(needs[name])} each, {show(free.get(name))} free" for name in lacking)
        said.append(f"{who} wait for {wants}" if lacking else f"{who} starting")
    return "; ".join(said)


def _counts(facts: Any, without: str = "") -> str:
    """`rollout 2, verify 1` of a mapping of names to numbers."""
    if not isinstance(facts, Mapping):
        return MISSING
    said = [f"{str(name).replace('_', ' ')} {show(value)}" for name, value in facts.items() if name != without]
    return ", ".join(said) or MISSING
