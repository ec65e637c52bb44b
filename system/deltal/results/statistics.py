"""Statistics of evaluations: accuracy and pass@k over prompts, gains over the same prompts, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000


def pass_at_k(responses: int, correct: int, k: int) -> float:
    """Chance that at least one of k responses drawn without replacement is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374) for k ≤ n; 0 for a prompt without responses.
    """
    return 1.0 - math.comb(responses - correct, k) / math.comb(responses, k) if responses >= k else 0.0


def pass_at(counts: Sequence[tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """`value` and `interval_95` of pass@k over prompts, by k = 1, 2, 4 … n; `counts`: (responses, correct) a prompt."""
    most = max((responses for responses, _ in counts), default=0)
    found = {}
    for k in (2**power for power in range(most.bit_length())):
        each = [pass_at_k(responses, correct, k) for responses, correct in counts]
        found[str(k)] = {"value": float(np.mean(each)), "interval_95": mean_interval(each)}
    return found


def best_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`version` of the checkpoint with the highest held-out accuracy and that `accuracy`; the earlier one of equals.

    None before the first evaluation that a checkpoint was made for.
    """
    rated = [row for row in rows if row.get("checkpoint") is not None and row.get("accuracy") is not None]
    best = max(rated, key=lambda row: row["accuracy"], default=None)
    return {"version": best["checkpoint"], "accuracy": best["accuracy"]} if best else None


def mean_interval(values: Sequence[float], *, seed: int = 0) -> list[float]:
    """95% bootstrap interval of the mean over prompts (percentiles of 10,000 resamples)."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, list[float]]:
    """Mean gain over the same prompts and its 95% interval, resampling prompts (paired bootstrap).

    Raises ValueError when the two are not about equally many prompts.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} prompts before, {len(after)} after: a paired gain needs the same ones")
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return float(gains.mean()), mean_interval(gains.tolist())
