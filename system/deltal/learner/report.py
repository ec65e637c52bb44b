"""The row of metrics.jsonl that one step leaves: plain numbers, one meaning each."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from deltal.config import RunConfig
from deltal.learner.step import StepResult
from deltal.types import Batch


def step_row(
    batch: Batch,
    result: StepResult,
    config: RunConfig,
    *,
    learning_rate: float,
    seconds: dict[str, float],
    redone: bool,
) -> dict[str, Any]:
    """All figures of one step; lengths in tokens, times in seconds, coefficients times M."""
    verdicts = [verdict for scored in batch.groups for verdict in scored.verdicts]
    responses = [response for scored in batch.groups for response in scored.group.responses]
    lengths = np.array([response.length for response in responses])
    staleness = [batch.version - scored.group.oldest_version for scored in batch.groups]
    sums, busy = result.sums, seconds["forward_backward"] + seconds.get("optimizer", 0.0)
    tokens, same = max(sums.tokens, 1.0), sums.same_version
    picked = np.unique(np.linspace(0, len(lengths) - 1, 32).round().astype(int))
    return {
        "step": batch.version + 1,
        "version": batch.version,
        "time": time.time(),
        "reward": float(np.mean([verdict.reward for verdict in verdicts])),
        "accuracy": float(np.mean([verdict.correct for verdict in verdicts])),
        "overlong": float(np.mean([response.finish == "length" for response in responses])),
        "response_length": float(lengths.mean()),
        "length_quantiles": [float(q) for q in np.quantile(lengths, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])],
        "coefficient_samples": [
            [int(lengths[i]), float(batch.coefficients[i] * config.rollout.max_response_tokens)] for i in picked
        ],
        "loss": sums.loss,
        "grad_norm": result.grad_norms[-1],
        "grad_norms": result.grad_norms,
        "entropy": sums.entropy / tokens,
        "clip_fraction": sums.clipped / tokens,
        "learning_rate": learning_rate,
        "clipped": result.clipped,
        "skipped": result.skipped,
        "redone": redone,
        "groups": len(batch.groups),
        "mixed_groups": sum(len({v.reward for v in scored.verdicts}) > 1 for scored in batch.groups),
        "responses": len(responses),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(sums.tokens),
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": int(max(staleness)),
        "logprob_difference_mean": sums.difference / same if same else None,
        "logprob_difference_max": sums.difference_max if same else None,
        "logprob_compared": same / tokens,
        "engine_kl": sums.engine_kl / same if same else None,
        "importance_mean": sums.importance / tokens,
        "importance_bounded": sums.bounded / tokens,
        "reference_kl": sums.reference_kl / tokens if config.algorithm.has_reference else None,
        "variance": result.variance,
        "seconds": seconds,
        "learner_tokens_per_second": sums.tokens / busy if busy > 0 else 0.0,
    }
