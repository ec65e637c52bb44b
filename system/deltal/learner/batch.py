"""From scored groups to what the model sees: advantages and coefficients once a batch, then packing.

`assemble` looks at the whole batch and is identical on every rank. `pack` cuts it into micro-batches: responses are
laid end to end without padding, and the responses of one group share one copy of their prompt. In a row

    prompt tokens (branch 0) | response a (branch 1) | response b (branch 2) | next group's prompt | …

a token attends to earlier tokens of its own segment (group) that are in the prompt or in its own branch, and each
branch's positions go on from its prompt. That is exact: no response sees another one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltal.algorithm import advantages, token_coefficients
from deltal.config import RunConfig
from deltal.learner.attention import Segment
from deltal.types import Batch, Group, Response, ScoredGroup

Array = NDArray[Any]


def assemble(version: int, groups: Sequence[ScoredGroup], config: RunConfig, *, alpha: float | None = None) -> Batch:
    """Advantages and token coefficients of a whole batch, before it is cut (design section 1).

    `alpha`: estimated, for `alpha: auto`; None takes the configured one.

    An overlong response under `overlong: filter`, and one without policy-written tokens, gets coefficient 0, is not
    in B, and stays in its group's baseline.
    """
    rewards, numbers, lengths = [], [], []
    for number, scored in enumerate(groups):
        for response, verdict in zip(scored.group.responses, scored.verdicts, strict=True):
            left_out = config.verify.overlong == "filter" and response.finish == "length"
            rewards.append(verdict.reward)
            numbers.append(number)
            lengths.append(0 if left_out else response.length)
    return Batch(
        version=version,
        groups=tuple(groups),
        advantages=advantages(rewards, numbers, kind=config.algorithm.advantage).numpy(),
        coefficients=coefficients(lengths, config, alpha=alpha),
    )


def coefficients(lengths: Sequence[int], config: RunConfig, *, alpha: float | None = None) -> Array:
    """float64[responses]: token coefficient of each, all 0 when no response has a policy-written token."""
    if not any(lengths):
        return np.zeros(len(lengths))
    aggregation: Any = config.algorithm.aggregation
    configured = getattr(aggregation, "alpha", 1.0)
    if alpha is None:
        alpha = aggregation.auto.fallback if configured == "auto" else configured
    return token_coefficients(
        aggregation.kind,
        lengths,
        max_length=config.rollout.max_response_tokens,
        alpha=alpha,
    ).numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One response of a batch with its numbers, before packing."""

    place: int
    """Index among the batch's responses."""
    group: Group
    response: Response
    advantage: float
    coefficient: float
    """Mini-batch factor included."""


