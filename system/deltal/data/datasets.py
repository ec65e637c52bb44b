"""Data sets to prompts: every kind of source becomes rows, every row one `Prompt`.

A new kind of source is one function `settings -> rows` and one line in `SOURCES`.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deltal.config import DataConfig
from deltal.data.generated import generated_rows
from deltal.data.reasoning import reasoning_rows
from deltal.data.sources import hf_rows, jsonl_rows, parquet_rows
from deltal.errors import DataError
from deltal.types import Message, Prompt

Row = Mapping[str, Any]

SOURCES: dict[str, Callable[[Any], Iterator[Row]]] = {
    "jsonl": jsonl_rows,
    "parquet": parquet_rows,
    "hf": hf_rows,
    "reasoning_gym": reasoning_rows,
    "generated": generated_rows,
}


def load_prompts(config: DataConfig) -> list[Prompt]:
    """All prompts of a data set, in its order; their place in the list is their row.

    The user's message is `template` filled from the row's columns. Columns other than question, answer, id and task
    become `fields`; when the template changes the question, the bare one is kept as the field `prompt`.
    Raises DataError, naming row and column, for a missing file, a broken line, a missing column, an empty question or
    answer, an unknown placeholder, an id that appears twice, and a data set without rows.
    """
    name = _name(config)
    prompts: list[Prompt] = []
    first_with_id: dict[str, int] = {}
    for number, row in enumerate(itertools.islice(SOURCES[config.kind](config), config.limit)):
        prompt = _prompt(row, config, number, f"{name}, row {number}")
        if prompt.id in first_with_id:
            raise DataError(
                f"{name}, row {number}: id {prompt.id!r} in column {config.id_column!r} is also that of row "
                f"{first_with_id[prompt.id]}"
            )
        first_with_id[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{name} has no rows")
    return prompts


def _name(config: DataConfig) -> str:
    """What an error message calls the data set."""
    named = getattr(config, "path", None) or getattr(config, "name", "")
    return f"{config.kind} data {named!r}"


def _prompt(row: Row, config: DataConfig, number: int, place: str) -> Prompt:
    question = _text(row, config.prompt_column, place)
    answer = _text(row, config.answer_column, place)
    has_id = config.id_column is not None and row.get(config.id_column) is not None
    task = config.task or _text(row, "task", f"{place} (and data.task is not set)")
    message = _filled(config.template, row, place)
    used = {config.prompt_column, config.answer_column, "task"} | ({config.id_column} if has_id else set())
    fields = {str(column): _json_value(value) for column, value in row.items() if column not in used}
    if message != question:
        fields["prompt"] = question
    return Prompt(
        id=str(row[config.id_column]) if has_id and config.id_column is not None else str(number),
        task=task,
        messages=(Message(role="user", content=message),),
        answer=answer,
        fields=fields,
    )


def _text(row: Row, column: str, place: str) -> str:
    """The row's text in a column that must be there and not empty."""
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; there are {', '.join(sorted(map(str, row)))}")
    value = row[column]
    if value is None or not str(value).strip():
        raise DataError(f"{place}: column {column!r} is empty")
    if isinstance(value, list | dict | bytes):
        raise DataError(f"{place}: column {column!r} holds a {type(value).__name__}; text or a number was expected")
    return str(value)


class _ColumnFormatter(string.Formatter):
    """`str.format` with column names only: no attributes, no indices, no positions."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        if field_name not in kwargs:
            raise KeyError(field_name)
        return kwargs[field_name], field_name


def _filled(template: str, row: Row, place: str) -> str:
    try:
        return _ColumnFormatter().vformat(template, (), row)
    except KeyError as error:
        columns = ", ".join(sorted(map(str, row)))
        raise DataError(
            f"{place}: template names {{{error.args[0]}}}, which is no column; there are {columns} "
            "(write {{ and }} for braces)"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{place}: template {template!r} cannot be filled: {error}") from error


def _json_value(value: Any) -> Any:
    """`value` in JSON's types: what a file holds beyond them (dates, bytes, decimals) becomes its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return str(value)
