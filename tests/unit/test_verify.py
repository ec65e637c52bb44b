"""Verdicts, task by task, and texts written to deceive."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal.config import GeneratedData, JsonlData, ReasoningGymData
from deltal.data.datasets import load_prompts
from deltal.errors import DataError
from deltal.types import Response
from deltal.verify import verify
from deltal.verify.sandbox.pool import isolation_kind
from deltal.verify.tasks.answers import final_part, last_box
from deltal.verify.tasks.exact import normalised
from deltal.verify.tasks.reasoning import reasoning_gym

isolated = pytest.mark.skipif(isolation_kind() == "none", reason="this machine has neither bubblewrap nor namespaces")


def correct(task: str, answer: str, text: str, **fields: Any) -> bool:
    return verify({"task": task, "answer": answer, **fields}, text).correct


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("98", True),
        ("The largest is 98.", True),
        ("18, 73, 98", True),
        ("98,73,18", False),
        ("18,73,98", True),
        ("13,12,98", True),
        ("98 is larger than 73", False),
        ("98.5", False),
        ("198", False),
        ("-98", False),
        ("it is number-98", True),
        ("<think>18</think> 98", True),
        ("<think>98", False),
        ("", False),
        ("none", False),
        ("9" * 100_000, False),
        ("\u0669\u0668", False),
    ],
)
def test_largest_is_the_last_number(text: str, expected: bool) -> None:
    assert correct("largest", "98", text, numbers=[18, 73, 98]) is expected


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("72", "#### 72", True),
        ("72", "#### 71\nno, #### 72", True),
        ("72", "It is 72. #### 5", False),
        ("72", r"5 and \boxed{72} and 9", True),
        ("72", r"\boxed{72\text{ clips}}", True),
        ("72", r"\boxed{72", False),
        ("72", "So she sold 48+24 = 72 clips altogether in April and May.", True),
        ("118000", r"\boxed{118,000}", True),
        ("118000", r"\boxed{\$118{,}000}", True),
        ("118000", "#### 118,000", True),
        ("11", "13,12,11", True),
        ("3", "3.0", True),
        ("3", "3.01", False),
        ("-3", "#### -3", True),
        ("3", r"\boxed{6/2}", True),
        ("3", r"\boxed{6/0}", False),
        ("72", r"<think>\boxed{72}", False),
        ("72", r"thoughts \boxed{5}</think> \boxed{72}", True),
        ("72", "#### " + "9" * 100_000, False),
    ],
)
def test_gsm8k_is_mark_then_box_then_last_number(answer: str, text: str, expected: bool) -> None:
    assert correct("gsm8k", answer, text) is expected


PUBLISHED = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = 72.\n#### 72"


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        (PUBLISHED, "#### 72", True),
        (PUBLISHED, "#### 24", False),
        (PUBLISHED, PUBLISHED, True),
        ("so #### 1,450,000", "1450000", True),
        ("#### $1,200.50", r"\boxed{1200.5}", True),
        ("$72", "72", True),
        ("1,000", "1000", True),
        ("#### -3 ", "-3", True),
        ("+7", "7", True),
    ],
)
def test_a_gold_answer_may_be_a_published_solution_or_a_sum_of_money(answer: str, text: str, expected: bool) -> None:
    assert correct("gsm8k", answer, text) is expected


@pytest.mark.parametrize("answer", ["N/A", "2,5", "1,00", "13,12,11", "1e16", "#### ", "#### many", "72 clips", "٣"])
def test_a_gold_answer_that_is_no_number_is_named_whatever_the_response(answer: str) -> None:
    for task, text in (("gsm8k", ""), ("gsm8k", answer), ("largest", "none"), ("largest", "7")):
        with pytest.raises(DataError, match=f"of a {task} prompt is no number"):
            correct(task, answer, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", True),
        ("The answer is: Paris.", True),
        ("**Answer:** paris", True),
        ("The answer is Paris", True),
        ("Answer:\n\nParis", True),
        (r"so \boxed{\text{Paris}}", True),
        ("<answer> PARIS </answer> I am sure", True),
        ("It follows.\n#### Paris", True),
        ("Long story.\n\n  ‘Paris’!  \n", True),
        ("Ｐａｒｉｓ", True),
        ("Pa\u200bris", True),
        ("(Paris)", True),
        ("It is Paris", False),
        ("Paris or London", False),
        ("The answer is not Paris", False),
        ("Answer: Paris\nAnswer: London", False),
        ("Paris\nor rather London", False),
        (r"Paris \boxed{London}", False),
        (r"Paris \boxed{}", False),
        (r"\boxed{Paris", False),
        ("<answer>Paris, London</answer>", False),
        ("<think>Paris</think>", False),
        ("<think>Paris", False),
        ("thoughts</think>Paris", True),
        ("Parisi", False),
        ("P a r i s", False),
        ("sipar", False),
        ("", False),
        ("Paris" * 10_000, False),
        ("answer" + " " * 100_000 + "is", False),
        ("(" * 2_000 + "Paris" + ")" * 2_000, False),
    ],
)
def test_exact_is_the_gold_answer_and_nothing_beside_it(text: str, expected: bool) -> None:
    assert correct("exact", "Paris", text) is expected


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("New  York", "new york", True),
        ("Straße", "STRASSE", True),
        ("Yes.", "yes", True),
        ("yes", "Yes!", True),
        ("C++", "C", False),
        ("C", "C#", False),
        ("-5", "5", False),
        (".5", "5", False),
        ("5!", "5", False),
        ("0.5", "1/2", False),
        ("[1]", "1", False),
        ("f(x)", "f(x)", True),
        ("(a)(b)", "a)(b", False),
        ("_x", "x", False),
        ("50%", "50", False),
        ("?", "?", True),
        ("a\nb", "<answer>a\nb</answer>", True),
        ("szyc", "cyzs", False),
        ("e\u0301t\u00e9", "\u00e9te\u0301", True),
    ],
)
def test_exact_compares_text_and_not_what_it_stands_for(answer: str, text: str, expected: bool) -> None:
    assert correct("exact", answer, text) is expected


@given(st.text(min_size=1, max_size=40))
def test_exact_takes_its_own_gold_answer_in_a_tag(answer: str) -> None:
    if normalised(answer):
        assert correct("exact", answer, f"<answer>{answer}</answer>") or "<" in answer or "\\" in answer


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("szyc", r"\boxed{szyc}", True),
        ("szyc", r"\boxed{cyzs}", False),
        ("szyc", r"\boxed{s \cdot z \cdot y \cdot c}", False),
        ("szyc", "The answer is szyc.", True),
        (r"\text{odd}", r"\boxed{odd}", True),
        (r"\text{odd}", r"\boxed{\text{ Odd }}", True),
        (r"\text{odd}", r"\boxed{\text{do} d}", False),
        (r"\text{two lines}", r"\boxed{two lines}", True),
        ("xy", r"\boxed{yx}", True),
    ],
)
def test_math_takes_words_as_words_and_letters_as_variables(answer: str, text: str, expected: bool) -> None:
    assert correct("math", answer, text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> (3 + 5) * 2 </answer>", True),
        ("<think>x</think>\n<answer>(5 + 3) * 2 = 16</answer>", True),
        ("<answer>1</answer> or <answer>2*(3+5)</answer>", True),
        (r"\boxed{(3+5) \times 2}", True),
        ("Let me see:\n(3 + 5) * 2 = 16", True),
        ("Answer: 16 = 2 * (3 + 5).", True),
        ("<answer>16</answer>", False),
        ("<answer>(3 + 5) * 2 = 17</answer>", False),
        ("<answer>3.5*2+9</answer>", False),
        ("<answer>3 + 5 + 8</answer>", False),
        ("<answer>(3 + 5) * 2 * 1</answer>", False),
        ("<answer>(3 + 5) * 2 + 2 - 2</answer>", False),
        ("<answer>2 ** (5 - 3) * 4</answer>", False),
        ("<answer>5 // 3 * 2</answer>", False),
        ("<answer>-(3 + 5) * -2</answer>", False),
        ("<answer>35 - 2</answer>", False),
        ("<answer>2 / (3 - 3) + 5</answer>", False),
        ("<answer>__import__('os').system('true')</answer>", False),
        ("<answer>99**98**97</answer>", False),
        ("9**9**9", False),
        ("<answer>" + "(" * 100_000 + "</answer>", False),
        ("<answer>" + "(" * 140 + "3+5" + ")" * 140 + "*2</answer>", True),
        ("<answer>\uff13+5</answer>", False),
        ("<think><answer>(3+5)*2</answer>", False),
        ("", False),
    ],
)
def test_countdown_is_judged_by_rule(text: str, expected: bool) -> None:
    assert correct("countdown", "(3 + 5) * 2", text, nums=[3, 5, 2], target=16) is expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-*/() =", max_size=40))
def test_countdown_never_accepts_other_numbers_or_another_value(text: str) -> None:
    verdict = verify({"task": "countdown", "answer": "-", "nums": [7, 12], "target": 19}, text)
    if verdict.correct:  # the only ways to make 19 of 7 and 12
        side = (verdict.parsed or "").replace(" ", "").replace("(", "").replace(")", "")
        assert set(side.split("=")) - {"19"} <= {"7+12", "12+7"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=2, max_size=4), st.lists(st.sampled_from("+-*/"), min_size=3, max_size=3))
def test_countdown_accepts_what_is_exactly_right(numbers: list[int], operations: list[str]) -> None:
    expression, value = str(numbers[0]), Fraction(numbers[0])
    for sign, number in zip(operations, numbers[1:], strict=False):
        expression = f"({expression}) {sign} {number}"
        value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[sign]
    right = value.denominator == 1
    asked = {"task": "countdown", "answer": "-", "nums": numbers, "target": int(value)}
    assert verify(asked, f"<answer>{expression}</answer>").correct is right


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        (r"\frac{1}{2}", r"So \boxed{0.5}", True),
        (r"\frac{1}{3}", r"\boxed{0.333333}", False),
        (r"12\text{ cm}", r"\boxed{12\text{ m}}", False),
        (r"12\text{ cm}^2", r"\boxed{12}", True),
        (r"\frac12", r"\boxed{1:2}", False),
        (r"(2,\infty)", r"\boxed{x>2}", True),
        ("10080", r"\boxed{10\,080}", True),
        ("300000", r"\boxed{3e5}", True),
        ("7", r"First \boxed{5}, no: \boxed{7}.", True),
        ("7", r"\boxed{7} and not \boxed{5}", False),
        ("7", r"<think>\boxed{7}", False),
        ("7", r"<think>\boxed{5}</think> It is \boxed{7}.", True),
        ("7", r"\boxed{7", False),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}", False),
        ("7", "The answer is 3 or 5 or 7", False),
        ("7", r"\boxed{" + "(" * 200 + "7" + ")" * 200 + "}", True),
        ("7", r"\boxed{9^{9^{9^{9}}}}", False),
        ("7", r"\boxed{10000000!}", False),
        ("7", r"\boxed{" + "9" * 5000 + "}", False),
        ("7", "", False),
        ("4", r"\boxed{5=4}", False),
        ("4", r"\boxed{2+2=4}", True),
        ("4", r"\boxed{x=4}", True),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{4}=\frac{1}{2}}", True),
        ("1", r"\boxed{1,1,1}", False),
        ("1000000", r"\boxed{1,000,000}", True),
        ("1,2", r"\boxed{2,1}", True),
        ("1000000!", r"\boxed{7}", False),
    ],
)
def test_math_is_the_last_box_after_the_thoughts(answer: str, text: str, expected: bool) -> None:
    assert correct("math", answer, text) is expected


def test_boxes_and_thoughts_are_found_in_nested_text() -> None:
    assert last_box(r"\boxed{\frac{1}{2}} x \boxed {a\}b}") == r"a\}b"
    assert last_box("none") is None
    assert last_box(r"\boxed{1} \boxed{2") == ""
    assert final_part("a</think>b<think>c") == "b"


HUMANEVAL = {
    "task": "code",
    "answer": "    return a + b\n",
    "prompt": 'import math\n\ndef add(a, b):\n    """Sum."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(math.inf, 1) == math.inf\n",
    "entry_point": "add",
}
MBPP = {"task": "code", "answer": "-", "setup": "one = 1", "tests": ["assert add(one, 2) == 3"]}


