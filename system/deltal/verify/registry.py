"""The one place where a task's name meets its verifier.

A new verifier is one function `(answer, fields, text) -> Finding` in one file and one line in `VERIFIERS`. The
docstring of the function is its rule in docs/verifiers.md.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import importlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltal.errors import DataError
from deltal.types import Prompt, Response, Verdict
from deltal.verify.sandbox.isolation import is_sandboxed
from deltal.verify.sandbox.messages import request_fields
from deltal.verify.sandbox.pool import SandboxPool
from deltal.verify.tasks.answers import Finding
from deltal.verify.tasks.code import code, code_gold
from deltal.verify.tasks.countdown import countdown
from deltal.verify.tasks.exact import exact
from deltal.verify.tasks.letters import letters
from deltal.verify.tasks.math import PLAIN_GOLD, math, math_gold
from deltal.verify.tasks.numbers import gsm8k, largest
from deltal.verify.tasks.reasoning import reasoning_gold, reasoning_gym

Judge = Callable[[str, Mapping[str, Any], str], Finding]
Gold = Callable[[str, Mapping[str, Any]], None]

PARSED_CHARACTERS = 500
"""What a verdict keeps of the parsed answer: a response may be long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verifier:
    """How a task is judged."""

    judge: Judge
    """`(answer, fields, text) -> Finding`."""
    answer: str = ""
    """What a gold answer holds, in a few words."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Columns of a row that it reads beside the answer, and what each holds."""
    gold: Gold | None = None
    """`(answer, fields)`, raises DataError when no response to such a prompt could be judged, and never runs what the
    row says. None: the answer is judged as a response to itself, which raises where the prompt is at fault."""
    gold_in_sandbox: bool = False
    """`gold` itself may hang, or eat memory."""
    plain: re.Pattern[str] | None = None
    """Answers of this form need no check: it spares a process thousands of plain numbers. Where there is one, `gold`
    looks at the answer alone."""
    library: str | None = None
    """Imported before the clock of an item starts."""
    in_sandbox: bool = False
    """Only ever judged in a sandboxed process: it may run without end, or eat memory."""
    evaluates_text: bool = False
    """It may execute what the response says: a fork of the sandboxed process for every item."""

    def prepare(self) -> None:
        """Import what the judge needs."""
        if self.library is not None:
            importlib.import_module(self.library)


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier(judge=exact, answer="a word, name or phrase"),
    "gsm8k": Verifier(judge=gsm8k, answer="a number, or a solution that ends in `#### 72`"),
    "math": Verifier(
        judge=math,
        answer="a formula in LaTeX, a number, or words",
        gold=math_gold,
        gold_in_sandbox=True,
        plain=PLAIN_GOLD,
        library="math_verify",
        in_sandbox=True,
    ),
    "countdown": Verifier(
        judge=countdown,
        answer="one solution, for people; any is right",
        fields={"nums": "list of the whole numbers to use", "target": "whole number to reach"},
    ),
    "code": Verifier(
        judge=functools.wraps(code)(lambda answer, fields, text: code(answer, fields, text, **_limits)),
        answer="a program, for people; it is not run",
        gold=code_gold,
        fields={
            "test": "HumanEval: a program that defines `check`",
            "entry_point": "HumanEval: the function's name",
            "tests": "MBPP: list of statements",
            "setup": "MBPP, may be missing: runs after the program and before the tests",
        },
    ),
    "reasoning_gym": Verifier(
        judge=reasoning_gym,
        answer="as reasoning-gym gives it",
        gold=reasoning_gold,
        fields={"name": "the task in reasoning-gym", "entry": "its item, as data.kind=reasoning_gym writes it"},
        library="reasoning_gym",
        in_sandbox=True,
        evaluates_text=True,
    ),
    "largest": Verifier(judge=largest, answer="a number"),
    "letters": Verifier(judge=letters, answer="letters, each of which is right"),
}

_limits: dict[str, Any] = {"timeout": 10.0, "memory_mib": 1024}


def set_limits(*, timeout: float, memory_mib: int) -> None:
    """What a program of the task `code` may use: seconds (a little less, so that it ends before us) and MiB."""
    _limits.update(timeout=0.9 * timeout, memory_mib=memory_mib)


def find(task: str) -> Verifier:
    """The verifier of a task. Raises DataError that names the nearest known task."""
    if task not in VERIFIERS:
        near = difflib.get_close_matches(str(task), VERIFIERS, n=1, cutoff=0.0)[0]
        raise DataError(f"no verifier for task {task!r}; the nearest is {near!r} of {', '.join(VERIFIERS)}")
    return VERIFIERS[task]


