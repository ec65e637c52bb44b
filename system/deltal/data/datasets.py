"""Data sets to prompts: every kind of source becomes rows, every row one `Prompt`.

A new kind of source is one function `settings -> (place, row)` and one line in `SOURCES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from deltal.config import DataConfig
from deltal.data.columns import Row, prompt_of
from deltal.data.generated import generated_rows
from deltal.data.reasoning import reasoning_rows
from deltal.data.sources import hf_rows, jsonl_rows, parquet_rows
from deltal.errors import DataError
from deltal.types import Prompt

SOURCES: dict[str, Callable[[Any], Iterator[tuple[str, Row | DataError]]]] = {
    "jsonl": jsonl_rows,
    "parquet": parquet_rows,
    "hf": hf_rows,
    "reasoning_gym": reasoning_rows,
    "generated": generated_rows,
}
SHOWN = 10
"""Problems that a message tells in words; the others are counted."""


class Problems:
    """What is wrong with rows of a data set: how many are broken, and the first few reasons with their places."""

    def __init__(self) -> None:
        self.count = 0
        self._told: dict[str, list[Any]] = {}

    def add(self, place: str, why: str) -> None:
        """One more broken row."""
        self.count += 1
        if why in self._told:
            self._told[why][1] += 1
        elif len(self._told) < SHOWN:
            self._told[why] = [place, 1]

    def __str__(self) -> str:
        """One line: place and reason of each, rows that share a reason together."""
        told = [
            f"{place}: {why}" + (f" (and {rows - 1} more rows like it)" if rows > 1 else "")
            for why, (place, rows) in self._told.items()
        ]
        left = self.count - sum(rows for _, rows in self._told.values())
        return "; ".join(told) + (f"; and {left} more rows" if left else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A data set as it was read: the prompts that can be, and what is wrong with the other rows."""

    name: str
    """What a message calls the data set."""
    section: str
    """The settings it was read by: `data` or `evaluation.data`."""
    prompts: list[Prompt] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """Where each prompt stands: `FILE:LINE`, or `FILE, row N`."""
    problems: Problems = field(default_factory=Problems)


def read(config: DataConfig, section: str = "data") -> Loaded:
    """All rows of a data set, in its order, the broken ones told apart.

    The user's message is `template` filled from the row's columns. Columns other than question, answer, id and task
    become `fields`; when the template changes the question, the bare one is kept as the field `prompt`.
    Raises DataError for what concerns all rows: a missing file, a file that is none of its kind.
    """
    named = getattr(config, "path", None) or getattr(config, "name", "")
    loaded = Loaded(name=f"{config.kind} data {named!r}", section=section)
    first_with_id: dict[str, str] = {}
    for number, (place, row) in enumerate(itertools.islice(SOURCES[config.kind](config), config.limit)):
        try:
            if isinstance(row, DataError):
                raise row
            prompt = prompt_of(row, config, number=number, section=section)
            if prompt.id in first_with_id:
                raise DataError(
                    f"id {prompt.id!r} in column {config.id_column!r} is also that of {first_with_id[prompt.id]}"
                )
        except DataError as error:
            loaded.problems.add(place, str(error))
            continue
        first_with_id[prompt.id] = place
        loaded.prompts.append(prompt)
        loaded.places.append(place)
    return loaded


def settle(loaded: Loaded, on_bad_rows: str) -> list[Prompt]:
    """The prompts. Raises DataError for a data set without any, and for broken rows unless they are to be skipped."""
    problems = loaded.problems
    if problems.count and not loaded.prompts:
        raise DataError(f"{problems}; no row of {loaded.name} is left")
    if problems.count and on_bad_rows == "refuse":
        raise DataError(f"{problems}; mend what is wrong, or leave such rows out: {loaded.section}.on_bad_rows=skip")
    if not loaded.prompts:
        raise DataError(f"{loaded.name} has no rows")
    return loaded.prompts


def load_prompts(config: DataConfig) -> list[Prompt]:
    """All prompts of a data set, in its order; their place in the list is their row.

    Raises DataError as `read` and `settle` do. Whether their answers can be judged is not looked at here.
    """
    return settle(read(config), config.on_bad_rows)
