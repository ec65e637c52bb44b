"""report.html: one self-contained page that tells what a run did, from its rows and its summary alone.

Everything that is text of a run is escaped, and the page's own policy forbids scripts: it may be opened and mailed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from deltal.results import charts
from deltal.results.rows import MISSING, Row, at, items, last_rows, number, show, show_interval

__all__ = ["last_rows", "write_report"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { border-bottom: 1px solid #d0d7de; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { color: #57606a; font-size: .9rem; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
LEDGER = ("issued", "consumed", "filtered", "evicted", "in_flight")


def write_report(rows: list[dict[str, Any]], summary: Row, settings: Row | None = None) -> str:
    """The page as text. `rows` are metrics.jsonl's, `summary` is summary.json with name, method and evaluations,
    `settings` those of config.yaml.

    Anything may be missing: what is not known is a dash or an empty drawing.
    """
    counted = last_rows(rows)
    title = html.escape(f"deltal run {show(summary.get('name'))}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        "<h2>In short</h2>",
        _table(_highlights(counted, summary)),
        "<h2>Before and after</h2>",
        _before_after(summary),
        "<h2>Over the steps</h2>",
        '<div class="charts">',
        *_figures(counted, summary),
        "</div>",
        "<h2>Ledger</h2>",
        _ledger(summary),
        "<h2>Seconds by phase</h2>",
        _table(_mapping_rows(summary.get("seconds"), digits=1)),
        "<h2>Settings</h2>",
        _table(_mapping_rows(settings)),
        "</body></html>",
    ]
    return "\n".join(parts)


def _table(lines: list[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """A table of texts, all escaped; its first column are headings."""
    if not lines:
        return f"<p>{MISSING}</p>"
    body = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _mapping_rows(facts: Any, digits: int = 3) -> list[tuple[str, ...]]:
    """A line a key; nested mappings are flattened to dotted keys."""
    if not isinstance(facts, Mapping):
        return []
    lines: list[tuple[str, ...]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [(f"{key}.{inner[0]}", *inner[1:]) for inner in _mapping_rows(value, digits)]
        else:
            lines.append((str(key), show(value, digits)))
    return lines


def _highlights(rows: list[Row], summary: Row) -> list[tuple[str, ...]]:
    method = show(summary.get("method"))
    alpha = summary.get("alpha")
    clipped = sum(row.get("clipped") is True for row in rows)
    skipped = sum(row.get("skipped") is True for row in rows)
    redone = sum(row.get("redone") is True for row in rows)
    differences = [value for row in rows if (value := number(row.get("logprob_difference_max"))) == value]
    return [
        ("state", show(summary.get("state"))),
        ("steps", show(summary.get("steps"))),
        ("policy version", show(summary.get("policy_version"))),
        ("aggregation", method if alpha is None else f"{method}, α = {show(alpha)}"),
        ("tokens a second, rollout", show(at(summary, "tokens_per_second", "rollout"), 1)),
        ("tokens a second, learner", show(at(summary, "tokens_per_second", "learner"), 1)),
        ("steps clipped, skipped, redone", f"{clipped}, {skipped}, {redone} of {len(rows)}"),
        (
            "largest engine–learner difference",
            f"{show(max(differences, default=None))} nats, known of {len(differences)} of {len(rows)} steps: only "
            "tokens of the learner's own version are compared",
        ),
        ("restarts", ", ".join(" ".join(pair) for pair in _mapping_rows(summary.get("restarts"))) or "none"),
        ("prompts skipped", show(summary.get("prompts_skipped"))),
    ]


def _before_after(summary: Row) -> str:
    before, after = number(summary.get("accuracy_before")), number(summary.get("accuracy_after"))
    lines: list[tuple[str, ...]] = [
        ("before", show(before), MISSING),
        ("after", show(after), MISSING),
        ("gain", show(after - before), show_interval(summary.get("gain_interval_95"))),
    ]
    text = _table(lines, ("held-out", "accuracy", "95% interval"))
    evaluations = [found for found in items(summary.get("evaluations")) if isinstance(found, Mapping)]
    if evaluations:
        text += _table(
            [
                (
                    show(found.get("version")),
                    show(found.get("accuracy")),
                    show_interval(found.get("interval_95")),
                    show(found.get("prompts")),
                    ", ".join(show(version) for version in items(found.get("versions"))) or MISSING,
                )
                for found in evaluations
            ],
            ("policy version", "accuracy", "95% interval", "prompts", "versions its tokens came from"),
        )
    return text


def _ledger(summary: Row) -> str:
    """The five numbers, and whether issued = consumed + filtered + evicted + in flight."""
    values = [number(at(summary, "ledger", name)) for name in LEDGER]
    holds = "–" if any(value != value for value in values) else show(values[0] == sum(values[1:]))
    lines: list[tuple[str, ...]] = [
        (name.replace("_", " "), show(value)) for name, value in zip(LEDGER, values, strict=True)
    ]
    return _table([*lines, ("issued = sum of the others", holds)])


def _figures(rows: list[Row], summary: Row) -> list[str]:
    """Drawing and caption of each chart."""
    drawn = [
        (charts.reward(rows, summary), "Reward and accuracy of each batch; diamonds: held-out evaluations with 95%."),
        (charts.lengths(rows), "Response lengths: median and bands."),
        (
            charts.coefficients(rows, summary),
            "Token coefficient times M against length, and the aggregation's law (slope from the method, height from "
            "the samples).",
        ),
        (charts.gradient(rows), "Gradient norm before the clip; triangles: clipped steps, dotted: skipped ones."),
        (
            charts.variance(rows),
            "Variance each aggregation's update would have had on these batches, from sketched gradients; dr_grpo = 1.",
        ),
        (charts.beta(rows), "β of each batch with its 95% interval, smoothed, and the α that was used."),
        (charts.throughput(rows), "Throughput of rollout and learner."),
        (charts.staleness(rows), "Staleness of the batches."),
        (charts.phases(rows), "Where each step's time went."),
    ]
    return [f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for svg, caption in drawn]