@isolated
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("    return a + b\n", "passed"),
        ("return a + b", "passed"),
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nUse:\n```python\nadd(1, 2)\n```", "passed"),
        ("```python\nfrom __future__ import annotations\ndef add(a: x, b: y):\n    return a + b\n```", "passed"),
        ("    return a - b", "failed"),
        ("    import sys; sys.exit(0)", "failed"),
        ("    import os; os._exit(0)", "failed"),
        ("    this is no Python", "failed"),
        ("    import os\n    while True: os.write(3, b'x' * 65536)", "failed"),
        ("", "no answer"),
    ],
)
def test_a_program_must_run_to_the_end_of_its_tests(text: str, reason: str) -> None:
    verdict = verify(HUMANEVAL, text)
    assert (verdict.reason, verdict.correct) == (reason, reason == "passed")


@isolated
def test_mbpp_style_runs_program_then_setup_then_tests() -> None:
    assert verify(MBPP, "def add(a, b):\n    return a + b").reason == "passed"
    assert verify(MBPP, "one = 7\ndef add(a, b):\n    return b + 2").reason == "failed"


@isolated
def test_a_program_can_neither_write_files_nor_reach_the_network(tmp_path: Path) -> None:
    inside = Path(__file__).parent / "written_by_a_program"
    for attack in (
        f"open({str(inside)!r}, 'w')",
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "import socket; socket.getaddrinfo('example.org', 80)",
    ):
        assert verify(MBPP, f"def add(a, b): return a + b\n{attack}").reason == "failed", attack
    assert not inside.exists()


