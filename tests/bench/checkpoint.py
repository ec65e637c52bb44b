"""What checkpoints and publishing cost: `python -m tests.bench.checkpoint` (make bench-checkpoint), some minutes.

SmolLM2-135M, float32 with AdamW, one rank and two over gloo, a thread each, without Ray. Steps alone are timed beside
steps during which a checkpoint is written, and a write that has the machine to itself beside one that shares it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from deltal.config.file import load_config
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.model import prepare
from deltal.learner.trainer import Trainer
from tests.bench.rollout import CONFIG
from tests.bench.sketch import batch_of
from tests.bench.table import tell
from tests.ranks import together

RANKS, STEPS = (1, 2), 2
DEADLINE = 600.0


def timed(work: Callable[[], Any]) -> float:
    """Seconds of `work`, from when all ranks are there until all are through."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def written(trainer: Trainer, meanwhile: Callable[[], Any]) -> dict[str, Any]:
    """What rank 0 tells of the checkpoint under way, once it is complete; until then all do `meanwhile`."""
    told: list[Any] = [None]
    while told[0] is None:
        meanwhile()
        told = [trainer.written()]
        dist.broadcast_object_list(told, src=0)
    return told[0]  # type: ignore[no-any-return]


def measure(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """One rank's seconds and bytes."""
    config = load_config(CONFIG, [f"learner.ranks={ranks}", "learner.threads=1", "rollout.max_response_tokens=128"])
    where = f"{folder}/checkpoints"
    trainer = Trainer(config, prepare(config.model), where)
    beside: list[float] = []

    def step() -> None:
        trainer.train(batch_of(trainer.version, groups=4))

    step()  # makes the optimizer's moments
    told: dict[str, Any] = {
        "ranks": ranks,
        "step s": float(np.mean([timed(step) for _ in range(STEPS)])),
        "publish s": timed(trainer.share),
        "stall s": timed(trainer.save),
    }
    alone = written(trainer, lambda: time.sleep(0.05))
    step()
    trainer.save()
    shared = written(trainer, lambda: beside.append(timed(step)))
    return told | {
        "write s": alone["seconds"],
        "GB": alone["bytes"] / 1e9,
        "write beside steps s": shared["seconds"],
        "step beside a write s": float(np.mean(beside)),
        "load s": timed(lambda: Checkpoints(where, keep=9).load(trainer.model, trainer.optimizer)),
    }


def main() -> None:
    """Measure and tell."""
    prepare(load_config(CONFIG).model)
    rows = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(together(measure, ranks, ranks, folder, folder=Path(folder), seconds=DEADLINE)[0])
    ratios = {
        f"{row['ranks']} rank(s): {name}, against a step": row[f"{name} s"] / row["step s"]
        for row in rows
        for name in ("stall", "publish", "step beside a write")
    }
    tell("checkpoint", rows, ratios)


if __name__ == "__main__":
    main()
