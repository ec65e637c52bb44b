"""α while training: how fast the variance of a response's gradient grows with its length.

Under Var(g_i) ∝ L_i^β the unbiased weights of least variance are L_i^-β (arXiv 2509.07558 takes β = 1). β is fitted
anew from each batch's sketches and smoothed over batches; until its interval is narrow, a configured α serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltal.config.algorithm import AutoAlpha

HUBER = 1.345
"""Residuals beyond so many standard deviations count less: 95% efficient under normal noise (Huber 1964)."""
LEAST_RESPONSES, LEAST_GROUPS = 8, 4
RESAMPLES = 200
Z95 = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class BetaFit:
    """β of one batch with its 95% interval, and how many responses it rests on."""

    beta: float
    deviation: float
    """Standard deviation of β over bootstrap resamples of whole groups."""
    responses: int

    @property
    def interval(self) -> tuple[float, float]:
        """95%."""
        return self.beta - Z95 * self.deviation, self.beta + Z95 * self.deviation


def fit_beta(lengths: Tensor, squared_norms: Tensor, groups: Tensor, *, seed: int = 0) -> BetaFit | None:
    """Robust regression of log ‖g_i‖² on log L_i: Huber's M-estimate, interval by bootstrap over groups.

    `lengths` int[n], `squared_norms` float[n], `groups` int[n]: of score-function gradients with unit advantage, whose
    mean is zero, so that ‖g_i‖² estimates the variance. Responses without length or gradient are left out. Returns
    None when fewer than 8 of them or 4 groups are left (too few for an interval), or all have one length. β counts
    as no surer than independent residuals would make it.
    """
    used = (lengths > 0) & (squared_norms > 0) & torch.isfinite(squared_norms)
    x, y = lengths[used].double().log(), squared_norms[used].double().log()
    _, group = torch.unique(groups[used], return_inverse=True)
    if len(x) < LEAST_RESPONSES or int(group.max()) + 1 < LEAST_GROUPS or float(x.max() - x.min()) < 1e-9:
        return None
    scale = 0.0
    once = torch.ones(1, len(x), dtype=torch.float64)
    slope, offset = _line(x, y, once)
    for _ in range(10):
        residual = y - offset[:, None] - slope[:, None] * x
        scale = max(1.4826 * float(residual.abs().median()), 1e-9)
        slope, offset = _line(x, y, once * _huber(residual, scale))
    draw = torch.Generator().manual_seed(seed)
    count = int(group.max()) + 1
    picks = torch.randint(count, (RESAMPLES, count), generator=draw)
    times = torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add(
        1, picks, torch.ones(picks.shape, dtype=torch.float64)
    )[:, group]
    slopes, offsets = slope.repeat(RESAMPLES), offset.repeat(RESAMPLES)
    for _ in range(5):
        residual = y - offsets[:, None] - slopes[:, None] * x
        slopes, offsets = _line(x, y, times * _huber(residual, scale))
    slopes = slopes[torch.isfinite(slopes)]
    if len(slopes) < RESAMPLES // 2:
        return None
    plain = scale / float((x - x.mean()).square().sum().sqrt())
    return BetaFit(beta=float(slope), deviation=max(float(slopes.std()), plain), responses=len(x))


def _huber(residual: Tensor, scale: float) -> Tensor:
    return (HUBER * scale / residual.abs().clamp(min=1e-12)).clamp(max=1.0)


def _line(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset, float64[R] each, of R weighted least-squares fits; `weights` [R, n]."""
    total = weights.sum(1)
    middle, height = weights @ x / total, weights @ y / total
    off = x - middle[:, None]
    slope = (weights * off * (y - height[:, None])).sum(1) / (weights * off.square()).sum(1)
    return slope, height - slope * middle


@dataclass(frozen=True, kw_only=True, slots=True)
class AlphaEstimate:
    """β smoothed over batches: a random walk observed with noise (Kalman 1960). Part of a checkpoint."""

    mean: float = 0.0
    variance: float = float("inf")
    batches: int = 0

    def updated(self, fit: BetaFit | None, settings: AutoAlpha) -> AlphaEstimate:
        """With one batch more; None leaves the mean and widens the interval."""
        before = self.variance + settings.drift**2
        if fit is None:
            return AlphaEstimate(mean=self.mean, variance=before, batches=self.batches)
        noise = fit.deviation**2
        if before == float("inf"):
            return AlphaEstimate(mean=fit.beta, variance=noise, batches=self.batches + 1)
        gain = before / (before + noise)
        return AlphaEstimate(
            mean=self.mean + gain * (fit.beta - self.mean), variance=(1 - gain) * before, batches=self.batches + 1
        )

    @property
    def half_width(self) -> float:
        """Of the 95% interval."""
        return Z95 * float(self.variance**0.5)

    def alpha(self, settings: AutoAlpha) -> float:
        """α to train with: the mean within the configured range, or the fallback while the interval is too wide."""
        if not self.batches or self.half_width > settings.certain_within:
            return settings.fallback
        return min(max(self.mean, settings.low), settings.high)
