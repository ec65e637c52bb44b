"""Laws of the report: it survives any row, shows text as text, and draws what the rows say."""

import copy
import re
import xml.etree.ElementTree
from functools import cache
from typing import Any

import pytest
from matplotlib.figure import Figure

from deltal.results import charts
from deltal.results.report import last_rows, write_report
from deltal.results.rows import show, show_interval

HOSTILE = "</title><script>alert(1)</script>$\\frac{x}$&"
NAN = float("nan")


def row(step: int, **changes: Any) -> dict[str, Any]:
    lengths = [10 + step, 20 + step, 40 + step]
    return {
        "step": step,
        "version": step - 1,
        "time": 1.7e9 + step,
        "reward": 0.1 * step,
        "accuracy": 0.09 * step,
        "response_length": 24.0,
        "length_quantiles": [1, 5, 10, 20, 40, 60, 64],
        "coefficient_samples": [[length, 1 / length / 8] for length in lengths],
        "loss": -0.01,
        "grad_norm": 0.2,
        "entropy": 1.1,
        "clip_fraction": 0.01,
        "learning_rate": 1e-6,
        "clipped": step == 2,
        "skipped": step == 3,
        "redone": False,
        "groups": 8,
        "mixed_groups": 5,
        "responses": 64,
        "tokens": 1536,
        "staleness_mean": 0.5,
        "staleness_max": 1,
        "logprob_difference_mean": 5e-6,
        "logprob_difference_max": 9e-5,
        "importance_mean": 1.0,
        "seconds": dict.fromkeys(charts.PHASES, 1.0),
        "learner_tokens_per_second": 160.0,
        "rollout_tokens_per_second": 139.0,
        "variance": {
            "alpha": 1.0,
            "beta": 0.9 + 0.1 * step,
            "beta_interval_95": [0.5 + 0.1 * step, 1.3 + 0.1 * step],
            "beta_smoothed": 1.0,
            "methods": {"delta_l": {"relative_variance": 0.6}, "dr_grpo": {"relative_variance": 1.0}},
        },
        **changes,
    }


SUMMARY: dict[str, Any] = {
    "name": "night",
    "state": "done",
    "steps": 3,
    "policy_version": 3,
    "accuracy_before": 0.2,
    "accuracy_after": 0.9,
    "gain_interval_95": [0.62, 0.76],
    "seconds": {"wait": 10.0, "publish": 2.5},
    "tokens_per_second": {"rollout": 139.0, "learner": 160.0},
    "ledger": {"issued": 40, "consumed": 24, "evicted": 1, "filtered": 3, "in_flight": 12},
    "address": "http://127.0.0.1:1234",
    "method": "delta_l",
    "alpha": 1.0,
    "evaluations": [
        {"version": 0, "accuracy": 0.2, "prompts": 100, "interval_95": [0.13, 0.29], "versions": [0]},
        {"version": 3, "accuracy": 0.9, "prompts": 100, "interval_95": [0.83, 0.94], "versions": [3]},
    ],
    "restarts": {"rollout": 2},
    "prompts_skipped": 4,
}
FULL = [row(step) for step in (1, 2, 3)]


@cache
def full_report() -> str:
    return write_report(FULL, SUMMARY)


def test_the_last_row_of_a_step_counts() -> None:
    rows = [row(1), row(2), row(3), row(2, reward=9.0, redone=True), {"no": "step"}]
    assert [(found["step"], found["reward"]) for found in last_rows(rows)] == [
        (1, 0.1),
        (2, 9.0),
        (3, 0.30000000000000004),
    ]


def test_a_report_holds_every_section_and_every_drawing() -> None:
    text = full_report()
    assert text.count("<svg") == 9
    for expected in ("0.200", "0.900", "0.700", "[0.620, 0.760]", "139", "rollout 2", "delta_l, α = 1", "0.0001"):
        assert expected in text.replace("9.00e-05", "0.0001")
    assert re.search(r"issued = sum of the others</th><td>yes", text)


def test_no_point_lies_outside_its_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, buffer, **_: (drawn.append(self), buffer.write("<svg/>")))
    write_report(FULL, SUMMARY)
    for axes in (figure.axes[0] for figure in drawn):
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for line in axes.get_lines():
            if line.get_transform() != axes.transData:
                continue  # a mark across the whole height, not points
            assert all(left <= x <= right and bottom <= y <= top for x, y in line.get_xydata())
    assert len(drawn) == 9


def test_every_drawing_is_well_formed_xml() -> None:
    for svg in re.findall(r"<svg.*?</svg>", full_report(), re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)


def test_a_report_asks_for_nothing_from_outside_and_runs_no_script() -> None:
    text = full_report()
    assert not re.search(r"<script|<link|<img|@import|src=|href=\"(?!#)|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_text_of_a_run_is_escaped_wherever_it_stands() -> None:
    texts = dict.fromkeys(("name", "state", "steps", "method", "alpha", "policy_version", "accuracy_before"), HOSTILE)
    summary = {
        **SUMMARY,
        **texts,
        "restarts": {HOSTILE: HOSTILE},
        "seconds": {HOSTILE: 1.0},
        "config": {"data": {HOSTILE: HOSTILE}},
        "evaluations": [{"version": HOSTILE, "accuracy": HOSTILE, "versions": [HOSTILE]}],
    }
    text = write_report([row(1, reward=HOSTILE, seconds=HOSTILE)], summary)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize("value", [None, NAN, "word", [None, "x"]])
@pytest.mark.parametrize("which", ["row", "summary"])
def test_no_value_breaks_a_report(which: str, value: Any) -> None:
    rows, summary = copy.deepcopy(FULL), copy.deepcopy(SUMMARY)
    if which == "row":
        rows = [{key: (key == "step" and found) or value for key, found in original.items()} for original in rows]
    else:
        summary = dict.fromkeys(summary, value)
    assert write_report(rows, summary).endswith("</html>")


def test_nothing_at_all_still_makes_a_report() -> None:
    assert write_report([], {}).count("<svg") == 9
    assert write_report([{"step": 1}], {}).count("<svg") == 9


def test_equal_runs_give_equal_reports() -> None:
    assert full_report() == write_report(copy.deepcopy(FULL), copy.deepcopy(SUMMARY))


@pytest.mark.parametrize(
    ("method", "alpha", "slope"), [("delta_l", 0.75, "0.75"), ("grpo", None, "1"), ("dapo", None, "0")]
)
def test_the_law_of_the_coefficients_follows_the_method(method: str, alpha: float | None, slope: str) -> None:
    rows = [{**row, "variance": {"alpha": alpha}} for row in FULL]  # the step's own: `alpha: auto` changes it
    svg = charts.coefficients(rows, {"method": method, "alpha": "auto"})
    assert f"law: length to the power −{slope}<" in svg
    assert "law" not in charts.coefficients(FULL, {"method": "new_method"})


def test_a_ledger_that_does_not_add_up_is_said_so() -> None:
    ledger = {**SUMMARY["ledger"], "consumed": 23}
    assert re.search(r"issued = sum of the others</th><td>no", write_report([], {"ledger": ledger}))


def test_numbers_are_shown_for_people() -> None:
    assert [show(value) for value in (None, NAN, 3, 3.0, 0.25, 1234567, 2e-6, True, "x")] == [
        "–",
        "–",
        "3",
        "3",
        "0.250",
        "1,234,567",
        "2.00e-06",
        "yes",
        "x",
    ]
    assert show_interval([0.1, 0.25]) == "[0.100, 0.250]"
    assert show_interval([0.1]) == "–"
