"""The report's drawings: each takes the rows that count (`rows.last_rows`) and gives one inline SVG text.

No text of a run enters a drawing, and pyplot's global state is not used: a report can be written from any thread.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deltal.results.rows import Row, at, column, interval, items, number

PHASES = ("wait", "assemble", "forward_backward", "optimizer", "instrument", "publish", "checkpoint")
EXPONENTS = {"dr_grpo": 0.0, "dapo": 0.0, "sequence_sum": 0.0, "grpo": 1.0}
"""How a token coefficient falls with length, c ∝ L^-exponent; delta_l's is its α."""
# `none` keeps text as text (small files), a fixed salt makes equal runs give equal reports.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "deltal", "axes.spines.top": False, "axes.spines.right": False}


def draw(paint: Callable[[Axes], None], *, width: float = 6.4, height: float = 3.0) -> str:
    """An SVG of what `paint` draws on fresh axes, without XML header and metadata. Sizes in inches."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(left=0.15, right=0.98, top=0.96, bottom=0.17)  # a layout engine would draw all twice
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(alpha=0.25)
        paint(axes)
        if axes.get_yscale() == "linear" and axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)  # a cut-off axis makes noise look like a change
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small", edgecolor="none")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def lines(rows: Sequence[Row], named: Mapping[str, tuple[str, ...]], y_label: str) -> Callable[[Axes], None]:
    """Paints one line a name over steps; `named` maps a name to its path in a row."""

    def paint(axes: Axes) -> None:
        for name, path in named.items():
            axes.plot(column(rows, "step"), column(rows, *path), label=name, marker=".", linewidth=1.2)
        _step_axis(axes, y_label)

    return paint


def reward(rows: Sequence[Row], summary: Row) -> str:
    """Reward and accuracy of each batch, and the held-out evaluations with their 95% intervals."""

    def paint(axes: Axes) -> None:
        lines(rows, {"reward": ("reward",), "accuracy": ("accuracy",)}, "mean of a batch")(axes)
        versions, accuracies, below, above = [], [], [], []
        for evaluation in _evaluations(rows, summary):
            accuracy = number(at(evaluation, "accuracy"))
            low, high = interval(at(evaluation, "interval_95"))
            versions.append(number(at(evaluation, "version")))
            accuracies.append(accuracy)
            below.append(max(0.0, accuracy - low) if math.isfinite(accuracy - low) else 0.0)
            above.append(max(0.0, high - accuracy) if math.isfinite(high - accuracy) else 0.0)
        if any(map(math.isfinite, accuracies)):
            axes.errorbar(
                versions, accuracies, yerr=[below, above], fmt="D", color="black", capsize=3, label="held-out"
            )

    return draw(paint)


def lengths(rows: Sequence[Row]) -> str:
    """Response lengths over steps: median, and the bands of the middle half, the middle 80% and all."""
    table = np.full((len(rows), 7), np.nan)
    for i, row in enumerate(rows):
        quantiles = items(row.get("length_quantiles"))
        if len(quantiles) == 7:
            table[i] = [number(value) for value in quantiles]

    def paint(axes: Axes) -> None:
        steps = column(rows, "step")
        for low, high, shade, name in ((0, 6, 0.1, "all"), (1, 5, 0.2, "middle 80%"), (2, 4, 0.3, "middle half")):
            axes.fill_between(
                steps, table[:, low], table[:, high], color="tab:blue", alpha=shade, linewidth=0, label=name
            )
        axes.plot(steps, table[:, 3], color="tab:blue", label="median", marker=".")
        _step_axis(axes, "tokens a response")

    return draw(paint)


def coefficients(rows: Sequence[Row], summary: Row) -> str:
    """Token coefficient times M against length in the step whose lengths are furthest apart, with the method's law.

    The law gives the slope (c ∝ L^-α); its height is the samples' median, as only some of the batch are kept.
    """
    chosen = max(rows, key=lambda row: _spread(_samples(row)), default={})
    samples, method = _samples(chosen), summary.get("method")
    used = number(at(chosen, "variance", "alpha"))  # `alpha: auto` has another one each step
    alpha = used if math.isfinite(used) else number(summary.get("alpha"))
    exponent = alpha if method == "delta_l" else EXPONENTS.get(str(method), math.nan)

    def paint(axes: Axes) -> None:
        axes.set_xlabel("response length in tokens")
        axes.set_ylabel("token coefficient × M")
        if not len(samples):
            return
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.scatter(samples[:, 0], samples[:, 1], s=14, label=f"responses of step {number(chosen['step']):g}")
        if math.isfinite(exponent):
            height = np.median(samples[:, 1] * samples[:, 0] ** exponent)
            grid = np.geomspace(samples[:, 0].min(), samples[:, 0].max(), 50)
            axes.plot(grid, height * grid**-exponent, color="tab:red", label=f"law: length to the power −{exponent:g}")

    return draw(paint)


def gradient(rows: Sequence[Row]) -> str:
    """Norm of the reduced gradient; clipped and skipped steps are marked."""

    def paint(axes: Axes) -> None:
        lines(rows, {"gradient norm": ("grad_norm",)}, "before the clip")(axes)
        clipped = [row for row in rows if row.get("clipped") is True]
        if clipped:
            axes.scatter(
                column(clipped, "step"), column(clipped, "grad_norm"), marker="v", color="tab:red", label="clipped"
            )
        for i, row in enumerate(row for row in rows if row.get("skipped") is True):
            axes.axvline(number(row["step"]), color="tab:orange", linestyle=":", label="" if i else "skipped")

    return draw(paint)


def throughput(rows: Sequence[Row]) -> str:
    """Tokens a second of the rollout fleet and of the learner."""
    named = {"rollout": ("rollout_tokens_per_second",), "learner": ("learner_tokens_per_second",)}
    return draw(lines(rows, named, "tokens a second"))


def variance(rows: Sequence[Row]) -> str:
    """What each aggregation's update would have varied, dr_grpo = 1."""
    tellings = [at(row, "variance", "methods") for row in rows]
    methods = sorted({method for told in tellings if isinstance(told, Mapping) for method in told})
    named = {method: ("variance", "methods", method, "relative_variance") for method in methods}
    return draw(lines(rows, named, "variance of the update / dr_grpo"))


