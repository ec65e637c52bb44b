"""Exact gradients of single responses, for measuring; training never makes them.

All are score-function gradients with unit advantage, Σ_t ∇ log π(y_t) over a response's policy-written tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from deltal.algorithm.sketch import Sketcher, factor_gram, gram
from deltal.errors import UserError
from deltal.learner.batch import Item, pack
from deltal.learner.model import load
from deltal.learner.step import forward
from deltal.types import ScoredGroup

SKETCHES = 5
MEMORY_SHARE = 0.5
"""Of the memory that is free; what is measured must fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Products:
    """Inner products of n responses' gradients, float64[n, n] each, and whose they are."""

    lengths: Tensor
    """int64[n]: policy-written tokens."""
    groups: Tensor
    """int64[n]: place of the response's group."""
    exact: Tensor
    sketched: tuple[Tensor, ...]
    """The same estimated by independent sketches, each as a step takes one; always about the head."""
    parameters: int
    """Numbers in the gradient that `exact` is about."""


def measure(
    model_folder: str, groups: Sequence[ScoredGroup], *, temperature: float, parameters: str, size: int, seed: int,
    advance: Callable[[int, int], None],
) -> Products:  # fmt: skip
    """Inner products of all responses' gradients, in the order of `groups`.

    `parameters`: `lm_head`, the output matrix alone (input embeddings left out where the two are tied), or a regular
    expression over parameter names. `size`, `seed`: of the sketches. Raises UserError when the expression names
    nothing, or when what must be held does not fit into half of the free memory.
    """
    model = load(model_folder)
    items = [
        Item(place=0, group=scored.group, response=response, advantage=1.0, coefficient=1.0)
        for scored in groups
        for response in scored.group.responses
    ]
    chosen: list[torch.nn.Parameter] = []
    if parameters != "lm_head":
        chosen = _chosen(model, parameters)
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    numbers = sum(p.numel() for p in chosen) or head.numel()
    tokens = sum(item.response.length for item in items)
    _check_memory(4 * (len(items) * numbers if chosen else tokens * (head.shape[0] + head.shape[1]) + 2 * tokens**2))
    sketchers = [Sketcher(head.shape[0], head.shape[1], size=size, seed=seed + i) for i in range(SKETCHES)]
    for sketcher in sketchers:
        sketcher.begin(len(items))
    errors, states, rows = [], [], []
    for number, item in enumerate(items):
        seen = _Seen(sketchers, number, temperature, keep=not chosen)
        if item.response.length:
            (micro,) = pack([item], budget=1, ranks=1)[0]
            with torch.set_grad_enabled(bool(chosen)):
                logprob, _ = forward(model, micro, temperature, chunk=len(micro.target), sketcher=seen)  # type: ignore[arg-type]
            if chosen:
                logprob.sum().backward()  # type: ignore[no-untyped-call]
                rows.append(torch.cat([_gradient(p).flatten() for p in chosen]))
                model.zero_grad(set_to_none=True)
        elif chosen:
            rows.append(torch.zeros(numbers))
        errors.append(torch.cat([torch.zeros(0, head.shape[0]), *seen.errors]))
        states.append(torch.cat([torch.zeros(0, head.shape[1]), *seen.states]))
        advance(number + 1, len(items))
    exact = gram(torch.stack(rows)) if chosen else factor_gram(errors, states)
    return Products(
        lengths=torch.tensor([item.response.length for item in items]),
        groups=torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(s.verdicts) for s in groups])),
        exact=exact,
        sketched=tuple(gram(sketcher.sketches) for sketcher in sketchers),
        parameters=numbers,
    )


class _Seen:
    """Stands in a sketcher's place: sketches one response by all sketchers, and keeps the head's factors."""

    def __init__(self, sketchers: Sequence[Sketcher], row: int, temperature: float, *, keep: bool) -> None:
        self._sketchers, self._row, self._temperature, self._keep = sketchers, row, temperature, keep
        self.errors: list[Tensor] = []
        self.states: list[Tensor] = []

    def add(self, probabilities: Tensor, hidden: Tensor, target: Tensor, response: Tensor, temperature: float) -> None:
        for sketcher in self._sketchers:
            sketcher.add(probabilities, hidden, target, torch.full_like(response, self._row), temperature)
        if self._keep:
            error = -probabilities.detach() / temperature
            error[torch.arange(len(target)), target] += 1.0 / temperature
            self.errors.append(error)
            self.states.append(hidden.detach().float().clone())


def _chosen(model: torch.nn.Module, expression: str) -> list[torch.nn.Parameter]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"--parameters {expression!r} is no regular expression: {error}") from None
    named = list(model.named_parameters())
    chosen = [parameter for name, parameter in named if pattern.search(name)]
    if not chosen:
        raise UserError(f"--parameters {expression!r} names none of {named[0][0]} … {named[-1][0]}")
    for _, parameter in named:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _check_memory(needed: int) -> None:
    free = psutil.virtual_memory().available * MEMORY_SHARE
    if needed > free:
        raise UserError(
            f"these gradients need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB may be used: "
            "fewer --prompts or --responses, or narrower --parameters"
        )
