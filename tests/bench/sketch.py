"""What the sketches cost: `python -m tests.bench.sketch` (make bench-sketch), about 4 minutes on 2 cores.

The same batches through the learner step of SmolLM2-135M, with sketches and without, turn about; the instrument's
reading (β, what every aggregation would have done) is part of the sketched step.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist

from deltal.config.file import load_config
from deltal.learner.batch import assemble, mini_batches
from deltal.learner.instrument import Instrument
from deltal.learner.model import load, prepare
from deltal.learner.step import train_batch
from deltal.types import Group, GroupId, Message, Prompt, Response, ScoredGroup, Span, Verdict
from tests.bench.rollout import CONFIG
from tests.bench.table import tell

PAIRS = 4


def batch_of(
    version: int, *, groups: int = 8, responses: int = 8, median: float = 24.0, limit: int = 128
) -> list[ScoredGroup]:
    """Groups of random tokens with log-normal lengths and mixed rewards."""
    draw = np.random.default_rng(version)
    made = []
    for index in range(groups):
        told = []
        for length in np.clip(draw.lognormal(np.log(median), 0.7, responses), 2, limit).astype(int):
            told.append(
                Response(
                    tokens=draw.integers(0, 49_000, length, dtype=np.int32),
                    logprobs=np.full(length, -1.0, dtype=np.float32),
                    mask=np.ones(length, dtype=np.bool_),
                    spans=(Span(start=0, version=version),),
                    finish="stop",
                    text="",
                )
            )
        prompt = Prompt(
            id=str(index), task="largest", messages=(Message(role="user", content=""),), answer="", fields={}
        )
        group = Group(
            id=GroupId(purpose="train", epoch=version, index=index), prompt=prompt, issued_version=version,
            prompt_tokens=draw.integers(0, 49_000, 45, dtype=np.int32), responses=tuple(told), worker="", seconds=0.0,
        )  # fmt: skip
        verdicts = tuple(
            Verdict(reward=float(i % 2), correct=bool(i % 2), parsed=None, reason="equal", seconds=0.0)
            for i in range(responses)
        )
        made.append(ScoredGroup(group=group, verdicts=verdicts))
    return made


def main() -> None:
    """Measure and tell."""
    config = load_config(CONFIG, ["rollout.max_response_tokens=128"])
    torch.set_num_threads(config.learner.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    model = load(prepare(config.model))
    head = model.get_output_embeddings()  # type: ignore[operator]
    instrument = Instrument(config, vocabulary=head.out_features, width=head.in_features, device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seconds: dict[str, list[float]] = {"plain": [], "sketched": []}
    for number in range(PAIRS + 1):
        for what in ("plain", "sketched") if number % 2 else ("sketched", "plain"):
            batch = assemble(number, batch_of(number), config)
            cut = mini_batches(batch, count=1, seed=0)
            sketcher = instrument.sketcher(batch) if what == "sketched" else None
            started = time.perf_counter()
            train_batch(
                model, optimizer, cut, config.algorithm, config.learner, temperature=config.rollout.temperature,
                version=number, sketcher=sketcher,
            )  # fmt: skip
            if sketcher is not None:
                instrument.read(batch, sketcher, 1.0)
            if number:  # the first pair warms up
                seconds[what].append(time.perf_counter() - started)
    ratios = [a / b - 1.0 for a, b in zip(seconds["sketched"], seconds["plain"], strict=True)]
    rows = [
        {"what": what, "seconds a step": float(np.mean(told)), "least": min(told), "most": max(told)}
        for what, told in seconds.items()
    ]
    share = float(np.sum(seconds["sketched"]) / np.sum(seconds["plain"]) - 1.0)
    tell("sketch", rows, {"sketches as a share of the step": share, "least": min(ratios), "most": max(ratios)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
