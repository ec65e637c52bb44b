"""What a run trains on and is evaluated on: looked at before it starts, and the same at every start."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal.config import DataConfig, JsonlData, ReasoningGymData, RunConfig, VerifyConfig
from deltal.data.datasets import load_prompts
from deltal.data.held_out import question, split_off
from deltal.errors import DataError, UserError
from deltal.folder import RunFolder
from deltal.plan.prompts import checked_prompts, checked_set, prompts_of_run
from deltal.results.offline import held_out_prompts
from deltal.types import Message, Prompt
from deltal.verify.registry import VERIFIERS, gold_faults
from deltal.verify.sandbox.pool import SandboxPool
from tests.unit.builders import run_config

GOOD = [{"prompt": f"{n} + 1?", "answer": str(n + 1), "task": "gsm8k"} for n in range(20)]


def written(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def config_of(file: Path, *, held_out: Any = None, batch: int = 8, **data: Any) -> RunConfig:
    return run_config(
        data={"kind": "jsonl", "path": str(file), **data},
        evaluation={"data": held_out},
        replay={"prompts_per_batch": batch},
    )


def checked(config: DataConfig) -> list[Prompt]:
    return checked_set(config, "data", VerifyConfig()).prompts


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"task": "gsm8k", "answer": "N/A"}, "the answer 'N/A' of a gsm8k prompt is no number"),
        ({"task": "largest", "answer": "none"}, "is no number"),
        ({"task": "countdown", "answer": "-", "nums": [1, 2]}, "needs the field 'target'"),
        ({"task": "code", "answer": "-"}, "needs the field 'test'"),
        ({"task": "code", "answer": "-", "tests": "assert True"}, "no list of statements"),
        ({"task": "code", "answer": "-", "test": "x", "entry_point": "1x"}, "is no name"),
        ({"task": "code", "answer": "-", "test": {"a": 1}, "entry_point": "f"}, "'test' of a code prompt is no text"),
        ({"task": "reasoning_gym", "answer": "1", "name": "chain_sum"}, "needs the field 'entry'"),
        ({"task": "reasoning_gym", "answer": "1", "name": "chain_summ", "entry": {}}, "no task 'chain_summ'"),
        ({"task": "math", "answer": r"\frac{1}{2"}, "brace that is never closed"),
        ({"task": "math", "answer": "9^{9^{9^{9}}}"}, "too large"),
        ({"task": "math", "answer": "???"}, "no formula that math-verify can read"),
        ({"task": "gsm8", "answer": "1"}, "the nearest is 'gsm8k'"),
    ],
)
def test_a_row_that_no_response_could_be_judged_by_is_named_before_the_start(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    file = written(tmp_path, [GOOD[0], "", {"prompt": "q", **row}])
    with pytest.raises(DataError, match=r"rows\.jsonl:3: ") as caught:
        checked(JsonlData(path=str(file)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_rows_that_cannot_be_judged_are_named_at_once(tmp_path: Path) -> None:
    bad = [{"prompt": f"b{n}", "answer": f"none {n}", "task": "gsm8k"} for n in range(30)]
    with pytest.raises(DataError) as caught:
        checked(JsonlData(path=str(written(tmp_path, [*GOOD, *bad]))))
    said = str(caught.value)
    assert all(f"rows.jsonl:{line}: the answer 'none" in said for line in range(21, 31))
    assert "and 20 more rows" in said


@pytest.mark.parametrize(
    "answer",
    ["7", "-0.25", r"\frac{1}{2}", r"\frac12", "11,\\!880", "1,000", r"3\sqrt{2}", r"2\pi", "(3,-4)", "45^\\circ",
     "5\\%", r"x \in (-\infty, 2]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "even", r"\text{(B)}", "3:4", "10:30"],
)  # fmt: skip
def test_a_math_answer_passes_the_check_exactly_when_it_can_be_read(answer: str) -> None:
    from deltal.verify.tasks.math import math_gold

    prompt = Prompt(id="0", task="math", messages=(), answer=answer)
    math_gold(answer, {})  # With math-verify itself, also what the check lets pass without asking.
    with SandboxPool(processes=1, timeout=10.0, memory_mib=1024) as pool:
        assert gold_faults([prompt], pool) == {}


def test_answers_that_end_or_stall_their_reader_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Prompt(id="0", task="math", messages=(), answer=r"\frac{" * 300 + "1" + "}" * 300)
    with SandboxPool(processes=1, timeout=0.5, memory_mib=1024) as pool:
        (why,) = gold_faults([long], pool).values()
    assert "reading the answer" in why or "of a math prompt" in why


def test_a_verifier_without_a_check_of_its_own_is_asked_with_the_gold_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's `choice` has none; a broken row raises all the same."""
    from deltal.verify.registry import Verifier
    from deltal.verify.tasks.answers import Finding, needed

    def choice(answer: str, fields: Any, text: str) -> Finding:
        letters = "ABC"[: len(needed(fields, "choices", "choice"))]
        if answer not in letters:
            raise DataError(f"the answer {answer!r} of a choice prompt is none of {letters}")
        return Finding(True, text, "equal")

    monkeypatch.setitem(VERIFIERS, "choice", Verifier(judge=choice))
    rows = [("A", {"choices": [1, 2]}), ("C", {"choices": [1, 2]}), ("A", {})]
    prompts = [Prompt(id="", task="choice", messages=(), answer=answer, fields=fields) for answer, fields in rows]
    with SandboxPool(processes=1, timeout=1.0, memory_mib=512) as pool:
        faults = gold_faults(prompts, pool)
    assert {place: why.split()[-1] for place, why in faults.items()} == {1: "AB", 2: "'choices'"}


