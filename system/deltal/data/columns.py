"""From one row to one `Prompt`: which columns hold what, and what a value looks like as text.

All raise DataError with the bare reason; whoever reads the rows puts the place in front.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from deltal.config.data import DataColumns
from deltal.errors import DataError
from deltal.types import Message, Prompt

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
DEEPEST = 50
"""Levels of nesting of a value; what writes it down later gives up at some depth of its own."""
WIDEST = 2**63
"""Whole numbers from here on do not fit into the journal's 64 bits."""


def prompt_of(row: Row, config: DataColumns, *, number: int, section: str) -> Prompt:
    """The row's prompt; `number`: its id where it has none; `section`: the settings' own name, for messages.

    The question is text, from which `template` makes the user's message, or a list of messages, taken as they are.
    """
    for column, value in row.items():
        _refuse_unwritable(column, value, f"column {column!r}")
    answer = _text(row, config.answer_column)
    if config.task is None and row.get("task") is None:
        raise DataError(f"no column 'task', and {section}.task is not set; there are {_names(row)}")
    question, messages = _question(row, config)
    has_id = config.id_column is not None and _has(row, config.id_column)
    used = {config.prompt_column, config.answer_column, "task"} | ({config.id_column} if has_id else set())
    fields = {str(column): _json_value(value) for column, value in row.items() if column not in used}
    if question is not None and messages[-1].content != question:
        fields["prompt"] = question
    return Prompt(
        id=_text(row, config.id_column) if has_id and config.id_column is not None else str(number),
        task=config.task or _text(row, "task"),
        messages=messages,
        answer=answer,
        fields=fields,
    )


def written(value: Any) -> str:
    """A plain value as text: 72.0 as 72, 1e16 in digits, 0.1 as it is. Raises DataError for lists, bytes, infinity."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise DataError(f"holds {value}, which is no number")
        text = f"{Decimal(repr(value)) if isinstance(value, float) else value:f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(f"holds a {type(value).__name__}; text or a number was expected")
    return str(value)


def _at(row: Row, column: str) -> Any:
    """The value of a column, or below one: `reward_model.ground_truth`. Raises KeyError."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(column)
        value = value[part]
    return value


def _has(row: Row, column: str) -> bool:
    try:
        return _at(row, column) is not None
    except KeyError:
        return False


def _names(row: Row) -> str:
    """The columns there are; what lies below a nested one by its dotted name."""
    names: list[str] = []
    for column, value in row.items():
        names += [f"{column}.{inner}" for inner in value] if isinstance(value, Mapping) and value else [str(column)]
    return ", ".join(sorted(names))


def _value(row: Row, column: str) -> Any:
    """A column that must be there and not empty."""
    try:
        value = _at(row, column)
    except KeyError:
        raise DataError(f"no column {column!r}; there are {_names(row)}") from None
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise DataError(f"column {column!r} is empty")
    return value


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    try:
        return written(value)
    except DataError as error:
        raise DataError(f"column {column!r} {error}") from None


def _question(row: Row, config: DataColumns) -> tuple[str | None, tuple[Message, ...]]:
    """The bare question (None when it is a conversation) and the messages it makes."""
    value = _value(row, config.prompt_column)
    if isinstance(value, list):
        return None, _messages(value, config.prompt_column)
    question = _text(row, config.prompt_column)
    return question, (Message(role="user", content=_filled(config.template, row)),)


def _messages(value: list[Any], column: str) -> tuple[Message, ...]:
    made = []
    for place, message in enumerate(value):
        named = f"column {column!r}, message {place}"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(f"{named} is none of {{role, content}} with a role out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{named} has no text as its content")
        more = sorted(name for name, held in message.items() if name not in ("role", "content") and held)
        if more:
            raise DataError(f"{named} has {', '.join(more)} beside role and content, which no chat template would show")
        made.append(Message(role=message["role"], content=message["content"]))
    if made[-1].role != "user" or not made[-1].content.strip():
        raise DataError(f"column {column!r} does not end with a question of the user")
    return tuple(made)


class _ColumnFormatter(string.Formatter):
    """`str.format` with column names only: no attributes, no indices, no positions."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return _at(kwargs, field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"[0-9]{4}", format_spec):
            raise ValueError(f"the width {format_spec!r} would fill the memory")
        if format_spec or isinstance(value, list | tuple | dict):
            return super().format_field(value, format_spec)
        return written(value)


def _filled(template: str, row: Row) -> str:
    try:
        for _, column, _, _ in string.Formatter().parse(template):
            if column and _at(row, column) is None:
                raise DataError(f"template names {{{column}}}, which is empty in this row")
        return _ColumnFormatter().vformat(template, (), row)
    except KeyError as error:
        raise DataError(
            f"template names {{{error.args[0]}}}, which is no column; there are {_names(row)} "
            "(write {{ and }} for braces)"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"template {template!r} cannot be filled: {error}") from error


def _refuse_unwritable(column: str, value: Any, named: str, depth: int = 0) -> None:
    """What can be read from JSON but written nowhere: half a surrogate pair, and nesting without end."""
    for text in (column, value):
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = ord(text[error.start])
                raise DataError(
                    f"{named} holds \\u{half:04x}, half of a surrogate pair, which is no character: write the whole "
                    "pair, or take it out"
                ) from None
    if depth > DEEPEST:
        raise DataError(f"{named} is nested more than {DEEPEST} levels deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_unwritable(str(key), item, named, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_unwritable("", item, named, depth + 1)


def _json_value(value: Any) -> Any:
    """`value` in types that JSON and the journal hold: what is beyond them (dates, bytes, decimals, whole numbers of
    more than 64 bits) becomes its text, a number that is none becomes None.
    """
    if isinstance(value, int) and not isinstance(value, bool) and not -WIDEST <= value < WIDEST:
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return str(value)
