"""docs/verifiers.md, written from the registry: `python -m deltal.verify.page > docs/verifiers.md`."""

from __future__ import annotations

import inspect
import re
import sys

from deltal.verify.registry import VERIFIERS, Verifier

HEAD = """# Verifiers

What `task` may be, in a row or in the settings, and how a response is judged then. Written from the registry by
`make docs`; the rules are the verifiers' own docstrings. How rows look: [Your own data](your-own-data.md). How to add a
verifier: [Contributing](../CONTRIBUTING.md#add-a-verifier).

A response gets reward 1 or 0. What it says inside `<think>…</think>` counts for nothing, and thoughts that never end
leave no answer. Every row's gold answer and fields are looked at before a run starts. To try a rule:

    .venv/bin/python -c 'from deltal.verify import verify
    print(verify({"task": "exact", "answer": "Paris"}, "The answer is: paris."))'
"""


def page() -> str:
    """The page, whole."""
    table = ["| task | gold answer | fields |", "|---|---|---|"]
    table += [f"| [`{task}`](#{task}) | {how.answer or 'text'} | {_fields(how)} |" for task, how in VERIFIERS.items()]
    parts = [f"## {task}\n\n{rule(how)}\n" for task, how in VERIFIERS.items()]
    return "\n".join([HEAD, "\n".join(table), "", *parts])


def rule(verifier: Verifier) -> str:
    """How a verifier judges: its docstring, without what it raises."""
    said = inspect.cleandoc(verifier.judge.__doc__ or "")
    return re.sub(r"\s*\bRaises [^\n]*(?:\n(?!\n)[^\n]*)*", "", said)


def _fields(verifier: Verifier) -> str:
    return "<br>".join(f"`{name}`: {what}" for name, what in verifier.fields.items()) or "–"


if __name__ == "__main__":
    sys.stdout.write(page())
