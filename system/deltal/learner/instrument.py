"""What one batch's sketches tell: β, the α of the next batch, and what every aggregation would have done."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from deltal.algorithm import AGGREGATIONS, token_coefficients
from deltal.algorithm.alpha import AlphaEstimate, fit_beta
from deltal.algorithm.sketch import Sketcher, gram
from deltal.algorithm.variance import by_length, would_have_done
from deltal.config import RunConfig
from deltal.types import Batch


class Instrument:
    """Holds the sketcher and the estimate of β; one a rank, all with the same numbers.

    Args:
        config: of the run.
        vocabulary, width: V and d of the head.
        device: where the head computes.
    """

    def __init__(self, config: RunConfig, *, vocabulary: int, width: int, device: str) -> None:
        self._config = config
        settings = config.algorithm.sketch
        self.estimate = AlphaEstimate()
        self._sketcher = (
            Sketcher(vocabulary, width, size=settings.size, seed=config.run.seed, device=device)
            if settings.every
            else None
        )

    def alpha(self) -> float:
        """α of the next batch: configured, or estimated from the batches before it."""
        aggregation: Any = self._config.algorithm.aggregation
        configured = getattr(aggregation, "alpha", 1.0)
        return self.estimate.alpha(aggregation.auto) if configured == "auto" else float(configured)

    def sketcher(self, batch: Batch) -> Sketcher | None:
        """To be shown the head during this batch's forwards; None when the batch is not to be sketched."""
        if self._sketcher is None or batch.version % self._config.algorithm.sketch.every:
            return None
        self._sketcher.begin(len(batch.advantages))
        return self._sketcher

    def read(self, batch: Batch, sketcher: Sketcher, alpha: float) -> dict[str, Any]:
        """Figures of a trained batch for its row, and the estimate updated. All ranks call it together.

        Responses whose forward was left out (advantage 0) have no sketch: they count as gradient 0 in the aggregations'
        figures, which is exact, and are not in β.
        """
        sketches = sketcher.sketches
        if dist.get_world_size() > 1:
            # Each rank forwarded other responses; rows it did not see are zero.
            dist.all_reduce(sketches)
        products = gram(sketches)
        lengths = torch.tensor([r.length for scored in batch.groups for r in scored.group.responses])
        lengths[torch.from_numpy(batch.coefficients.copy()) == 0] = 0
        groups = torch.repeat_interleave(
            torch.arange(len(batch.groups)), torch.tensor([len(scored.verdicts) for scored in batch.groups])
        )
        fit = fit_beta(lengths, products.diagonal(), groups)
        aggregation: Any = self._config.algorithm.aggregation
        if hasattr(aggregation, "auto"):
            self.estimate = self.estimate.updated(fit, aggregation.auto)
        told: dict[str, Any] = {
            "alpha": alpha,
            "beta": fit.beta if fit else None,
            "beta_interval_95": list(fit.interval) if fit else None,
            "beta_smoothed": self.estimate.mean if self.estimate.batches else None,
            "beta_half_width": self.estimate.half_width if self.estimate.batches else None,
            "sketched": int((products.diagonal() > 0).sum()),
        }
        if not bool((lengths > 0).any()):
            return told
        limit = self._config.rollout.max_response_tokens
        advantages = torch.from_numpy(batch.advantages.copy())
        coefficients = {
            method: token_coefficients(method, lengths, max_length=limit, alpha=alpha) for method in AGGREGATIONS
        }
        told["methods"] = would_have_done(products, lengths, advantages, coefficients, max_length=limit)
        seen = (products.diagonal() > 0) & (lengths > 0)
        if int(seen.sum()) > 1:
            scale = advantages.double()[seen]
            weighted = products[seen][:, seen] * scale[:, None] * scale[None, :]
            told["by_length"] = by_length(weighted, lengths[seen], groups[seen])
        return told

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return dataclasses.asdict(self.estimate) if self.estimate.batches else {}

    def restore(self, state: dict[str, Any] | None) -> None:
        """From a checkpoint."""
        self.estimate = AlphaEstimate(**state) if state else AlphaEstimate()