def test_without_isolation_no_program_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltal.verify.sandbox.pool.isolation_kind", lambda: "none")
    verdict = verify(MBPP, "def add(a, b): return a + b")
    assert (verdict.reason, verdict.reward) == ("no sandbox", 0.0)


@pytest.mark.parametrize("name", ["chain_sum", "countdown", "arc_agi", "string_insertion"])
def test_reasoning_gym_takes_the_gold_answer_and_nothing_near(name: str) -> None:
    (prompt,) = load_prompts(ReasoningGymData(name=name, size=1, seed=5))
    assert verify(prompt, f"<think>hm</think><answer>{prompt.answer}</answer>").reward == 1.0
    assert verify(prompt, f"<answer>{prompt.answer} 1</answer>").reward == 0.0
    assert verify(prompt, "").reason == "no answer"


@pytest.mark.parametrize(
    "said",
    [
        "__import__('os').system('true')",
        "exec('import sys')",
        "\uff45xec('1')",  # full-width e: Python reads `exec`
        "[exec][0]('1')",
        "(x for x in ()).gi_frame.f_back.f_locals",
    ],
)
def test_reasoning_gym_hands_no_scorer_what_python_would_run(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltal.verify.tasks.reasoning.is_sandboxed", lambda: True)
    finding = reasoning_gym("1", {"name": "countdown", "entry": {"metadata": {}}}, f"<answer>{said}</answer>")
    assert (finding.correct, finding.reason) == (False, "hostile")


def test_reasoning_gym_is_never_scored_outside_of_a_sandbox() -> None:
    with pytest.raises(RuntimeError, match="only a sandboxed process"):
        reasoning_gym("1", {"name": "chain_sum", "entry": {}}, "1")


def test_generated_and_sample_prompts_accept_their_own_answers() -> None:
    for config in (GeneratedData(size=20), GeneratedData(name="countdown_two", size=20)):
        assert all(verify(prompt, prompt.answer).correct for prompt in load_prompts(config))
    for prompt in load_prompts(JsonlData(path="countdown_train.jsonl")):
        assert verify(prompt, f"<answer>{prompt.answer}</answer>").correct
    for prompt in load_prompts(JsonlData(path="gsm8k_test.jsonl")):
        assert verify(prompt, f"#### {prompt.answer}").correct
    for prompt in load_prompts(JsonlData(path="math500_test.jsonl")):
        assert verify(prompt, rf"\boxed{{{prompt.answer}}}").correct


def test_a_gold_answer_may_be_a_number() -> None:
    for answer, text in ((72, "72"), (72.0, "72"), (1e16, "10000000000000000"), (0.1, "0.1")):
        assert verify({"task": "gsm8k", "answer": answer}, text).correct


def test_a_response_is_taken_as_its_text() -> None:
    empty = np.zeros(0)
    response = Response(tokens=empty, logprobs=empty, mask=empty, spans=(), finish="stop", text="it is 98")  # type: ignore[arg-type]
    verdict = verify({"task": "largest", "answer": "98"}, response)
    assert (verdict.reward, verdict.correct, verdict.parsed, verdict.reason) == (1.0, True, "98", "equal")
    assert verdict.seconds >= 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"task": "gsm8", "answer": "1"}, "no verifier for task 'gsm8'; the nearest is 'gsm8k'"),
        ({"task": "countdown", "answer": "1"}, "needs the field 'nums'"),
        ({"task": "countdown", "answer": "1", "nums": ["x"], "target": 1}, "nums ="),
        ({"task": "countdown", "answer": "1", "nums": [3.5, 2], "target": 7}, "whole numbers are wanted"),
        ({"task": "countdown", "answer": "1", "nums": [], "target": 7}, "whole numbers are wanted"),
        ({"task": "letters", "answer": "7"}, "holds no letter"),
        ({"task": "exact", "answer": "\u200b"}, "holds nothing to compare"),
        ({"task": "gsm8k", "answer": "many"}, "'many' of a gsm8k prompt is no number"),
        ({"task": "code", "answer": "1"}, "needs the field 'test'"),
        ({"task": "reasoning_gym", "answer": "1"}, "needs the field 'name'"),
        ({"task": "math"}, "a prompt without answer"),
        ({"task": "gsm8k", "answer": ["72"]}, "the answer of a prompt holds a list"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_named(prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        verify(prompt, "1")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.sampled_from(["largest", "gsm8k", "countdown", "exact"]))
def test_no_text_breaks_a_verifier(text: str, task: str) -> None:
    verdict = verify({"task": task, "answer": "7", "nums": [3, 4], "target": 7}, text)
    assert not verdict.reason.startswith("error")
    json.dumps(verdict.parsed)
