"""What a response says its answer is: the part after its thoughts, its boxes and tags, the numbers in it.

Every search is linear in the text: a response is hostile and may be long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from deltal.errors import DataError

DIGITS = 200
"""Longer numbers are nobody's answer, and Python refuses to read them from 4,300 digits on."""

THINK_START, THINK_END = "<think>", "</think>"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

# A minus after a digit, a letter or a bracket is a hyphen, a range or a subtraction, not a sign.
_SIGN = r"(?:(?<![\w)\]}])-)?"
_THOUSANDS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?!,[0-9])"
PLAIN_NUMBER = re.compile(rf"{_SIGN}(?<![0-9.])[0-9]+(?:\.[0-9]+)?")
NUMBER = re.compile(rf"{_SIGN}(?<![0-9.])(?:{_THOUSANDS}|[0-9]+)(?:\.[0-9]+)?")


class Finding(NamedTuple):
    """What a verifier found, before it becomes a `Verdict`."""

    correct: bool
    parsed: str | None
    """The answer it understood."""
    reason: str


def compared(correct: bool, parsed: str) -> Finding:
    """The finding of a plain comparison."""
    return Finding(correct, parsed, "equal" if correct else "different")


def final_part(text: str) -> str:
    """The response after its thoughts. Thoughts that were begun and never ended leave nothing.

    The opening tag may stand in the prompt's prefill, so a closing tag alone ends the thoughts too.
    """
    if THINK_END in text:
        text = text[text.rindex(THINK_END) + len(THINK_END) :]
    return text[: text.index(THINK_START)] if THINK_START in text else text


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{…} or \fbox{…}; None when there is none, "" when the last one is never closed."""
    start = None
    for match in BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, place = 1, start
    while place < len(text):
        sign = text[place]
        if sign == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            return text[start:place].strip()
        place += 1
    return ""


def last_tag(text: str, tag: str) -> str | None:
    """Content of the last `<tag>…</tag>`, None when there is none."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return text[start + len(opening) : end].strip() if start >= 0 else None


def last_line(text: str) -> str:
    """The last line that is not empty, or ""."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def number_value(number: str) -> Fraction | None:
    """Exact value of a decimal number as written, thousands commas stripped; None when it is no number."""
    plain = number.replace(",", "").strip()
    if len(plain) > DIGITS or not re.fullmatch(r"[+-]?[0-9]+(?:\.[0-9]+)?", plain):
        return None
    return Fraction(plain)


GOLD_NUMBER = re.compile(rf"\s*\$?\s*([+-]?(?:{_THOUSANDS}|[0-9]+)(?:\.[0-9]+)?)\s*")


def gold_number(answer: str, task: str) -> Fraction:
    """A gold answer that is one number, maybe with a dollar sign and commas every three digits.

    Raises DataError for anything else: "2,5" could be two and a half, or two numbers.
    """
    found = GOLD_NUMBER.fullmatch(answer)
    value = number_value(found[1]) if found else None
    if value is None:
        raise DataError(f"the answer {shortened(answer)} of a {task} prompt is no number")
    return value


def shortened(text: str) -> str:
    """A text as a message quotes it: its last 60 characters at most."""
    return repr(text if len(text) <= 60 else "…" + text[-60:])


def needed(fields: Mapping[str, Any], name: str, task: str) -> Any:
    """A field the task cannot be judged without. Raises DataError that names both."""
    if fields.get(name) is None:
        raise DataError(f"a prompt of task {task!r} needs the field {name!r}")
    return fields[name]
