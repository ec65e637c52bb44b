"""Programs, HumanEval and MBPP style: run the response and its tests in an isolated process, or not at all.

Known limits: a program that defines objects equal to everything passes any `assert f(x) == y`. A program that walks the
frames of the process that runs it (`sys._getframe`) finds the secret that marks success, and can report it without any
test having run: the sandbox bounds what a program can do, but a verdict is no proof against a policy that learns this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deltal.errors import DataError
from deltal.verify.sandbox.pool import run_program
from deltal.verify.tasks.answers import Finding, final_part, needed

FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
LONGEST = 100_000
"""Characters of a program."""


def code(answer: str, fields: Mapping[str, Any], text: str, *, timeout: float, memory_mib: int) -> Finding:
    """The program passes its tests within `timeout` seconds and `memory_mib` MiB.

    Fields, HumanEval style: `prompt` (signature and docstring), `test`, `entry_point`; MBPP style: `tests` (list of
    statements), `setup` (runs after the program, before the tests). The program is the last fenced block that defines
    a function, else the last fenced block, else the whole text. Reason `no sandbox`: nothing was run.
    Raises DataError as `code_gold` does.
    """
    code_gold(answer, fields)
    program = _program(final_part(text))
    if not program.strip():
        return Finding(False, None, "no answer")
    if len(program) > LONGEST:
        return Finding(False, program, "too long")
    if fields.get("test") is not None:
        parts = _humaneval(program, fields)
    else:
        parts = [program, str(fields.get("setup") or ""), "\n".join(map(str, fields["tests"]))]
    outcome = run_program(parts, timeout=timeout, memory_mib=memory_mib)
    return Finding(outcome == "passed", program, outcome)


def code_gold(answer: str, fields: Mapping[str, Any]) -> None:
    """Whether a row can be judged: it has its tests. The gold program is not run. Raises DataError."""
    if fields.get("test") is not None:
        if not isinstance(fields["test"], str):
            raise DataError("the field 'test' of a code prompt is no text")
        name = str(needed(fields, "entry_point", "code"))
        needed(fields, "prompt", "code")
        if not name.isidentifier():
            raise DataError(f"entry_point = {name!r} of a code prompt is no name")
    elif not fields.get("tests"):
        raise DataError("a prompt of task 'code' needs the field 'test' (HumanEval) or 'tests' (MBPP)")
    elif not isinstance(fields["tests"], list | tuple):
        raise DataError("the field 'tests' of a code prompt is no list of statements")


def _program(text: str) -> str:
    blocks = [match[1] for match in FENCE.finditer(text)]
    if not blocks:
        return text
    defining = [block for block in blocks if re.search(r"^\s*(?:async\s+)?def ", block, re.MULTILINE)]
    return (defining or blocks)[-1]


def _humaneval(program: str, fields: Mapping[str, Any]) -> list[str]:
    """The prompt's own imports and helpers first; a program without the function is the function's body."""
    prompt, name = str(fields["prompt"]), str(fields["entry_point"])
    tests = [str(fields["test"]), f"check({name})"]
    if re.search(rf"^(?:async\s+)?def\s+{name}\b", program, re.MULTILINE):
        return [prompt, program, *tests]
    first = next(line for line in program.splitlines() if line.strip())
    if not first[:1].isspace():
        program = "\n".join(f"    {line}" for line in program.splitlines())
    return [prompt + program, *tests]
