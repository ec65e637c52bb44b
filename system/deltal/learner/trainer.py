"""The trainer of one rank: model, optimizer, checkpoints; pure torch, its actor does the talking.

All methods but `join` are called by all ranks together, in the same order.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deltal.config import RunConfig
from deltal.learner.batch import assemble, mini_batches
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.model import load
from deltal.learner.report import step_row
from deltal.learner.step import StepResult, schedule, shard, train_batch
from deltal.types import Batch, ScoredGroup, TensorBytes


def join(config: RunConfig, rank: int, host: str, port: int, listener: int | None) -> None:
    """Meet the other ranks; `listener` is rank 0's open socket. Raises torch's error after the deadline."""
    settings = config.learner
    store: Any
    if settings.ranks == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
    else:
        own: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener}
        deadline = timedelta(seconds=settings.rendezvous_deadline)
        store = dist.TCPStore(host, port, settings.ranks, rank == 0, deadline, **own)  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if settings.num_gpus > 0 else "gloo",
        store=store,
        rank=rank,
        world_size=settings.ranks,
        # The others sit in a collective while rank 0 waits for a batch; its own deadline names the wait.
        timeout=timedelta(seconds=settings.batch_deadline + 60.0),
    )


def broadcast(word: Any) -> Any:
    """Rank 0's `word`, on all ranks."""
    box = [word]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Trainer:
    """Holds the sharded model at one policy version.

    Args:
        config: of the run.
        model_folder: Hugging Face folder or hub name to begin from.
        checkpoints: path or fsspec URL of the checkpoints; the newest readable one is loaded.
    """

    def __init__(self, config: RunConfig, model_folder: str, checkpoints: str) -> None:
        settings = config.learner
        torch.set_num_threads(settings.threads)
        device = "cuda" if settings.num_gpus > 0 else "cpu"
        model: Any = load(model_folder).to(device)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self._config = config
        self.model = shard(model, compute_dtype=getattr(torch, settings.compute_dtype), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self._rate_factor = schedule(settings, config.run.steps)
        self._checkpoints = Checkpoints(checkpoints, keep=settings.keep_checkpoints)
        self.version, _ = self._checkpoints.load(self.model, self.optimizer)
        self.saved_version = self.version

    def train(self, groups: Sequence[ScoredGroup]) -> tuple[Batch, StepResult, float]:
        """Train the batch of this version and go to the next; returns batch, result and learning rate."""
        config, started = self._config, time.monotonic()
        batch = assemble(self.version, groups, config)
        cut = mini_batches(batch, count=config.algorithm.mini_batches, seed=config.run.seed)
        assembled = time.monotonic() - started
        rate = config.learner.learning_rate * self._rate_factor(self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = train_batch(
            self.model, self.optimizer, cut, config.algorithm, config.learner,
            temperature=config.rollout.temperature, version=self.version,
        )  # fmt: skip
        result.seconds["assemble"] = assembled
        self.version += 1
        return batch, result, rate

    def row(
        self, batch: Batch, result: StepResult, rate: float, seconds: dict[str, float], *, redone: bool
    ) -> dict[str, Any]:
        """The step's row of metrics.jsonl; `seconds` are the phases the actor timed."""
        seconds = result.seconds | seconds
        return step_row(batch, result, self._config, learning_rate=rate, seconds=seconds, redone=redone)

    def share(self) -> dict[str, Any]:
        """This rank's part of the weights in the rollout dtype: `tensors`, `digest` and `bytes`.

        Every rank gathers every parameter and keeps each K-th. Tied weights appear once.
        """
        rank, ranks, name_of_dtype = dist.get_rank(), dist.get_world_size(), self._config.rollout.dtype
        tensors: dict[str, TensorBytes[Any]] = {}
        checks, size = [], 0
        for place, (name, parameter) in enumerate(self.model.named_parameters()):
            full: Any = parameter.detach()
            if hasattr(full, "full_tensor"):
                full = full.full_tensor()
            if place % ranks != rank:
                continue
            kept = full.to(device="cpu", dtype=getattr(torch, name_of_dtype), copy=True).contiguous()
            data: Any = kept.view(-1).view(torch.uint8).numpy()
            tensors[name] = TensorBytes(data=data, dtype=name_of_dtype, shape=tuple(parameter.shape))
            checks.append(f"{name}:{zlib.crc32(memoryview(data))}")
            size += data.nbytes
        return {"tensors": tensors, "digest": hashlib.sha256("".join(checks).encode()).hexdigest()[:16], "bytes": size}

    def save(self) -> None:
        """Checkpoint this version, unless it is saved already."""
        if self.version > self.saved_version:
            extra = {"config": self._config.model_dump(mode="json")}
            self._checkpoints.save(self.version, self.model, self.optimizer, extra)
            self.saved_version = self.version