def judge(task: str, answer: str, fields: Mapping[str, Any], text: str) -> Verdict:
    """Judge in this process. Reward 1 or 0; a verifier that breaks on a response makes it wrong, with the reason.

    Raises DataError for an unknown task, and for a prompt that lacks what its task needs.
    """
    started = time.perf_counter()
    try:
        finding = find(task).judge(answer, fields, text)
    except DataError:
        raise
    except MemoryError:
        finding = Finding(correct=False, parsed=None, reason="memory")
    except Exception as error:  # whatever a hostile text provokes in a library
        finding = Finding(correct=False, parsed=None, reason=f"error: {type(error).__name__}")
    parsed = None if finding.parsed is None else finding.parsed[:PARSED_CHARACTERS]
    return Verdict(
        reward=float(finding.correct),
        correct=finding.correct,
        parsed=parsed,
        reason=finding.reason,
        seconds=time.perf_counter() - started,
    )


def check_gold(task: str, answer: str, fields: Mapping[str, Any]) -> None:
    """Whether responses to a prompt can be judged, in this process. Raises DataError when not."""
    verifier = find(task)
    if verifier.gold is not None:
        verifier.gold(answer, fields)
        return
    try:
        verifier.judge(answer, fields, answer)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the verifier of {task!r} fails on the row itself: {type(error).__name__}") from error


def gold_faults(prompts: Sequence[Prompt], pool: SandboxPool) -> dict[int, str]:
    """Place of each prompt that no response could be judged by, and why. `pool` is asked where a task demands it."""
    faults: dict[int, str] = {}
    asked: list[int] = []
    for place, prompt in enumerate(prompts):
        try:
            verifier = find(prompt.task)
            if verifier.plain is not None and verifier.plain.fullmatch(prompt.answer):
                continue
            if verifier.gold_in_sandbox if verifier.gold else verifier.in_sandbox:
                asked.append(place)
            else:
                check_gold(prompt.task, prompt.answer, request_fields(prompt))
        except DataError as error:
            faults[place] = str(error)
    return faults | _faults_by_sandbox(prompts, asked, pool)


def _faults_by_sandbox(prompts: Sequence[Prompt], places: list[int], pool: SandboxPool) -> dict[int, str]:
    """Faults of the prompts at `places`; each answer is asked once where it is all that counts."""
    asked: dict[Any, int] = {}
    alike = {}
    for place in places:
        prompt = prompts[place]
        alike[place] = (
            place if find(prompt.task).plain is None else asked.setdefault((prompt.task, prompt.answer), place)
        )
    first = sorted(set(alike.values()))
    why = dict(zip(first, pool.check_many([prompts[place] for place in first]), strict=True))
    return {place: reason for place, same in alike.items() if (reason := why[same]) is not None}


def verify(prompt: Prompt | Mapping[str, Any], response: Response | str) -> Verdict:
    """Judge one response.

    `prompt`: a `Prompt`, or a mapping with `task`, `answer` and the task's fields; `response`: a `Response` or its
    text. Tasks that may hang or evaluate text are judged in a sandboxed process with 10 s and 1,024 MiB, started at the
    first such call and kept. Raises DataError for an unknown task or a prompt that lacks what its task needs.
    """
    asked = prompt if isinstance(prompt, Prompt) else _as_prompt(prompt)
    text = response if isinstance(response, str) else response.text
    if find(asked.task).in_sandbox and not is_sandboxed():
        with _pool_lock:
            return _own_pool().verify_many([(asked, text)])[0]
    return judge(asked.task, asked.answer, request_fields(asked), text)


_pool_lock = threading.Lock()


@functools.cache
def _own_pool() -> SandboxPool:
    pool = SandboxPool(processes=1, timeout=10.0, memory_mib=1024)
    atexit.register(pool.close)
    return pool


def _as_prompt(given: Mapping[str, Any]) -> Prompt:
    missing = [name for name in ("task", "answer") if given.get(name) is None]
    if missing:
        raise DataError(f"a prompt without {' and '.join(missing)} cannot be verified")
    from deltal.data.columns import written  # Here only: a sandboxed process does without what this file needs.

    fields = {name: value for name, value in given.items() if name not in ("id", "task", "answer")}
    try:
        answer = written(given["answer"])
    except DataError as error:
        raise DataError(f"the answer of a prompt {error}") from None
    return Prompt(id=str(given.get("id", "")), task=str(given["task"]), messages=(), answer=answer, fields=fields)
