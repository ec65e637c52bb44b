r"""MATH-style answers: the last \boxed of a response against the gold answer, by math-verify with guards before it.

The guards take away what math-verify is known to get wrong: rounded decimals, units it ignores, ratios it divides,
brackets never closed, and a few ways of writing numbers. Judged in a sandboxed process only: it has no clock here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from deltal.errors import DataError
from deltal.verify.tasks.answers import Finding, compared, final_part, last_box, shortened
from deltal.verify.tasks.exact import exact

LONGEST = 1000
"""Characters of an answer; the longest gold answer of MATH has 160."""
ROUNDING = 12
"""Decimal places compared: with math-verify's own 6, 0.333333 would be 1/3."""

# Spaces as thousands separators, only where the whole answer is such a number.
SPACED_NUMBER = re.compile(r"[+-]?[0-9]{1,3}(?:(?:\\[,;: !]|[ ~]|\{,\})[0-9]{3})+(?:\.[0-9]+)?")
SEPARATOR = re.compile(r"\\[,;: !]|[ ~]|\{,\}")
SCIENTIFIC = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})")
RATIO = re.compile(r"[0-9]\s*:\s*[0-9]")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
COMMAND = re.compile(r"\\[A-Za-z]+")
UNIT = re.compile(r"\\(?:text|mathrm|textrm)\s*\{\s*([A-Za-z. ]+?)\s*\}\s*(?:\^\s*\{?\s*([0-9])\s*\}?)?\s*$")
# A number as base and exponent of an exponent, or a factorial of one that fills the memory.
TOWER = re.compile(r"\^\s*\{?\s*\(?\s*[0-9]+\s*\)?\s*\^|[0-9]{5,}\s*\)?\s*!|!\s*!|\^\s*\{?\s*[0-9]{5,}")

UNITS = {
    "mm": "millimeter millimeters",
    "cm": "centimeter centimeters",
    "m": "meter meters",
    "km": "kilometer kilometers",
    "in": "inch inches",
    "ft": "foot feet",
    "mi": "mile miles",
    "s": "sec second seconds",
    "min": "minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "g": "gram grams",
    "kg": "kilogram kilograms",
}
# A product of variables is rarely longer than two letters and nobody's word; `\text` says itself what it is.
WORDS = re.compile(
    r"\\text(?:bf|it|rm)?\s*\{[^{}\\$0-9^]*[^\W\d_][^{}\\$0-9^]*\}"
    r"|(?!.*\b(?:sin|cos|tan|cot|sec|csc|log|exp|inf|infinity|infty|sqrt)\b)"
    r"[^\W\d_]{3,}(?: [^\W\d_]+|-[^\W\d_]{2,})*\.?"
)
PLAIN_GOLD = re.compile(
    r"\s*(?:-?(?:[0-9]{1,12}(?:\.[0-9]{1,12})?(?:\\%|\^\{?\\circ\}?)?|[0-9]{1,3}(?:,(?:\\!)?[0-9]{3})+"
    r"|\\d?frac\{?[0-9]{1,6}\}?\{[1-9][0-9]{0,5}\}|[0-9]{0,6}(?:\\pi|\\sqrt\{[0-9]{1,6}\}))"
    r"|\(-?[0-9]{1,6}(?:, ?-?[0-9]{1,6})+\))\s*"
)
"""Gold answers that are read without asking: whole numbers, decimals, fractions, roots, multiples of π, points."""

UNIT_NAMES = {name: unit for unit, names in UNITS.items() for name in (unit, *names.split())}


