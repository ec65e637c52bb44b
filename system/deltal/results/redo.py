"""`deltal replay`: a recorded step redone from the run folder alone, without Ray, beside what was recorded of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deltal.errors import UserError
from deltal.folder import RunFolder
from deltal.learner.redo import Redone, redo
from deltal.replay.journal import Journal
from deltal.replay.ledger import BatchFormed
from deltal.results.rows import number, show
from deltal.types import Batch, ScoredGroup

EQUAL_WITHIN = 1e-5
"""Largest relative difference of equal steps: other numbers of ranks add up in another order."""
LARGEST = 10
"""Contributions that are shown."""
Facts = dict[str, Any]


def replay_step(folder: RunFolder, step: int, advance: Callable[[int, int], None]) -> Facts:
    """Redo `step`, which trained policy version `step - 1`; facts as JSON values, `is_equal` the verdict.

    `advance(done, of)` counts batches that must be redone on the way. Raises UserError when there is no such step,
    JournalError or LearnerError when the folder is damaged.
    """
    journal = Journal(folder.path("journal"))
    batches = [record.ids for record in journal.read() if isinstance(record, BatchFormed)]
    if not 1 <= step <= len(batches):
        have = f"steps 1 to {len(batches)}" if batches else "no step yet"
        raise UserError(f"{folder.name} has no step {step}: its journal holds {have}")

    def groups_of(version: int) -> list[ScoredGroup]:
        return journal.find(batches[version])

    redone = redo(folder.config(), folder.path("checkpoints"), step - 1, groups_of, advance)
    rows = [row for row in folder.rows("metrics.jsonl") if row.get("step") == step]
    size = sum(abs(entry["contribution"]) for entry in _responses(redone.batch))
    return {
        "run": folder.name,
        "step": step,
        "version": step - 1,
        "began_at": redone.began_at,
        "batches_redone": step - 1 - redone.began_at,
        **compare(rows, redone, size),
        "groups": _groups(redone.batch),
        "largest": sorted(_responses(redone.batch), key=lambda entry: -abs(entry["contribution"]))[:LARGEST],
    }


def compare(rows: list[Facts], redone: Redone, size: float) -> Facts:
    """Recorded and recomputed figures, and whether they are equal; the last of `rows` counts.

    `size`: Σ |c A L|, the sum of the loss's terms by size. The loss's difference is relative to it where terms cancel.
    """
    row = rows[-1] if rows else None
    digests = [one["digest"] for one in rows if one.get("digest")]
    recorded, recomputed = (_figures(one) for one in (row or {}, redone.row))
    pairs = list(zip(recorded["grad_norms"], recomputed["grad_norms"], strict=False))
    differences = {
        "loss": relative_difference(recorded["loss"], recomputed["loss"], size=size),
        "grad_norm": max((relative_difference(*pair) for pair in pairs), default=math.inf),
    }
    is_equal = (
        row is not None
        and recorded["skipped"] == recomputed["skipped"]
        and len(recorded["grad_norms"]) == len(recomputed["grad_norms"])
        and max(differences.values()) <= EQUAL_WITHIN
    )
    return {
        "recorded": (recorded | {"digest": digests[-1] if digests else None}) if row else None,
        "recomputed": recomputed | {"digest": redone.digest},
        "difference": {name: value if math.isfinite(value) else None for name, value in differences.items()},
        "is_equal": is_equal,
    }


def relative_difference(recorded: float | None, recomputed: float | None, *, size: float = 0.0) -> float:
    """|a - b| over the larger of |a| and `size`; 0 when both are not finite (None), infinite when one is not."""
    if recorded is None or recomputed is None:
        return 0.0 if recorded is recomputed else math.inf
    if recorded == recomputed:
        return 0.0
    scale = max(abs(recorded), size)
    return abs(recorded - recomputed) / scale if scale else math.inf


def tables(facts: Facts) -> list[RenderableType]:
    """For people: the comparison, the groups, and the responses that weigh most."""
    return [_comparison(facts), _group_table(facts["groups"]), _largest_table(facts["largest"]), _verdict(facts)]


def _figures(row: Facts) -> Facts:
    norms = row.get("grad_norms") or []
    return {
        "loss": _finite(row.get("loss")),
        "grad_norms": [_finite(norm) for norm in norms],
        "skipped": bool(row.get("skipped")),
    }


def _finite(value: Any) -> float | None:
    """metrics.jsonl holds null for what is not finite."""
    known = number(value)
    return None if math.isnan(known) else known


def _responses(batch: Batch) -> list[Facts]:
    found, place = [], 0
    for scored in batch.groups:
        for index, (response, verdict) in enumerate(zip(scored.group.responses, scored.verdicts, strict=True)):
            coefficient, advantage = float(batch.coefficients[place]), float(batch.advantages[place])
            found.append(
                {
                    "group": str(scored.group.id),
                    "response": index,
                    "reward": verdict.reward,
                    "reason": verdict.reason,
                    "finish": response.finish,
                    "length": response.length,
                    "advantage": advantage,
                    "coefficient": coefficient,
                    "contribution": coefficient * advantage * response.length,
                    "text": response.text[:200],
                }
            )
            place += 1
    return found


def _groups(batch: Batch) -> list[Facts]:
    by_group: dict[str, list[Facts]] = {}
    for entry in _responses(batch):
        by_group.setdefault(entry["group"], []).append(entry)
    return [
        {
            "group": str(scored.group.id),
            "prompt": scored.group.prompt.id,
            "staleness": batch.version - scored.group.oldest_version,
            "prompt_length": len(scored.group.prompt_tokens),
            "rewards": [entry["reward"] for entry in by_group.get(str(scored.group.id), [])],
            "lengths": [entry["length"] for entry in by_group.get(str(scored.group.id), [])],
            "contribution": float(np.sum([abs(e["contribution"]) for e in by_group.get(str(scored.group.id), [])])),
        }
        for scored in batch.groups
    ]


def _comparison(facts: Facts) -> Table:
    began = f"checkpoint {facts['began_at']}" if facts["began_at"] else "the start model"
    way = f", {facts['batches_redone']} batch(es) redone on the way" if facts["batches_redone"] else ""
    table = Table(title=f"{facts['run']}, step {facts['step']}, from {began}{way}", title_justify="left")
    for heading in ("", "recorded", "recomputed", "relative difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    recorded, recomputed = facts["recorded"] or _figures({}) | {"digest": None}, facts["recomputed"]
    difference = facts["difference"]
    table.add_row("loss", _exact(recorded["loss"]), _exact(recomputed["loss"]), _exact(difference["loss"], 2))
    for place, norm in enumerate(recomputed["grad_norms"]):
        known = recorded["grad_norms"][place] if place < len(recorded["grad_norms"]) else None
        apart = _exact(relative_difference(known, norm), 2)
        table.add_row(f"gradient norm {place + 1}", _exact(known), _exact(norm), apart)
    table.add_row("skipped", show(recorded["skipped"]), show(recomputed["skipped"]), "")
    known, now = recorded["digest"], recomputed["digest"]
    apart = "" if known is None else "0" if known == now else "other bits"
    table.add_row("weights after", known or "not known", now, apart)
    return table


def _group_table(groups: list[Facts]) -> Table:
    table = Table(title="groups", title_justify="left")
    for heading in ("group", "prompt", "stale", "rewards", "lengths", "Σ |c A L|"):
        table.add_column(heading, justify="right" if heading in ("stale", "Σ |c A L|") else "left")
    for group in groups:
        rewards = " ".join(f"{reward:g}" for reward in group["rewards"])
        lengths = " ".join(str(length) for length in group["lengths"])
        table.add_row(
            group["group"], Text(group["prompt"]), str(group["staleness"]), rewards, lengths,
            show(group["contribution"]),
        )  # fmt: skip
    return table


def _largest_table(largest: list[Facts]) -> Table:
    table = Table(title="largest contributions c A L to the loss", title_justify="left")
    for heading in ("response", "reward", "A", "L", "c", "c A L", "text"):
        table.add_column(heading, justify="left" if heading in ("response", "text") else "right")
    for entry in largest:
        table.add_row(
            f"{entry['group']} #{entry['response']}", f"{entry['reward']:g}", f"{entry['advantage']:.3f}",
            f"{entry['length']}{' overlong' if entry['finish'] == 'length' else ''}", f"{entry['coefficient']:.3e}",
            f"{entry['contribution']:.3e}", Text(" ".join(entry["text"].split())[:60]),
        )  # fmt: skip
    return table


def _verdict(facts: Facts) -> str:
    if facts["recorded"] is None:
        return f"[yellow]metrics.jsonl has no row of step {facts['step']}: nothing to compare with[/]"
    if facts["is_equal"]:
        return f"[green]the same step[/] within {EQUAL_WITHIN:g}"
    return f"[red]not the step that was recorded[/]: it differs by more than {EQUAL_WITHIN:g}"


def _exact(value: float | None, digits: int = 8) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.{digits}e}"