Piece = Sequence[Item]
"""Responses of one group that share a prompt in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedMicroBatch:
    """One forward's row of T tokens, of which N are policy-written and trained.

    tokens, positions int64[T]; segment (group), branch (0 prompt, else response) int32[T];
    predict_at int64[N]: where in the row the token's logits stand; target int64[N];
    advantage, coefficient, old_logprob float32[N]; version int64[N]: that sampled the token;
    place int64[N]: index of the token's response among the batch's.
    """

    tokens: Tensor
    positions: Tensor
    segment: Tensor
    branch: Tensor
    predict_at: Tensor
    target: Tensor
    advantage: Tensor
    coefficient: Tensor
    old_logprob: Tensor
    version: Tensor
    place: Tensor

    def segments(self) -> list[Segment]:
        """The same as `attention_mask`, for attention that goes block by block."""
        changes = (torch.diff(self.segment) != 0) | (torch.diff(self.branch) != 0)
        starts = [0, *(torch.nonzero(changes)[:, 0] + 1).tolist()]
        ends = [*starts[1:], len(self.tokens)]
        prompts = [i for i, start in enumerate(starts) if self.branch[start] == 0]
        return [
            Segment(starts[i], ends[i], tuple(ends[i + 1 : following]))
            for i, following in zip(prompts, [*prompts[1:], len(starts)], strict=True)
        ]

    def attention_mask(self) -> Tensor:
        """bool[1, 1, T, T], True where the row's token may attend to the column's."""
        causal = torch.ones(len(self.tokens), len(self.tokens), dtype=torch.bool, device=self.tokens.device).tril()
        same = self.segment[:, None] == self.segment[None, :]
        own = (self.branch[None, :] == 0) | (self.branch[:, None] == self.branch[None, :])
        return (causal & same & own)[None, None]

    def to(self, device: torch.device) -> PackedMicroBatch:
        """The same on another device; itself on CPU, where it is made."""
        if device.type == "cpu":
            return self
        return PackedMicroBatch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def mini_batches(
    batch: Batch, *, count: int, seed: int, anew: Callable[[Sequence[int]], Array] | None = None
) -> list[list[Item]]:
    """Cut a batch's responses into `count` mini-batches, after a permutation by (seed, version).

    A mini-batch of b of the B responses uses c_i · B / b (design section 1). B and b count responses in the loss.
    `anew`, lengths to coefficients, is for `normalize_over: mini_batch`: c_i by the mini-batch's own lengths.
    """
    items = [
        Item(group=scored.group, response=response, place=place, advantage=float(advantage), coefficient=float(c))
        for place, (scored, response, advantage, c) in enumerate(
            zip(
                (scored for scored in batch.groups for _ in scored.verdicts),
                (response for scored in batch.groups for response in scored.group.responses),
                batch.advantages,
                batch.coefficients,
                strict=True,
            )
        )
    ]
    if count == 1:
        return [items]
    # SeedSequence takes no negative numbers; a run's seed may be one.
    entropy = np.random.SeedSequence([seed % 2**64, batch.version])
    order = np.random.Generator(np.random.PCG64(entropy)).permutation(len(items))
    total = sum(item.coefficient > 0 for item in items)
    cut = []
    for part in np.array_split(order, count):
        members = [items[i] for i in sorted(part)]
        if anew is not None:
            own = anew([item.response.length if item.coefficient > 0 else 0 for item in members])
        else:
            inside = sum(item.coefficient > 0 for item in members)
            own = np.array([item.coefficient for item in members]) * (total / max(inside, 1))
        cut.append([replace(item, coefficient=float(c)) for item, c in zip(members, own, strict=True)])
    return cut


def pack(items: Sequence[Item], *, budget: int, ranks: int, keep_all: bool = False) -> list[list[PackedMicroBatch]]:
    """Micro-batches for each rank, equally many on all: rows of at most `budget` tokens, of nearly the same length.

    Responses whose gradient is zero are left out: those with coefficient 0, and, unless `keep_all` (a KL or entropy
    term needs them), those with advantage 0. A response is never split; one over the budget rides alone with its
    prompt. A rank that has fewer rows gets one-token rows with nothing to train.

    As few rows as first fit finds, up to a multiple of `ranks`; they are then filled evenly, since all ranks wait for
    the longest row of each round.
    """
    kept = [item for item in items if item.coefficient != 0.0 and (keep_all or item.advantage != 0.0)]
    pieces = _pieces(kept, budget)
    rows = _first_fit(pieces, budget)
    count = math.ceil(len(rows) / ranks) * ranks
    if len(pieces) < count:
        # Some rank would have nothing to do: smaller pieces, at the price of prompts repeated.
        repeated = (count - len(pieces)) * max(len(item.group.prompt_tokens) for item in kept)
        longest = max(len(item.response.tokens) for item in kept)
        pieces = _pieces(kept, min(budget, (_length(pieces) + repeated) // count + longest // 2))
    even = _evenly(pieces, count)
    if all(len(row) == 1 or _length(row) <= budget for row in even):
        rows = even
    rows.sort(key=_length, reverse=True)
    rows += [[]] * (max(count, ranks) - len(rows))
    return [[_row(row) for row in rows[rank::ranks]] for rank in range(ranks)]


def _first_fit(pieces: Sequence[Piece], budget: int) -> list[list[Piece]]:
    """First fit, longest first: the usual bin-packing heuristic, at most 11/9 of the fewest rows."""
    rows: list[list[Piece]] = []
    used: list[int] = []
    for piece in sorted(pieces, key=_tokens, reverse=True):
        size = _tokens(piece)
        place = next((i for i, taken in enumerate(used) if taken + size <= budget), None)
        if place is None:
            rows.append([piece])
            used.append(size)
        else:
            rows[place].append(piece)
            used[place] += size
    return rows


def _evenly(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """`count` rows, the longest piece first, each to the shortest row: the usual scheduling heuristic."""
    rows: list[list[Piece]] = [[] for _ in range(count)]
    shortest = [(0, place) for place in range(count)]
    for piece in sorted(pieces, key=_tokens, reverse=True):
        taken, place = shortest[0]
        rows[place].append(piece)
        heapq.heapreplace(shortest, (taken + _tokens(piece), place))
    return [row for row in rows if row]


def _length(row: Sequence[Piece]) -> int:
    return sum(map(_tokens, row))


def _tokens(piece: Piece) -> int:
    return len(piece[0].group.prompt_tokens) + sum(len(item.response.tokens) for item in piece)


def _pieces(items: Sequence[Item], budget: int) -> list[Piece]:
    """Cut each group's responses into pieces that fit the budget with their prompt."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(id(item.group), []).append(item)
    pieces: list[Piece] = []
    for members in groups.values():
        piece: list[Item] = []
        for item in members:
            if piece and _tokens([*piece, item]) > budget:
                pieces.append(piece)
                piece = []
            piece.append(item)
        pieces.append(piece)
    return pieces