def test_data_that_come_with_the_package_pass_the_check() -> None:
    for name in ("gsm8k_train", "countdown_train", "math_train", "math500_test"):
        config = JsonlData(path=f"{name}.jsonl")
        assert checked(config) == load_prompts(config)
    assert len(checked(ReasoningGymData(name="rush_hour", size=2))) == 2


def test_a_gold_answer_is_asked_about_once_however_often_it_stands_there(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "answer": r"x^2 + \sqrt{y}", "task": "math"} for n in range(3000)]
    began = time.monotonic()
    assert len(checked(JsonlData(path=str(written(tmp_path, rows))))) == 3000
    assert time.monotonic() - began < 20.0


def test_skipped_rows_are_counted_and_the_others_keep_their_order(tmp_path: Path) -> None:
    rows = [GOOD[0], {**GOOD[1], "answer": "N/A"}, "{broken", GOOD[2]]
    file = written(tmp_path, rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: no JSON.*rows\.jsonl:2: the answer 'N/A'.*data\.on_bad_rows"):
        checked_prompts(config_of(file))
    found = checked_prompts(config_of(file, on_bad_rows="skip"))
    assert [prompt.messages[0].content for prompt in found.train] == ["0 + 1?", "2 + 1?"]
    assert found.rows_skipped == 2
    assert "2 rows are left out (data.on_bad_rows: skip)" in found.notes[0]
    assert "rows.jsonl:2" in found.notes[0]


def test_the_same_rows_are_left_out_at_every_start_whatever_the_check_says_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(written(tmp_path, [*GOOD, {**GOOD[1], "answer": "N/A"}]), on_bad_rows="skip")
    folder = RunFolder(str(tmp_path / "run"))
    folder.make()
    first = prompts_of_run(config, folder)
    monkeypatch.setattr("deltal.plan.prompts.gold_faults", lambda prompts, pool: {0: "it took too long today"})
    again = prompts_of_run(config, folder)
    assert (again.train, again.rows_skipped) == (first.train, first.rows_skipped)


@pytest.mark.parametrize(
    "rows",
    [[*GOOD, {**GOOD[0], "prompt": "new"}], GOOD[1:], [{**GOOD[0], "answer": "7"}, *GOOD[1:]], [*GOOD[1:], GOOD[0]]],
    ids=["added", "removed", "another answer", "another order"],
)
def test_data_that_changed_under_a_run_are_refused(tmp_path: Path, rows: list[Any]) -> None:
    file = written(tmp_path, GOOD)
    held_out = {"kind": "jsonl", "path": str(written(tmp_path, [{**GOOD[0], "prompt": "held"}], "other.jsonl"))}
    config = config_of(file, held_out=held_out)
    folder = RunFolder(str(tmp_path / "run"))
    folder.make()
    prompts_of_run(config, folder)
    prompts_of_run(config, folder)
    written(tmp_path, rows)
    with pytest.raises(DataError, match=r"rows\.jsonl' is not what this run began with .*20 rows then") as caught:
        prompts_of_run(config, folder)
    assert "\n" not in str(caught.value)
    written(tmp_path, GOOD)
    written(tmp_path, [{**GOOD[0], "prompt": "other"}], "other.jsonl")
    with pytest.raises(DataError, match=r"other\.jsonl' is not what this run began with"):
        prompts_of_run(config, folder)


def asking(texts: Sequence[str]) -> list[Prompt]:
    return [
        Prompt(id=str(place), task="exact", messages=(Message(role="user", content=text),), answer="x")
        for place, text in enumerate(texts)
    ]


TEXTS = st.lists(st.text("ab \n", min_size=1, max_size=6), min_size=2, max_size=40)


@given(TEXTS, st.integers(1, 20))
def test_a_held_out_question_is_never_trained_and_none_is_lost(texts: list[str], rows: int) -> None:
    prompts = asking(texts)
    different = {question(prompt) for prompt in prompts}
    if len(different) <= rows:
        with pytest.raises(DataError, match=r"evaluation\.data holds \d+ questions out of training"):
            split_off(prompts, rows)
        return
    train, held = split_off(prompts, rows)
    asked = {question(prompt) for prompt in train}
    assert len(held) == rows == len({question(prompt) for prompt in held})
    assert not asked & {question(prompt) for prompt in held}
    assert asked | {question(prompt) for prompt in held} == different
    assert train == [prompt for prompt in prompts if question(prompt) in asked]


@given(st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=12, max_size=40, unique=True), st.randoms())
def test_more_rows_or_another_order_move_few_questions(texts: list[str], random: Any) -> None:
    _, held = split_off(asking(texts[:-1]), 5)
    _, more = split_off(asking(texts), 5)
    assert len({question(p) for p in held} - {question(p) for p in more}) <= 1
    shuffled = random.sample(texts, len(texts))
    assert {question(p) for p in split_off(asking(shuffled), 5)[1]} == {question(p) for p in more}