def math(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    r"""The last \boxed{…} after the thoughts equals the answer; without any box the whole text is searched.

    A box that is never closed is no answer, one inside thoughts that never end neither. A gold answer of words (`even`,
    `\text{two lines}`) is no algebra, and compared as `exact` does.
    """
    if is_words(answer):
        return exact(answer, fields, text)
    said, boxed = final_part(text), last_box(final_part(text))
    if boxed is not None:
        said = boxed
    if not said.strip():
        return Finding(False, None, "no answer")
    if boxed is not None and said.strip() == answer.strip():
        return compared(_balanced(said), said)
    if boxed is not None and (refusal := _refusal(answer, said)) is not None:
        return Finding(False, said, refusal)
    if TOWER.search(said) or TOWER.search(answer):
        return Finding(False, said, "too large")
    return _by_math_verify(_written_out(answer), _written_out(said), boxed is not None, said)


def is_words(answer: str) -> bool:
    """Whether a gold answer is words and not a product of variables: \text{…}, or three letters and more in a row."""
    return WORDS.fullmatch(answer.strip()) is not None


def math_gold(answer: str, fields: Mapping[str, Any]) -> None:
    """Whether a gold answer can be read. Raises DataError; in a sandboxed process only, like `math` itself."""
    if is_words(answer):
        return
    if len(answer) > LONGEST:
        raise DataError(f"the answer {shortened(answer)} of a math prompt has more than {LONGEST} characters")
    if TOWER.search(answer):
        raise DataError(f"the answer {shortened(answer)} of a math prompt is too large to compute with")
    if not _balanced(answer):
        raise DataError(f"the answer {shortened(answer)} of a math prompt has a brace that is never closed")
    # What math-verify reads as mere text (`43_5.`) is still compared letter by letter.
    if not any(sign.isalnum() for sign in answer) or not _parsed(_written_out(answer)):
        raise DataError(f"the answer {shortened(answer)} of a math prompt is no formula that math-verify can read")


def _refusal(answer: str, said: str) -> str | None:
    """Why math-verify need not be asked, or must not."""
    if len(said) > LONGEST:
        return "too long"
    if not (_balanced(said) and _balanced(answer)):
        return "unclosed bracket"
    if bool(RATIO.search(said)) != bool(RATIO.search(answer)):
        return "ratio against number"
    listed, wanted = _listed(said), _listed(answer)
    if len(listed) != len(wanted) and len(set(listed)) < len(listed):
        return "repeated answer"
    units = _unit(answer), _unit(said)
    if None not in units and units[0] != units[1]:
        return "other unit"
    return None


def _balanced(text: str) -> bool:
    depth = 0
    for sign in re.sub(r"\\.", "", text, flags=re.DOTALL):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            return False
    return depth == 0


def _listed(text: str) -> list[str]:
    """What stands between commas that are no thousands separators."""
    return [part.strip() for part in THOUSANDS.sub("", text).split(",")]


def _sides(text: str) -> tuple[str, str] | None:
    """Both sides of an equation between numbers; None for anything else, `x = 4` too."""
    sides = text.split("=")
    if len(sides) != 2 or not all(side.strip() for side in sides) or re.search("[A-Za-z]", COMMAND.sub("", text)):
        return None
    return sides[0], sides[1]


def _unit(text: str) -> tuple[str, str] | None:
    """Unit and its power at the end of an answer, if it is one of a table."""
    found = UNIT.search(text.strip().rstrip("$."))
    name = UNIT_NAMES.get(found[1].strip(" .").lower()) if found else None
    return (name, found[2] or "1") if found and name else None


def _written_out(text: str) -> str:
    """Numbers that math-verify would misread, in digits."""
    plain = _once_bracketed(text.strip())
    if SPACED_NUMBER.fullmatch(plain):
        return SEPARATOR.sub("", plain)
    scientific = SCIENTIFIC.fullmatch(plain)
    return rf"{scientific[1]} \times 10^{{{scientific[2]}}}" if scientific else plain


def _once_bracketed(text: str) -> str:
    """((x)) as (x): the parser's time grows steeply with nesting."""
    more = min(len(text) - len(text.lstrip("(")), len(text) - len(text.rstrip(")"))) - 1
    inner = text[more : len(text) - more] if more > 0 else text
    depth = 0
    for place, sign in enumerate(inner):
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if depth <= 0 and place < len(inner) - 1:
            return text  # the outermost brackets are no pair, as in ((1,2),(3,4))
    return inner


def _by_math_verify(answer: str, said: str, boxed: bool, parsed: str) -> Finding:
    from math_verify import verify

    gold = _parsed(answer)
    if not gold:
        return Finding(False, parsed, "gold answer not understood")
    found = _parsed(said, boxed=boxed)
    if not found:
        return Finding(False, parsed if boxed else None, "not understood" if boxed else "no answer")
    equal = verify(gold, found, float_rounding=ROUNDING, allow_set_relation_comp=True, timeout_seconds=None)
    sides = _sides(said) if boxed and equal and "=" not in answer else None
    if sides is not None:
        left, right = (_parsed(side) for side in sides)
        if not verify(left, right, float_rounding=ROUNDING, timeout_seconds=None):
            return Finding(False, parsed, "equation that does not hold")
    return compared(bool(equal), parsed if boxed else str(found[-1]))


def _parsed(text: str, *, boxed: bool = True) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # It warns at every call that its own clock is off; ours is the sandbox's, which also ends what holds the GIL.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    ways = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return list(parse(rf"\boxed{{{text}}}" if boxed else text, ways, parsing_timeout=None))
