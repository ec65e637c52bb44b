"""CountDown: an equation that uses exactly the given numbers, once each, and reaches the target exactly.

Judged on the syntax tree with exact fractions: whole numbers, + - * / and brackets, nothing is ever evaluated by
Python. The published rule (regular expression and `eval`) takes `3.5*2` for 3, 5, 2 and never ends on `99**98**97`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from deltal.errors import DataError
from deltal.verify.tasks.answers import Finding, compared, final_part, last_box, last_line, last_tag, needed

LONGEST = 300
"""Characters of an expression; nesting is bounded by it too."""
LARGEST = 10**9
"""Numbers of a question are smaller; so is what is worth multiplying."""

OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
WRITTEN = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
# `[0-9]` only: Python reads other scripts' digits as numbers too.
ALLOWED = re.compile(r"[0-9+\-*/() ]*")


def countdown(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    r"""The expression in the last `<answer>…</answer>`, else in the last \boxed, else the last line, judged by rule.

    Of a last line, what stands after its last colon counts. Fields: `nums` (list of int) and `target` (int).
    An equation counts by the side that uses exactly the numbers; its other side must be the target as a number.
    """
    numbers, target = _question(fields)
    last = final_part(text)
    said = last_tag(last, "answer")
    if said is None:
        said = last_box(last)
    if said is None:
        said = last_line(last).rsplit(":")[-1].strip("`$*. ")
    if not said:
        return Finding(False, None, "no answer")
    sides = [side.strip() for side in _plain(said).split("=")]
    if len(sides) > 2:
        return Finding(False, said, "not an expression")
    results = [_uses_and_value(side) for side in sides]
    for place, result in enumerate(results):
        if result is None or result[0] != numbers:
            continue
        others = results[:place] + results[place + 1 :]
        if any(other is None or len(other[0]) != 1 or other[1] != target for other in others):
            return Finding(False, said, "other side is not the target")
        return compared(result[1] == target, said)
    understood = any(result is not None for result in results)
    return Finding(False, said, "wrong numbers" if understood else "not an expression")


def _question(fields: Mapping[str, Any]) -> tuple[list[int], int]:
    numbers, target = needed(fields, "nums", "countdown"), needed(fields, "target", "countdown")
    try:
        whole = [int(number) for number in numbers]
        is_exact = all(
            got == float(given) for got, given in zip([*whole, int(target)], [*numbers, target], strict=True)
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a countdown prompt has nums = {numbers!r}, target = {target!r}: {error}") from error
    if not whole or not is_exact:
        raise DataError(f"a countdown prompt has nums = {numbers!r}, target = {target!r}: whole numbers are wanted")
    return sorted(whole), int(target)


def _plain(said: str) -> str:
    for written, meant in WRITTEN.items():
        said = said.replace(written, meant)
    return said


def _uses_and_value(side: str) -> tuple[list[int], Fraction] | None:
    """Sorted numbers an expression uses and its value; None when it is none of ours or divides by zero."""
    if not side or len(side) > LONGEST or not ALLOWED.fullmatch(side):
        return None
    try:
        tree = ast.parse(side.strip(), mode="eval").body
        uses: list[int] = []
        value = _value(tree, uses)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return sorted(uses), value


def _value(node: ast.expr, uses: list[int]) -> Fraction:
    """Exact value of a node; its numbers are added to `uses`. Raises ValueError for anything not allowed."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, uses), _value(node.right, uses))
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= LARGEST:
        uses.append(node.value)
        return Fraction(node.value)
    raise ValueError("not an expression of whole numbers")
