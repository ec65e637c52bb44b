"""Items of reasoning-gym as rows, and back: what its scoring functions need travels as JSON.

Some of its tasks compare tuples, which JSON would turn into lists: they are written as `{"__tuple__": [...]}`. Whole
numbers of more than 64 bits, which the journal does not hold, are written as `{"__integer__": "..."}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltal.config import ReasoningGymData
from deltal.errors import DataError

TUPLE, INTEGER = "__tuple__", "__integer__"

BY_RULE = "(judged by rule)"
"""Stands for the gold answer of tasks that have none, e.g. rush_hour."""


def reasoning_rows(config: ReasoningGymData) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and rows of `config`: `id`, `task`, `prompt`, `answer`, `name` and `entry` (for `entry_from_json`).

    Raises DataError for an unknown task (with the nearest known) or parameters the task refuses.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if config.name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(config.name, DATASETS, n=1, cutoff=0.0)[0]
        raise DataError(f"reasoning_gym has no task {config.name!r}; the nearest is {near!r}")
    try:
        items = reasoning_gym.create_dataset(config.name, size=config.size, seed=config.seed, **config.parameters)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"reasoning_gym task {config.name!r} refuses its parameters: {error}") from error
    for index in range(config.size):
        entry = items[index]
        id = f"{config.name}/{config.seed}/{index}"
        yield (
            f"reasoning_gym {id}",
            {
                "id": id,
                "task": "reasoning_gym",
                "prompt": entry["question"],
                "answer": str(entry["answer"] or BY_RULE),
                "name": config.name,
                "entry": entry_to_json(entry),
            },
        )


def entry_to_json(value: Any) -> Any:
    """`value` in JSON's types alone; tuples and large whole numbers are marked, anything foreign becomes its text."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return {INTEGER: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): entry_to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [entry_to_json(item) for item in value]}
    if isinstance(value, list):
        return [entry_to_json(item) for item in value]
    return str(value)


def entry_from_json(value: Any) -> Any:
    """The inverse of `entry_to_json`, tuples included."""
    if isinstance(value, Mapping):
        if set(value) == {TUPLE}:
            return tuple(entry_from_json(item) for item in value[TUPLE])
        if set(value) == {INTEGER}:
            return int(value[INTEGER])
        return {key: entry_from_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [entry_from_json(item) for item in value]
    return value
