"""Answers that are one number: `largest` and `gsm8k`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from deltal.verify.tasks.answers import (
    DIGITS,
    NUMBER,
    PLAIN_NUMBER,
    Finding,
    compared,
    final_part,
    gold_number,
    last_box,
    number_value,
)

GSM8K_MARK = re.compile(r"####\s*\$?\s*([+-]?[0-9][0-9,]{0,200}(?:\.[0-9]+)?)")
FRACTION = re.compile(r"\s*([+-]?[0-9]+)\s*/\s*([0-9]+)\s*")


def largest(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    """The last number in the text is the answer. Commas separate here: "13,12,11" are three numbers."""
    gold = gold_number(answer, "largest")
    numbers = PLAIN_NUMBER.findall(final_part(text))
    if not numbers:
        return Finding(False, None, "no answer")
    return compared(number_value(numbers[-1]) == gold, numbers[-1])


def gsm8k(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    r"""The number after the last `####`, else in the last \boxed{…}, else the last number of the text; exact.

    Thousands commas are stripped. A fraction counts in a box only ("1/2"). The gold answer is one number, or a worked
    solution that ends in `#### 72`, as GSM8K publishes them.
    """
    gold = gold_number(answer.rpartition("####")[2], "gsm8k")
    said = _said(final_part(text))
    if said is None:
        return Finding(False, None, "no answer")
    return compared(_value(said) == gold, said)


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
        return number_value(said)
    if len(said) > DIGITS or int(parts[2]) == 0:
        return None
    return Fraction(int(parts[1]), int(parts[2]))