@pytest.mark.parametrize("short", [True, False])
def test_rows_of_the_own_data_can_be_held_out(tmp_path: Path, short: bool) -> None:
    held_out = {"split_off": 5} if short else {"kind": "split_off", "rows": 5}
    found = checked_prompts(config_of(written(tmp_path, GOOD), held_out=held_out))
    assert (len(found.train), len(found.held_out), found.notes) == (15, 5, ())
    assert not {p.id for p in found.train} & {p.id for p in found.held_out}


def test_more_rows_held_out_than_there_are_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data has only 20 different ones: lower evaluation\.data\.rows"):
        checked_prompts(config_of(written(tmp_path, GOOD), held_out={"split_off": 20}))


def test_what_is_odd_about_the_data_is_said(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    assert checked_prompts(config_of(file)).notes == ()
    assert "20 prompts and a batch takes 21" in " ".join(checked_prompts(config_of(file, batch=21)).notes)
    other = checked_prompts(config_of(file, held_out={"kind": "generated", "name": "letters", "size": 4})).notes
    assert "evaluation.data asks for letters, data for gsm8k" in " ".join(other)
    assert "split_off" in " ".join(other)
    more = config_of(file, held_out={"split_off": 5})
    more = more.model_copy(update={"evaluation": more.evaluation.model_copy(update={"prompts": 3})})
    assert "holds 5 rows out of training, evaluation.prompts = 3 of them" in " ".join(checked_prompts(more).notes)
    same = checked_prompts(config_of(file, held_out={"kind": "jsonl", "path": str(file)})).notes
    assert "20 of 20 questions of evaluation.data stand in data too" in " ".join(same)


def test_rows_to_measure_on_are_read_by_the_section_that_the_message_names(tmp_path: Path) -> None:
    file = written(tmp_path, [{"prompt": "q", "answer": "1"}], "own.jsonl")
    settings = config_of(written(tmp_path, GOOD))
    for held_out, section in (
        (None, "data"),
        ({"split_off": 3}, "data"),
        ({"kind": "jsonl", "path": str(file)}, "evaluation.data"),
    ):
        asked = config_of(written(tmp_path, GOOD), held_out=held_out)
        with pytest.raises(DataError, match=rf"own\.jsonl:1: no column 'task', and {section}\.task is not set"):
            held_out_prompts(str(file), asked)
    asked = config_of(written(tmp_path, GOOD), held_out={"kind": "jsonl", "path": str(file), "task": "gsm8k"})
    assert held_out_prompts(None, asked)[0] == held_out_prompts(str(file), asked)[0]
    with pytest.raises(UserError, match="the settings name no evaluation data"):
        held_out_prompts(None, settings)


def test_an_own_evaluation_sees_what_was_split_off_and_nothing_else(tmp_path: Path) -> None:
    config = config_of(written(tmp_path, GOOD), held_out={"split_off": 3})
    assert held_out_prompts(None, config)[0] == checked_prompts(config).held_out
