"""Redo recorded batches outside a run: one rank in this process, from the nearest checkpoint. Nothing is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deltal.config import RunConfig
from deltal.learner.model import prepare
from deltal.learner.trainer import Trainer, join
from deltal.types import Batch, ScoredGroup


@dataclass(frozen=True, kw_only=True)
class Redone:
    """One batch, trained again."""

    began_at: int
    """Version of the checkpoint whose weights came first; 0: the start model."""
    batch: Batch
    row: dict[str, Any]
    """What metrics.jsonl would hold of the step."""
    digest: str
    """Of the weights after it, as published by a run of one rank."""


def redo(
    config: RunConfig, checkpoints: str, version: int, groups_of: Callable[[int], Sequence[ScoredGroup]],
    advance: Callable[[int, int], None],
) -> Redone:  # fmt: skip
    """Train batch `version` on the weights it was trained on.

    They are those of checkpoint `version`, or are made from the newest earlier one (else the start model) by training
    the batches in between, which `groups_of` gives. `advance(done, of)` counts them. Raises LearnerError when no
    checkpoint can be read.
    """
    gpus = config.learner.num_gpus if torch.cuda.is_available() else 0.0
    alone = config.model_copy(update={"learner": config.learner.model_copy(update={"ranks": 1, "num_gpus": gpus})})
    with _world_of_one(alone):
        trainer = Trainer(alone, prepare(config.model), checkpoints, at_most=version)
        began_at = trainer.version
        while trainer.version < version:
            trainer.train(groups_of(trainer.version))
            advance(trainer.version - began_at, version - began_at + 1)
        batch, result, rate = trainer.train(groups_of(version))
        row = trainer.row(batch, result, rate, {}, redone=True)
        return Redone(began_at=began_at, batch=batch, row=row, digest=trainer.share()["whole"])


@contextlib.contextmanager
def _world_of_one(config: RunConfig) -> Iterator[None]:
    """A process group of this process, unless there is one."""
    if dist.is_initialized():
        yield
        return
    join(config, rank=0, host="", port=0, listener=None)
    try:
        yield
    finally:
        dist.destroy_process_group()
