"""The prompts of a run, read and checked: by every verb and by the Controller in the same way.

A group's number means a row of what is returned here, for as long as the run lives. So the folder keeps in data.json
what the run began with: a later start compares, and leaves out the same rows as the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltal.config import DataConfig, RunConfig, SplitOff, VerifyConfig
from deltal.data.datasets import Problems, read, settle
from deltal.data.held_out import question, split_off
from deltal.errors import DataError
from deltal.folder import RunFolder
from deltal.types import Prompt
from deltal.verify.registry import find, gold_faults
from deltal.verify.sandbox.pool import SandboxPool

RECORD = "data.json"
PROCESSES = 2
"""That read gold answers at once, when a task needs a sandbox for it."""
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSet:
    """One data set whose rows can all be read and judged."""

    prompts: list[Prompt]
    problems: Problems
    """The rows that were left out."""
    record: Record
    """Rows, digest, and the rows whose answers could not be judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPrompts:
    """What a run trains on and what it is evaluated on."""

    train: list[Prompt]
    held_out: list[Prompt] = field(default_factory=list)
    """At most `evaluation.prompts`."""
    rows_skipped: int = 0
    """Rows left out because they can be neither read nor judged."""
    record: Record = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a person should know before it starts, a line each."""


def checked_set(
    config: DataConfig, section: str, settings: VerifyConfig, *, known: Mapping[str, Any] | None = None
) -> CheckedSet:
    """A data set with every gold answer looked at. `section`: where its settings stand; `known`: its earlier record.

    Raises DataError that names all broken rows at once, by FILE:LINE, unless `on_bad_rows` is `skip`; and when the data
    are not those of the record.
    """
    if config.task is not None:
        find(config.task)
    loaded = read(config, section)
    digest = _digest(loaded.prompts, config)
    if known is not None and known.get("digest") != digest:
        raise DataError(
            f"{loaded.name} is not what this run began with (by its {RECORD}: {known.get('rows')} rows then, "
            f"{len(loaded.prompts)} now): put the old data back, or begin a new run"
        )
    if known is not None:
        faults = {int(place): why for place, why in known.get("unjudged", {}).items()}
    else:
        with SandboxPool(processes=PROCESSES, timeout=settings.timeout, memory_mib=settings.memory_mib) as pool:
            faults = gold_faults(loaded.prompts, pool)
    record = {"rows": len(loaded.prompts), "digest": digest, "unjudged": {str(p): why for p, why in faults.items()}}
    for place, why in sorted(faults.items()):
        loaded.problems.add(loaded.places[place], why)
    for place in sorted(faults, reverse=True):
        del loaded.prompts[place]
    return CheckedSet(prompts=settle(loaded, config.on_bad_rows), problems=loaded.problems, record=record)


def checked_prompts(config: RunConfig, *, known: Mapping[str, Any] | None = None) -> RunPrompts:
    """The run's prompts. `known`: the record of an earlier start. Raises DataError as `checked_set` does."""
    known = known or {}
    train = checked_set(config.data, "data", config.verify, known=known.get("data"))
    held = config.evaluation.data
    record, notes, skipped = {"data": train.record}, _left_out("data", train.problems), train.problems.count
    prompts, held_out = train.prompts, list[Prompt]()
    if isinstance(held, SplitOff):
        prompts, held_out = split_off(prompts, held.rows)
    elif held is not None:
        name = "evaluation.data"
        other = checked_set(held, name, config.verify, known=known.get(name))
        held_out, record[name] = other.prompts, other.record
        notes += _left_out(name, other.problems)
        skipped += other.problems.count
    held_out = held_out[: config.evaluation.prompts]
    return RunPrompts(
        train=prompts, held_out=held_out, rows_skipped=skipped, record=record,
        notes=(*notes, *_remarks(config, prompts, held_out)),
    )  # fmt: skip


def prompts_of_run(config: RunConfig, folder: RunFolder) -> RunPrompts:
    """The prompts of a run in its folder: those it began with, by the folder's record, which is made when missing."""
    known = folder.read_json(RECORD)
    prompts = checked_prompts(config, known=known)
    if known is None:
        folder.write_json(RECORD, prompts.record)
    return prompts


def _left_out(section: str, problems: Problems) -> list[str]:
    if not problems.count:
        return []
    rows = "row is" if problems.count == 1 else "rows are"
    return [f"{problems.count} {rows} left out ({section}.on_bad_rows: skip): {problems}"]


def _remarks(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> list[str]:
    """What is allowed and yet rarely meant."""
    remarks = []
    batch = config.replay.prompts_per_batch
    if len(train) < batch:
        remarks.append(
            f"data has {len(train)} prompts and a batch takes {batch} (replay.prompts_per_batch): each stands in every "
            "batch more than once"
        )
    held = config.evaluation.data
    if isinstance(held, SplitOff) and held.rows > config.evaluation.prompts:
        remarks.append(
            f"evaluation.data holds {held.rows} rows out of training, evaluation.prompts = {config.evaluation.prompts} "
            "of them are used"
        )
    foreign = {prompt.task for prompt in held_out} - {prompt.task for prompt in train}
    if foreign and not isinstance(held, SplitOff):
        remarks.append(
            f"evaluation.data asks for {_listed(foreign)}, data for {_listed(prompt.task for prompt in train)}: the "
            "evaluation will not tell what was learned; evaluation.data={split_off: 64} holds out rows of data"
        )
    asked = {question(prompt) for prompt in train} if held_out else set()
    seen = sum(question(prompt) in asked for prompt in held_out)
    if seen:
        remarks.append(f"{seen} of {len(held_out)} questions of evaluation.data stand in data too: they are trained on")
    if config.chat.system_prompt and any(message.role == "system" for one in train for message in one.messages):
        remarks.append(
            "chat.system_prompt is set, and prompts in data have system messages of their own: both are said"
        )
    return remarks


def _listed(tasks: Iterable[str]) -> str:
    return ", ".join(sorted(set(tasks)))


def _digest(prompts: Iterable[Prompt], config: DataConfig) -> str:
    """Of all that is asked and of all it is judged by.

    Of reasoning-gym only the ids count: a few of its tasks draw from sets of strings, whose order is another in every
    process.
    """
    digest, asked = hashlib.sha256(), config.kind != "reasoning_gym"
    for prompt in prompts:
        said = [[message.role, message.content] for message in prompt.messages]
        facts = [prompt.id, prompt.task, *([said, prompt.answer, prompt.fields] if asked else [])]
        digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()
