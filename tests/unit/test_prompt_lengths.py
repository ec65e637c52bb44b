"""Prompts that will not fit are told before a run starts, where the model's tokenizer is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltal.config import ChatConfig, HfModel, RandomModel
from deltal.data.chat import Chat
from deltal.errors import DataError
from deltal.learner.model import prepare
from deltal.plan.model_inputs import chat_at_hand
from deltal.plan.prompt_lengths import SAMPLE, chat_notes, counted
from deltal.types import Message, Prompt
from tests.launch import TINY, deltal
from tests.unit.builders import run_config


@pytest.fixture(scope="module")
def folder(model_cache: None) -> str:
    """A model folder with a tokenizer whose tokens are bytes."""
    return prepare(RandomModel())


def asking(*lengths: int) -> list[Prompt]:
    return [
        Prompt(id=str(place), task="exact", messages=(Message(role="user", content="x" * length),), answer="x")
        for place, length in enumerate(lengths)
    ]


def test_prompts_too_long_are_counted_in_a_sample_that_is_always_the_same(folder: str) -> None:
    chat = Chat(folder, ChatConfig(template="plain"))
    assert counted(chat, asking(3, 5, 9), 9) is None
    told = counted(chat, asking(3, 5, 9), 8)
    assert told is not None
    assert told.startswith("1 of 3 prompts looked at are longer than chat.max_prompt_tokens = 8")
    assert told.endswith("the longest has 9 tokens")
    many = asking(*([3] * 1000 + [30] * 1000))
    told = counted(chat, many, 8)
    assert told is not None
    assert told == counted(chat, many, 8)
    assert told.startswith(f"{SAMPLE // 2} of {SAMPLE} prompts looked at")


def test_what_leaves_the_question_out_or_has_no_end_is_told(folder: str) -> None:
    plain = run_config(model={"kind": "hf", "path": folder})
    assert chat_notes(plain, asking(3, 5, 9)) == []
    deaf = run_config(model={"kind": "hf", "path": folder}, chat={"template": "{{ 'hello' }}"})
    (told,) = chat_notes(deaf, asking(3, 5, 9))
    assert "leave the question out" in told


def test_when_all_are_too_long_the_setting_is_named_and_nothing_starts(folder: str) -> None:
    with pytest.raises(DataError, match=r"chat\.max_prompt_tokens = 8: the shortest of 2 looked at has 9 tokens"):
        counted(Chat(folder, ChatConfig(template="plain")), asking(9, 12), 8)


def test_no_tokenizer_is_made_or_fetched_for_it(folder: str) -> None:
    there, elsewhere = (run_config(model=HfModel(path=path).model_dump()) for path in (folder, "some/name-on-the-hub"))
    assert chat_at_hand(there, hub=False) is not None
    assert chat_at_hand(elsewhere, hub=False) is None


def test_a_dry_run_and_a_start_tell_it(folder: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "x" * length, "answer": "1", "task": "exact"} for length in (10, 900, 20, 950)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    asked = [TINY, f"model={{kind: hf, path: {folder}}}", f"data={{kind: jsonl, path: {data}}}", "evaluation.data=null"]
    result = deltal("train", *asked, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "2 of 4 prompts looked at are longer than chat.max_prompt_tokens = 128" in result.stdout
    for more in ((), ("--dry-run",)):
        result = deltal("train", *asked, "chat.max_prompt_tokens=8", *more, DELTAL_RUNS=str(tmp_path / "runs"))
        assert result.returncode == 2
        assert "all prompts of data are longer than chat.max_prompt_tokens = 8" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
