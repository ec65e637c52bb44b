"""Answers that are one number: `largest` and `gsm8k`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from deltal.errors import DataError
from deltal.verify.tasks.answers import DIGITS, NUMBER, PLAIN_NUMBER, Finding, compared, exact, final_part, last_box

GSM8K_MARK = re.compile(r"####\s*\$?\s*([+-]?[0-9][0-9,]{0,200}(?:\.[0-9]+)?)")
FRACTION = re.compile(r"\s*([+-]?[0-9]+)\s*/\s*([0-9]+)\s*")


def largest(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    """The last number in the text is the answer. Commas separate here: "13,12,11" are three numbers."""
    numbers = PLAIN_NUMBER.findall(final_part(text))
    if not numbers:
        return Finding(False, None, "no answer")
    return compared(exact(numbers[-1]) == _gold(answer, "largest"), numbers[-1])


def gsm8k(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    r"""The number after the last `####`, else in the last \boxed{…}, else the last number of the text; exact.

    Thousands commas are stripped. A fraction counts in a box only ("1/2").
    """
    said = _said(final_part(text))
    if said is None:
        return Finding(False, None, "no answer")
    return compared(_value(said) == _gold(answer, "gsm8k"), said)


def _said(text: str) -> str | None:
    marked = GSM8K_MARK.findall(text)
    if marked:
        return str(marked[-1]).rstrip(",")
    box = last_box(text)
    if box is not None:
        plain = box.replace(r"\!", "").replace("{,}", ",").replace(r"\$", "").replace("$", "")
        if FRACTION.fullmatch(plain):
            return plain.strip()
        text = plain
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _value(said: str) -> Fraction | None:
    parts = FRACTION.fullmatch(said)
    if parts is None:
        return exact(said)
    if len(said) > DIGITS or int(parts[2]) == 0:
        return None
    return Fraction(int(parts[1]), int(parts[2]))


def _gold(answer: str, task: str) -> Fraction:
    value = exact(answer)
    if value is None:
        raise DataError(f"the answer {answer!r} of a {task} prompt is no number")
    return value
