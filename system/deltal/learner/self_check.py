"""Does the learner compute what the model is? A few tokens, packed and by the model's own forward, before training.

Architectures differ in more ways than a list of names could hold: heads that scale, layers that do not hand on what
tells sequences apart, attention that caps or remembers. What is computed wrong shows here, in numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltal.errors import ModelError, one_line
from deltal.learner.attention import ATTENTION
from deltal.learner.batch import Item, pack
from deltal.types import Group, GroupId, Prompt, Response, Span

LENGTHS = ((7, (5, 4)), (3, (6,)))
"""Of two prompts and their responses: one that is shared, and a second sequence in the same row."""
MOST = 0.01
"""Nats; rounding is below 0.0005 in float32, also where logits stand some hundreds off zero."""


@torch.no_grad()
def check_forward(model: Any) -> None:
    """Compare packed log-probabilities of made-up tokens with those of one plain forward a sequence.

    The model must be whole, in float32. Raises ModelError in one line when the two differ, or when the model cannot be
    computed packed at all.
    """
    name = type(model).__name__
    items = _items(int(model.get_input_embeddings().num_embeddings))
    (micro,) = pack(items, budget=1024, ranks=1)[0]
    device = next(model.parameters()).device
    try:
        got = model.token_logprobs(micro.to(device), 1.0, 1, None)[0].cpu()
        model.set_attn_implementation("eager")  # the model's own words
        try:
            expected = [_plain(model, item, device) for item in items]
        finally:
            model.set_attn_implementation(ATTENTION)
    except (ModelError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # an architecture that takes other arguments has an exception of its own
        raise ModelError(f"{name} cannot be computed packed: {one_line(error, line=0)}: not supported") from error
    gap = max(float((got[micro.place == place] - one).abs().max()) for place, one in enumerate(expected))
    if not gap <= MOST:  # not a number either
        raise ModelError(
            f"{name}: log-probabilities of the learner are {gap:.2g} nats off those of the model's own forward, so "
            "deltal would train another model than this: not supported"
        )


def _items(vocabulary: int) -> list[Item]:
    draw = np.random.default_rng(0)
    items: list[Item] = []
    for index, (prompt, lengths) in enumerate(LENGTHS):
        responses = tuple(
            Response(
                tokens=draw.integers(0, vocabulary, length, dtype=np.int32),
                logprobs=np.zeros(length, dtype=np.float32),
                mask=np.ones(length, dtype=np.bool_),
                spans=(Span(start=0, version=0),),
                finish="stop",
                text="",
            )
            for length in lengths
        )
        group = Group(
            id=GroupId(purpose="train", epoch=0, index=index),
            prompt=Prompt(id=str(index), task="", messages=(), answer=""),
            issued_version=0,
            prompt_tokens=draw.integers(0, vocabulary, prompt, dtype=np.int32),
            responses=responses,
            worker="",
            seconds=0.0,
        )
        items += [
            Item(place=len(items) + i, group=group, response=one, advantage=1.0, coefficient=1.0)
            for i, one in enumerate(responses)
        ]
    return items


def _plain(model: Any, item: Item, device: torch.device) -> Tensor:
    """float32[L] of one response: one unpadded forward over prompt and response."""
    prompt = item.group.prompt_tokens
    row = torch.as_tensor(np.concatenate([prompt, item.response.tokens]).astype(np.int64), device=device)
    logits = model(input_ids=row[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits, dim=-1).gather(1, row[len(prompt) :, None])[:, 0].cpu()
