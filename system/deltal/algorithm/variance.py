"""The variance instrument: what each aggregation makes of one batch, from inner products of per-response gradients.

Everything is computed from the Gram matrix K_ij = ⟨g_i, g_j⟩, exact or sketched (`sketch.py`): a weighted sum of
gradients has squared norm wᵀKw. With advantages A the gradients of the update are A_i g_i, and K becomes K · AAᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 200
LENGTH_BINS = 4


def debiased_square(gram: Tensor, weights: Tensor) -> float:
    """Unbiased estimate of ‖E g‖² · (Σw)² from independent gradients: the sum over pairs i ≠ j, scaled to all pairs.

    `gram` float64[n, n]; `weights` float64[n]. May be negative when noise is larger than the mean. Zero weight: 0.
    """
    pairs = float(weights.sum() ** 2 - weights.square().sum())
    if pairs <= 0:
        return 0.0
    crossed = float(weights @ gram @ weights - (weights.square() * gram.diagonal()).sum())
    return crossed / pairs * float(weights.sum() ** 2)


def deviations(gram: Tensor) -> Tensor:
    """Unbiased estimate of each response's variance E‖g_i - E g‖², float64[n]; single ones may be negative.

    E‖g_i - ḡ‖² = V_i (1 - 2/n) + Σ_j V_j / n²: without the correction the noise of ḡ, which is that of the longest
    responses, would be taken for the short ones' own.
    """
    n = len(gram)
    squares = gram.diagonal() - 2 * gram.mean(1) + gram.mean()
    if n < 3:
        return squares * n / max(n - 1, 1)
    total = squares.sum() * n / (n - 1)
    return (squares - total / n**2) / (1 - 2 / n)


def would_have_done(
    gram: Tensor, lengths: Tensor, advantages: Tensor, coefficients: Mapping[str, Tensor], *, max_length: int
) -> dict[str, dict[str, float | None]]:
    """Bias and variance of each aggregation on one batch.

    `gram` float64[n, n] of the score-function gradients; `lengths` int[n]; `advantages` float[n]; `coefficients`: of
    each method, float64[n]; `max_length` M. Per method:

    scale: Σ c_i · M, 1 for the unbiased ones (paper, section 3);
    cv2: Σ c_i² v_i / ((Σ c_i)² ‖E g‖²), the squared coefficient of variation of the update, v_i = ‖g_i - ḡ‖², ‖E g‖²
        without the bias that noise gives it; None when noise hides the mean;
    relative_variance: Σ c_i² v_i / (Σ c_i)² as a ratio to equal coefficients (dr_grpo), always defined;
    cosine, size: of Σ c_i g_i against the plain mean (1 / (B M)) Σ g_i: direction, and ratio of the norms;
    positive: share of the token mass Σ c_i L_i |A_i| that goes to positive advantages.
    """
    in_batch = lengths > 0
    advantage = advantages.double()
    weighted = (gram * advantage[:, None] * advantage[None, :])[in_batch][:, in_batch]
    n = int(in_batch.sum())
    equal = torch.full((n,), 1.0 / n, dtype=torch.float64)
    spread, mean_square = deviations(weighted), debiased_square(weighted, equal)
    plain = float((equal.square() * spread).sum())
    plain_norm = float((equal @ weighted @ equal).clamp(min=0.0).sqrt())
    told: dict[str, dict[str, float | None]] = {}
    for name, all_coefficients in coefficients.items():
        c = all_coefficients[in_batch].double()
        total = float(c.sum())
        noise = float((c.square() * spread).sum()) / total**2
        norm = float((c @ weighted @ c).clamp(min=0.0).sqrt())
        along = float(c @ weighted @ equal)
        mass = c * lengths[in_batch] * advantage[in_batch].abs()
        told[name] = {
            "scale": total * max_length,
            "cv2": noise / mean_square if mean_square > 0 else None,
            "relative_variance": noise / plain if plain > 0 else None,
            "cosine": along / (norm * plain_norm) if norm * plain_norm > 0 else None,
            "size": norm / (plain_norm / max_length) if plain_norm > 0 else None,
            "positive": float(mass[advantage[in_batch] > 0].sum() / mass.sum()) if float(mass.sum()) > 0 else None,
        }
    return told


def by_length(
    gram: Tensor, lengths: Tensor, groups: Tensor, *, bins: int = LENGTH_BINS, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean gradient by length: does E[g | L] depend on L, as the paper's unbiasedness says it must not?

    `gram` float64[n, n] of the gradients in question; `lengths`, `groups` int[n]. Bins hold about equally many
    responses. Per bin: lengths from .. to, responses, norm of the mean gradient (noise taken out; 0 when noise hides
    it), and the cosine of the bin's mean with the mean of all, each with its 95% bootstrap interval over whole groups.
    """
    edges = torch.quantile(lengths.double(), torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    member = torch.bucketize(lengths.double(), torch.unique(edges))
    _, group = torch.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    times.scatter_add_(1, picks, torch.ones(picks.shape, dtype=torch.float64))
    told = []
    for number in torch.unique(member).tolist():
        inside = (member == number).double()
        norms, cosines = [], []
        for weights in (torch.ones(len(lengths), dtype=torch.float64), *times[:, group]):
            here = weights * inside
            if not float(here.sum()):
                continue
            norms.append(max(debiased_square(gram, here), 0.0) ** 0.5 / float(here.sum()))
            product = float(here @ gram @ here) * float(weights @ gram @ weights)
            cosines.append(float(here @ gram @ weights) / product**0.5 if product > 0 else 0.0)
        chosen = lengths[member == number]
        told.append(
            {
                "from": int(chosen.min()),
                "to": int(chosen.max()),
                "responses": len(chosen),
                "norm": norms[0],
                "norm_interval_95": _interval(norms[1:]),
                "cosine": cosines[0],
                "cosine_interval_95": _interval(cosines[1:]),
            }
        )
    return told


def empirical_bias(
    gram: Tensor, lengths: Tensor, groups: Tensor, coefficients: Callable[[Tensor], Tensor], *,
    groups_per_batch: int, max_length: int, batches: int = 2000, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Expected update of an aggregation against the plain mean gradient, with the pool of responses as the population.

    `gram` float64[n, n] of the update's gradients A_i g_i; `lengths`, `groups` int[n]; `coefficients`: int64[m] lengths
    of a batch to float64[m]. Draws batches of `groups_per_batch` whole groups with replacement and averages Σ c_i g_i.
    The plain mean ḡ / M is taken over the same draws, so that an aggregation which is unbiased here gives cosine 1,
    size 1 (ratio of norms) and relative_error 0 (norm of the difference as a share of ‖ḡ‖ / M), to `monte_carlo`: the
    error's own noise, from the two halves of the draws.
    """
    _, group = torch.unique(groups, return_inverse=True)
    rows = torch.split(torch.argsort(group, stable=True), torch.bincount(group).tolist())
    draw = torch.Generator().manual_seed(seed)
    halves = torch.zeros(2, 2, len(lengths), dtype=torch.float64)
    for number in range(batches):
        chosen = torch.cat([rows[i] for i in torch.randint(len(rows), (groups_per_batch,), generator=draw).tolist()])
        in_batch = (lengths[chosen] > 0).double()
        both = torch.stack([coefficients(lengths[chosen]), in_batch / (in_batch.sum().clamp(min=1) * max_length)])
        halves[number % 2].index_add_(1, chosen, both / batches)
    expected, plain = halves.sum(0)

    def norm(weights: Tensor) -> float:
        return float((weights @ gram @ weights).clamp(min=0.0).sqrt())

    first, second = (half[0] - half[1] for half in halves)
    whole = norm(plain)
    if whole == 0.0 or norm(expected) == 0.0:
        return {"cosine": 0.0, "size": 0.0, "relative_error": 0.0, "monte_carlo": 0.0}
    return {
        "cosine": float(expected @ gram @ plain) / (norm(expected) * whole),
        "size": norm(expected) / whole,
        "relative_error": norm(expected - plain) / whole,
        "monte_carlo": norm(first - second) / whole,
    }


def _interval(values: list[float]) -> list[float]:
    drawn = torch.tensor(values or [0.0], dtype=torch.float64)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [float(low), float(high)]
