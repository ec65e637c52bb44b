"""Tasks of reasoning-gym, judged by their own scoring functions, 1 for a perfect score and 0 for anything less.

Some of these functions hand the model's text to `eval` or sympy's parser (countdown, puzzle24, n_queens, …): this file
refuses to work outside of a sandboxed process, and refuses text that would do more than arithmetic there.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from deltal.errors import DataError
from deltal.verify.sandbox.isolation import is_sandboxed
from deltal.verify.tasks.answers import NUMBER, Finding, final_part, last_box, last_line, last_tag, needed

LONGEST = 20_000
"""Characters of an answer handed to a scoring function."""
REACHING = re.compile(
    r"\b(?:exec|eval|compile|open|import|importlib|getattr|setattr|globals|locals|vars|dir|type|breakpoint|input|lambda|"
    r"builtins|sys|os|subprocess)\b"
)
FRAMES = re.compile(r"\b\w+_frame\b|\bf_(?:back|locals|globals|builtins|code)\b")
PERFECT = 1.0 - 1e-9


def reasoning_gym(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    r"""The task's score is 1. Fields: `name` of the task and its `entry`, as `data/reasoning.py` writes them.

    What is scored: the last `<answer>…</answer>`, else the last \boxed, else for a numeric answer the last number,
    else the whole text after the thoughts if the answer has several lines, and its last line if not.
    Raises RuntimeError outside of a sandboxed process, DataError for a prompt without name or entry.
    """
    if not is_sandboxed():
        raise RuntimeError("reasoning-gym evaluates the model's text: only a sandboxed process may score it")
    from reasoning_gym import get_score_answer_fn

    from deltal.data.reasoning import entry_from_json

    name, entry = needed(fields, "name", "reasoning_gym"), needed(fields, "entry", "reasoning_gym")
    said = _said(answer, final_part(text))
    if not said:
        return Finding(False, None, "no answer")
    if len(said) > LONGEST:
        return Finding(False, said, "too long")
    if _reaches_out(said):
        return Finding(False, said, "hostile")
    try:
        score = get_score_answer_fn(name)
    except ValueError as error:
        raise DataError(f"reasoning_gym has no task {name!r}") from error
    value = float(score(said, entry_from_json(entry)))
    correct = math.isfinite(value) and value >= PERFECT
    return Finding(correct, said, "equal" if correct else "different")


def reasoning_gold(answer: str, fields: Mapping[str, Any]) -> None:
    """Whether a row can be scored: reasoning-gym has its task, and the entry is there. Raises DataError."""
    from reasoning_gym.factory import DATASETS

    name, entry = needed(fields, "name", "reasoning_gym"), needed(fields, "entry", "reasoning_gym")
    if name not in DATASETS:
        raise DataError(f"reasoning_gym has no task {name!r}")
    if not isinstance(entry, Mapping):
        raise DataError("the field 'entry' of a reasoning_gym prompt is no object")


def _reaches_out(said: str) -> bool:
    """Whether Python would find more than arithmetic in it: a scorer that evaluates it shares a process with its judge.

    Words alone are harmless and stand in answers of word tasks; what reaches out needs a call or a dunder too.
    """
    text = unicodedata.normalize("NFKC", said)  # As Python reads identifiers.
    return "__" in text or FRAMES.search(text) is not None or ("(" in text and REACHING.search(text) is not None)


def _said(answer: str, text: str) -> str:
    for marked in (last_tag(text, "answer"), last_box(text)):
        if marked is not None:
            return marked
    if re.fullmatch(r"[+-]?[0-9]+(?:\.[0-9]+)?", answer.strip()):
        numbers = NUMBER.findall(text)
        return str(numbers[-1]).replace(",", "") if numbers else ""
    return text.strip() if "\n" in answer.strip() else last_line(text)