def _row(pieces: Sequence[Piece]) -> PackedMicroBatch:
    """Lay pieces end to end; no piece gives a one-token row with nothing to train."""
    tokens: list[Array] = []
    positions: list[Array] = []
    segment: list[Array] = []
    branch: list[Array] = []
    predict_at: list[Array] = []
    target: list[Array] = []
    advantage: list[Array] = []
    coefficient: list[Array] = []
    old_logprob: list[Array] = []
    version: list[Array] = []
    place: list[Array] = []
    offset = 0
    for number, piece in enumerate(pieces):
        prompt = piece[0].group.prompt_tokens
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        segment.append(np.full(len(prompt), number))
        branch.append(np.zeros(len(prompt)))
        last_of_prompt = offset + len(prompt) - 1
        offset += len(prompt)
        for which, item in enumerate(piece, start=1):
            response, length = item.response, len(item.response.tokens)
            tokens.append(response.tokens)
            positions.append(len(prompt) + np.arange(length))
            segment.append(np.full(length, number))
            branch.append(np.full(length, which))
            # A token is predicted one place before it; a response's first token by its prompt's last.
            before = np.concatenate([[last_of_prompt], offset + np.arange(length - 1)])
            predict_at.append(before[response.mask])
            target.append(response.tokens[response.mask])
            old_logprob.append(response.logprobs[response.mask])
            version.append(_versions(response)[response.mask])
            advantage.append(np.full(response.length, item.advantage))
            coefficient.append(np.full(response.length, item.coefficient))
            place.append(np.full(response.length, item.place))
            offset += length
    if not tokens:
        tokens, positions, segment, branch = [np.zeros(1)], [np.zeros(1)], [np.zeros(1)], [np.zeros(1)]

    def joined(parts: list[Array], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate(parts) if parts else np.zeros(0)).to(dtype)

    return PackedMicroBatch(
        tokens=joined(tokens, torch.int64),
        positions=joined(positions, torch.int64),
        segment=joined(segment, torch.int32),
        branch=joined(branch, torch.int32),
        predict_at=joined(predict_at, torch.int64),
        target=joined(target, torch.int64),
        advantage=joined(advantage, torch.float32),
        coefficient=joined(coefficient, torch.float32),
        old_logprob=joined(old_logprob, torch.float32),
        version=joined(version, torch.int64),
        place=joined(place, torch.int64),
    )


def _versions(response: Response) -> Array:
    """int64[L]: version that sampled each token."""
    versions = np.full(len(response.tokens), -1, dtype=np.int64)
    for span in response.spans:
        versions[span.start :] = span.version
    return versions
