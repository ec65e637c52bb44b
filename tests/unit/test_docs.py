"""The pages for users: what is generated is up to date, and what they show works as it is written there."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from deltal.verify import verify
from deltal.verify.page import page, rule
from deltal.verify.registry import VERIFIERS
from deltal.verify.sandbox.pool import isolation_kind
from tests.launch import deltal

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    file: str
    text: str


BLOCKS = [Block(*match) for match in FENCE.findall((DOCS / "your-own-data.md").read_text(encoding="utf-8"))]


def test_the_page_of_verifiers_is_what_the_registry_says() -> None:
    assert (DOCS / "verifiers.md").read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_verifier_says_its_rule_and_what_it_reads() -> None:
    for task, verifier in VERIFIERS.items():
        assert len(rule(verifier)) > 40, task
        assert "Raises" not in rule(verifier)
        assert verifier.answer, task
        for name in verifier.fields:
            assert f"`{name}`" in page(), (task, name)


def test_the_examples_of_the_data_page_work_as_they_stand_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    commands = 0
    for block in BLOCKS:
        if block.language == "python":
            exec(compile(block.text, "your-own-data.md", "exec"), {})
        for line in block.text.splitlines() if block.language == "console" else ():
            prompt, program, *arguments = shlex.split(line)
            assert (prompt, program) == ("$", "deltal")
            result = deltal(*arguments)
            assert result.returncode == 0, line + result.stderr
            assert "is valid; nothing was started" in result.stdout
            assert f"rows left out: {1 if 'skip' in line else 0}" in result.stdout
            commands += 1
    assert commands == 3


@pytest.mark.skipif(isolation_kind() == "none", reason="this machine has neither bubblewrap nor namespaces")
def test_the_example_row_of_each_task_takes_its_gold_answer_and_no_empty_one() -> None:
    rows = [json.loads(line) for block in BLOCKS if block.file == "tasks.jsonl" for line in block.text.splitlines()]
    shown = {"math": r"\boxed{%s}", "countdown": "<answer>%s</answer>"}
    for row in rows:
        assert verify(row, shown.get(row["task"], "%s") % row["answer"]).correct, row
        assert not verify(row, "").correct, row
    # Rows of reasoning_gym are made by its own kind of data, not written by hand.
    assert {row["task"] for row in rows} == set(VERIFIERS) - {"reasoning_gym"}


def test_the_data_page_names_only_settings_there_are() -> None:
    text = (DOCS / "your-own-data.md").read_text(encoding="utf-8")
    told = json.loads(deltal("config", str(DOCS.parent / "configs" / "gsm8k-smollm2.yaml"), "--json").stdout)
    for name in re.findall(r"`data\.(\w+)", text):
        assert name in told["data"], name
