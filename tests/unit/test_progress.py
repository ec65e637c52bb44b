"""Laws of the terminal's display: it survives any status, says what it knows, and prints no text as a command."""

import io
from typing import Any

import pytest
from rich.console import Console

from deltal.results.rows import stalled
from deltal.run.progress import before_after_table, duration, render, trend

NAN = float("nan")
STATUS: dict[str, Any] = {
    "name": "night",
    "state": "training",
    "step": 7,
    "steps": 20,
    "policy_version": 7,
    "reward": 0.625,
    "accuracy": 0.5,
    "accuracy_before": 0.21,
    "accuracy_after": None,
    "response_length": 38.25,
    "tokens_per_second": {"rollout": 139.2, "learner": 160.7},
    "staleness": {"mean": 0.5, "max": 2},
    "queues": {"prompt": {"waiting": 3, "leased": 8}, "rollout": {"waiting": 1, "leased": 2}},
    "workers": {"rollout": 2, "verify": 1, "learner": 1},
    "pending": {},
    "error": None,
    "restarts": {"rollout": 1},
    "ledger": {"issued": 72, "consumed": 56, "evicted": 0, "filtered": 1, "in_flight": 15},
    "seconds_left": 3725,
    "seconds": {},
    "address": "http://127.0.0.1:4711",
    "prompts_skipped": 2,
    "message": "worker rollout-1 restarted",
    "evaluation": None,
}


def printed(thing: Any) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_display_says_everything_it_knows() -> None:
    text = printed(render(STATUS, [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.6}]))
    for expected in (
        "step 7/20",
        "1 h 02 min left",
        "training",
        "0.625",
        "38.2",
        "139",
        "161",
        "largest 2",
        "8 leased",
        "rollout 2, verify 1, learner 1",
        "in flight 15",
        "http://127.0.0.1:4711",
        "worker rollout-1 restarted",
        "▂█",
    ):
        assert expected in text, expected


def test_workers_without_a_place_are_told_with_what_they_wait_for() -> None:
    pending = {
        "rollout": {"count": 7, "needs": {"CPU": 0.5, "GPU": 1.0}, "free": {"CPU": 0.25, "GPU": 1.0}, "seconds": 9.0},
        "verify": {"count": 1, "needs": {"CPU": 0.05}, "free": {"CPU": 0.25}, "seconds": 1.0},
    }
    text = printed(render({**STATUS, "pending": pending}, []))
    words = " ".join(text.replace("│", "").split())
    assert "7 rollout wait for CPU 0.500 each, 0.250 free; 1 verify starting" in words


def test_a_run_that_failed_says_why() -> None:
    failed = {**STATUS, "state": "failed", "error": "no verifier for task 'x'"}
    assert "no verifier for task 'x'" in printed(render(failed, []))


@pytest.mark.parametrize("value", [None, NAN, "word", {}, [], 3])
def test_no_value_breaks_the_display(value: Any) -> None:
    assert "step" in printed(render(dict.fromkeys(STATUS, value), [{"step": 1, "reward": value}]))


def test_nothing_at_all_still_makes_a_display() -> None:
    assert "step –/–" in printed(render({}, []))


def test_an_evaluation_takes_the_place_of_the_time_left() -> None:
    text = printed(render({**STATUS, "evaluation": {"done": 30, "of": 100}}, []))
    assert "evaluation 30/100" in text


def test_text_of_a_run_is_neither_markup_nor_a_terminal_command() -> None:
    hostile = "[red]x[/red]\x1b[2J\x07[/]\nsecond"
    status = {**STATUS, **dict.fromkeys(("name", "state", "message", "address"), hostile)}
    text = printed(render({**status, "workers": {hostile: 1}}, []))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]x[/red] [2J [/] second" in text
    assert "[red]" in printed(before_after_table({"name": hostile, "steps": hostile}))


def test_the_table_says_before_after_and_gain_with_interval() -> None:
    summary = {"name": "night", "accuracy_before": 0.2, "accuracy_after": 0.9, "gain_interval_95": [0.62, 0.76]}
    text = printed(before_after_table({**summary, "steps": 20}))
    for expected in ("0.200", "0.900", "+0.700", "[0.620, 0.760]", "20"):
        assert expected in text
    assert "–" in printed(before_after_table({}))


def test_a_trend_starts_at_zero_and_leaves_gaps() -> None:
    assert trend([0.0, NAN, 1.0]) == "▁ █"
    assert trend([0.9, 1.0])[0] != "▁"
    assert trend([]) == ""
    assert trend([0.0]) == "▁"
    assert len(trend([0.5] * 1000)) == 40


def test_durations_are_told_in_the_unit_that_fits() -> None:
    assert [duration(value) for value in (45, 200.4, 3725, None, -1, NAN)] == [
        "45 s",
        "3 min 20 s",
        "1 h 02 min",
        "–",
        "–",
        "–",
    ]


@pytest.mark.parametrize(
    ("mixed", "cut", "said"),
    [
        ([0, 0, 0], 0.5, "all responses to a prompt got the same reward (mean 0.250)"),
        ([0, 0, 0], 1.0, "all responses were cut at rollout.max_response_tokens"),
        ([4, 0, 0, 0], 0.5, "nothing was learned"),
        ([0, 0], 0.5, None),
        ([0, 0, 1], 0.5, None),
        ([0, 0, None], 0.5, None),
    ],
)
def test_steps_from_which_nothing_is_learned_are_told(mixed: list[Any], cut: float, said: str | None) -> None:
    rows = [
        {"step": n, "mixed_groups": count, "reward": 0.25, "overlong": cut, "grad_norm": 0.0}
        for n, count in enumerate(mixed)
    ]
    told = stalled(rows)
    assert stalled([row | {"grad_norm": 0.1} for row in rows]) is None  # A term beside the rewards moves the weights.
    assert told is None if said is None else said in str(told)


def test_rows_left_out_are_shown_only_where_there_are_any() -> None:
    assert "rows left out" not in printed(render(STATUS, []))
    shown = printed(render(STATUS | {"rows_skipped": 12}, []))
    assert "rows left out" in shown
    assert "12" in shown
