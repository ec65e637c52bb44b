"""The variance instrument offline: real rollouts, exact gradients, the paper's picture. `deltal variance`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from rich.console import Group
from rich.table import Table

from deltal.algorithm import AGGREGATIONS, advantages, token_coefficients
from deltal.algorithm.alpha import BetaFit, fit_beta
from deltal.algorithm.variance import by_length, deviations, empirical_bias, would_have_done
from deltal.config import RunConfig
from deltal.errors import UserError
from deltal.learner.gradients import measure
from deltal.types import ScoredGroup

SPREAD = {
    "scale": "Σc·M",
    "cv2": "cv²",
    "cv2_sketched": "by sketches",
    "relative_variance": "var/dr_grpo",
    "relative_variance_sketched": "by sketches",
}
"""Key of a method's row to its heading. There are two tables, so that each fits 80 columns."""
BIAS = {
    "cosine": "cosine",
    "size": "size",
    "expected_cosine": "E cosine",
    "expected_size": "E size",
    "expected_relative_error": "E error",
    "positive": "A>0 mass",
}


def instrument(
    model: str, groups: Sequence[ScoredGroup], config: RunConfig, *, parameters: str,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """All figures of one pool of rollouts; `groups` were sampled from `model`.

    Raises UserError when no response has a policy-written token, or the gradients do not fit into memory.
    """
    if not any(response.length for scored in groups for response in scored.group.responses):
        raise UserError("no response has a token: there is nothing to measure")
    rewards = [verdict.reward for scored in groups for verdict in scored.verdicts]
    settings, limit = config.algorithm, config.rollout.max_response_tokens
    products = measure(
        model, groups, temperature=config.rollout.temperature, parameters=parameters,
        size=settings.sketch.size, seed=config.run.seed, advance=advance,
    )  # fmt: skip
    length, group = products.lengths, products.groups
    advantage = advantages(rewards, group, kind=settings.advantage)
    fits = {
        name: fit_beta(length, gram.diagonal(), group)
        for name, gram in (("exact", products.exact), ("sketched", products.sketched[0]))
    }
    scale = advantage.double()
    weighted = products.exact * scale[:, None] * scale[None, :]
    methods = _methods(fits["exact"])
    told = {}
    coefficients = {
        name: token_coefficients(method, length, max_length=limit, alpha=alpha)
        for name, (method, alpha) in methods.items()
    }
    exact, *sketched = (
        would_have_done(gram, length, advantage, coefficients, max_length=limit)
        for gram in (products.exact, *products.sketched)
    )
    for name, (method, alpha) in methods.items():
        expected = empirical_bias(
            weighted, length, group,
            partial(token_coefficients, method, max_length=limit, alpha=alpha),
            groups_per_batch=config.replay.prompts_per_batch, max_length=limit, seed=config.run.seed,
        )  # fmt: skip
        told[name] = exact[name] | {
            **_spread("cv2", [one[name]["cv2"] for one in sketched]),
            **_spread("relative_variance", [one[name]["relative_variance"] for one in sketched]),
            **{f"expected_{key}": value for key, value in expected.items()},
        }
    return {
        "model": model,
        "parameters": parameters,
        "gradient_numbers": products.parameters,
        "prompts": len(groups),
        "responses": len(rewards),
        "tokens": int(length.sum()),
        "length_quantiles": [float(q) for q in np.quantile(length.numpy(), [0, 0.1, 0.5, 0.9, 1])],
        "accuracy": float(np.mean([verdict.correct for scored in groups for verdict in scored.verdicts])),
        "max_length": limit,
        "beta": {name: _told(fit) for name, fit in fits.items()},
        "methods": told,
        "by_length": by_length(weighted, length, group),
        "each": {
            "group": group.tolist(),
            "length": length.tolist(),
            "reward": rewards,
            "advantage": advantage.tolist(),
            "squared_norm": products.exact.diagonal().tolist(),
            "squared_norm_sketched": products.sketched[0].diagonal().tolist(),
            "squared_deviation": deviations(products.exact).tolist(),
        },
    }


def _methods(fit: BetaFit | None) -> dict[str, tuple[str, float]]:
    """Shown name to method and α; delta_l at the published values and at the fitted one."""
    named = {"delta_l α=1": ("delta_l", 1.0), "delta_l α=0.75": ("delta_l", 0.75)}
    if fit is not None:
        named[f"delta_l α=β={max(fit.beta, 0.0):.2f}"] = ("delta_l", max(fit.beta, 0.0))
    return named | {method: (method, 1.0) for method in AGGREGATIONS if method != "delta_l"}


def _spread(key: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over independent sketches; None when one of them cannot tell."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        f"{key}_sketched": float(np.mean(known)) if whole else None,
        f"{key}_sketched_deviation": float(np.std(known, ddof=1)) if whole else None,
    }


def _told(fit: BetaFit | None) -> dict[str, Any] | None:
    return None if fit is None else {"beta": fit.beta, "interval_95": list(fit.interval), "responses": fit.responses}


def table(facts: Mapping[str, Any]) -> Group:
    """The figures for a terminal."""
    tables = []
    for columns, what in ((SPREAD, "scale and variance"), (BIAS, "against the plain mean gradient")):
        methods = Table(title=what)
        for heading in ("aggregation", *columns.values()):
            methods.add_column(heading, justify="left" if heading == "aggregation" else "right")
        for name, row in facts["methods"].items():
            methods.add_row(name, *(_shown(row[key], row.get(f"{key}_deviation")) for key in columns))
        tables.append(methods)
    bins = Table(title="mean gradient of the update by length")
    for heading in ("tokens", "responses", "norm [95%]", "cosine with the mean [95%]"):
        bins.add_column(heading, justify="right")
    for row in facts["by_length"]:
        shown = [f"{row[key]:.3g} [{row[f'{key}_interval_95'][0]:.3g}, {row[f'{key}_interval_95'][1]:.3g}]"
                 for key in ("norm", "cosine")]  # fmt: skip
        bins.add_row(f"{row['from']}–{row['to']}", str(row["responses"]), *shown)
    betas = [
        f"β {name}: " + ("lengths cannot tell" if fit is None else
        f"{fit['beta']:.2f} [{fit['interval_95'][0]:.2f}, {fit['interval_95'][1]:.2f}]")
        for name, fit in facts["beta"].items()
    ]  # fmt: skip
    told = "{responses} responses, {tokens} tokens, gradients of {parameters}".format(**facts)
    return Group(told, *tables, bins, " · ".join(betas))


def _shown(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if deviation is None else f"{value:.3g} ± {deviation:.1g}"


def write(facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """`variance.json`, `methods.csv`, `responses.csv` and `variance.png` in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("variance.json", "methods.csv", "responses.csv", "variance.png")]
    paths[0].write_text(json.dumps(facts, indent=1))
    with paths[1].open("w", newline="") as file:
        columns = list(next(iter(facts["methods"].values())))
        writer = csv.writer(file)
        writer.writerow(["method", *columns])
        writer.writerows([name, *(row[column] for column in columns)] for name, row in facts["methods"].items())
    with paths[2].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(facts["each"])
        writer.writerows(zip(*facts["each"].values(), strict=True))
    _picture(facts, paths[3])
    return paths


def _picture(facts: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    _deviation(left, facts)
    names = list(facts["methods"])
    bars = (
        (middle, "scale", "bias: Σ c · M (1 = unbiased)"),
        (right, "relative_variance", "variance of the update / dr_grpo"),
    )
    for axes, key, title in bars:
        axes.barh(names, [facts["methods"][name][key] or 0.0 for name in names], color="tab:blue")
        axes.set_title(title, fontsize="medium")
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        if key == "scale":
            axes.set_xscale("log")
            axes.set_xlim(left=0.5)
    figure.savefig(path, dpi=120)


def _deviation(axes: Axes, facts: Mapping[str, Any]) -> None:
    length, deviation = np.array(facts["each"]["length"]), np.array(facts["each"]["squared_deviation"])
    shown = (length > 0) & (deviation > 0)
    axes.scatter(length[shown], deviation[shown], s=8, alpha=0.4, label="one response")
    fit = facts["beta"]["exact"]
    if fit:
        low, high = fit["interval_95"]
        ends = np.geomspace(length[shown].min(), length[shown].max(), 20)
        middle = np.exp(np.median(np.log(deviation[shown]) - fit["beta"] * np.log(length[shown])))
        label = f"β = {fit['beta']:.2f} [{low:.2f}, {high:.2f}]"
        axes.plot(ends, middle * ends ** fit["beta"], color="tab:red", label=label)
        axes.plot(ends, middle * ends[len(ends) // 2] ** (fit["beta"] - 1) * ends, "k:", label="β = 1 (the paper)")
    axes.set(xscale="log", yscale="log", xlabel="length L in tokens", ylabel="‖g - ḡ‖²", title="gradient deviation")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize="small")
