"""Attention and prompts in packed rows: `python -m tests.bench.packing` (make bench-packing), 5 minutes on 2 cores.

One group of SmolLM2-135M, float32, forward and backward, at three ratios of prompt to response; the ways turn about.
With the prompt shared there is one row, and attention goes under a dense mask (what transformers' sdpa needs) or block
by block. With the prompt repeated each response is a causal sequence of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deltal.config.file import load_config
from deltal.learner.batch import Item, PackedMicroBatch, pack
from deltal.learner.head import token_logprob
from deltal.learner.model import load, prepare
from deltal.learner.step import forward
from tests.bench.learner import CONFIG, items_of
from tests.bench.table import tell

RESPONSES, TOGETHER, PASSES = 4, 320, 2
"""TOGETHER: tokens of prompt and response."""
RATIOS = {"1:4": 64, "1:1": 160, "4:1": 256}
"""Of prompt to response, to tokens of the prompt."""


def group(prompt: int) -> list[Item]:
    """One group of random tokens."""
    draw = np.random.default_rng(prompt)
    answers = [
        {"prompt": 0, "tokens": draw.integers(0, 49_000, TOGETHER - prompt).tolist(), "advantage": 0.5}
        for _ in range(RESPONSES)
    ]
    return items_of({"prompts": [draw.integers(0, 49_000, prompt).tolist()], "responses": answers, "limit": 1024})


def by_blocks(model: torch.nn.Module, micro: PackedMicroBatch) -> Tensor:
    """As the learner does on CPU."""
    return forward(model, micro, 1.0)[0]


def by_mask(model: torch.nn.Module, micro: PackedMicroBatch) -> Tensor:
    """As it does elsewhere."""
    states = model.model(
        input_ids=micro.tokens[None],
        attention_mask=micro.attention_mask(),
        position_ids=micro.positions[None],
        use_cache=False,
    ).last_hidden_state[0, micro.predict_at]
    return token_logprob(states, model.lm_head.weight, micro.target, temperature=1.0, chunk=512)[0]


def main() -> None:
    """Measure and tell."""
    config = load_config(CONFIG)
    torch.set_num_threads(config.learner.threads)
    model = load(prepare(config.model))
    rows, ratios = [], {}
    for run in (by_blocks, by_mask):  # a first pass is slower than those after it
        run(model, pack(group(256), budget=1, ranks=1)[0][0]).sum().backward()  # type: ignore[no-untyped-call]
    for ratio, prompt in RATIOS.items():
        items = group(prompt)
        shared, repeated = (pack(items, budget=budget, ranks=1)[0] for budget in (10_000, 1))
        ways: dict[str, tuple[Callable[..., Tensor], Sequence[PackedMicroBatch]]] = {
            "shared prompt, by blocks": (by_blocks, shared),
            "shared prompt, dense mask": (by_mask, shared),
            "repeated prompt, by blocks": (by_blocks, repeated),
            "repeated prompt, dense mask": (by_mask, repeated),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(PASSES):
            for way, (run, micros) in ways.items():
                started = time.perf_counter()
                for micro in micros:
                    run(model, micro).sum().backward()  # type: ignore[no-untyped-call]
                seconds[way].append(time.perf_counter() - started)
                model.zero_grad(set_to_none=True)
        useful = RESPONSES * (TOGETHER - prompt)
        best = {way: min(told) for way, told in seconds.items()}
        rows += [
            {
                "prompt:response": ratio,
                "way": way,
                "forwarded": sum(len(micro.tokens) for micro in ways[way][1]),
                "seconds": best[way],
                "most": max(seconds[way]),
                "useful tokens/s": useful / best[way],
            }
            for way in ways
        ]
        shares, masks, repeats, _ = ways
        ratios[f"{ratio}: blocks, against the mask"] = best[masks] / best[shares]
        ratios[f"{ratio}: shared, against repeated"] = best[repeats] / best[shares]
    tell("packing", rows, ratios)


if __name__ == "__main__":
    main()