def beta(rows: Sequence[Row]) -> str:
    """β of each batch with its interval, smoothed, and the α used."""

    def paint(axes: Axes) -> None:
        steps, fitted = np.array(column(rows, "step")), np.array(column(rows, "variance", "beta"))
        ends = np.array([interval(at(row, "variance", "beta_interval_95")) for row in rows]).reshape(-1, 2)
        known = ~np.isnan(fitted)
        reach = np.abs(ends - fitted[:, None])[known].T
        axes.errorbar(steps[known], fitted[known], yerr=reach, fmt="o", markersize=3, alpha=0.5, label="β of the batch")
        lines(rows, {"β smoothed": ("variance", "beta_smoothed"), "α": ("variance", "alpha")}, "exponent")(axes)
        low, high = axes.get_ylim()  # a batch that says nearly nothing must not flatten the others
        axes.set_ylim(max(low, -1.0), min(high, 3.0))

    return draw(paint)


def staleness(rows: Sequence[Row]) -> str:
    """Versions between a group's oldest token and its batch."""
    return draw(lines(rows, {"mean": ("staleness_mean",), "largest": ("staleness_max",)}, "versions"))


def phases(rows: Sequence[Row]) -> str:
    """Where the time of each step went, stacked."""

    def paint(axes: Axes) -> None:
        steps = np.array(column(rows, "step"))
        bottom = np.zeros(len(rows))
        for phase in PHASES:
            seconds = np.nan_to_num(column(rows, "seconds", phase))
            axes.bar(steps, seconds, bottom=bottom, width=0.9, label=phase.replace("_", " + "))
            bottom = bottom + seconds
        _step_axis(axes, "seconds")

    return draw(paint)


def _step_axis(axes: Axes, y_label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _samples(row: Row) -> np.ndarray[Any, Any]:
    """float64[n, 2] of the row's positive (length, coefficient · M) pairs: a logarithm takes no others."""
    pairs = [interval(pair) for pair in items(row.get("coefficient_samples"))]
    kept = [pair for pair in pairs if pair[0] > 0 and pair[1] > 0]
    return np.array(kept) if kept else np.empty((0, 2))


def _spread(samples: np.ndarray[Any, Any]) -> float:
    """Longest over shortest; 0 without samples."""
    return float(samples[:, 0].max() / samples[:, 0].min()) if len(samples) else 0.0


def _evaluations(rows: Sequence[Row], summary: Row) -> list[Row]:
    """The evaluations; of a run that recorded none, before and after alone."""
    recorded = [evaluation for evaluation in items(summary.get("evaluations")) if isinstance(evaluation, Mapping)]
    if recorded:
        return recorded
    last = rows[-1]["step"] if rows else summary.get("steps")
    before = {"version": 0, "accuracy": summary.get("accuracy_before")}
    return [before, {"version": last, "accuracy": summary.get("accuracy_after")}]
