"""The trainer of one rank: model, optimizer, checkpoints; pure torch, its actor does the talking.

All methods but `join` are called by all ranks together, in the same order.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from deltal.config import LearnerConfig, RunConfig
from deltal.config.lora import Lora
from deltal.learner import rng
from deltal.learner.batch import assemble, coefficients, mini_batches
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.instrument import Instrument
from deltal.learner.lora import adapt
from deltal.learner.model import load
from deltal.learner.published import published
from deltal.learner.report import step_row
from deltal.learner.self_check import check_forward
from deltal.learner.step import StepResult, schedule, shard, train_batch
from deltal.learner.trunk import compute_anew
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
        # Longer than any wait that has a deadline and a name of its own.
        timeout=timedelta(seconds=settings.batch_deadline + 60.0),
    )


def leave() -> None:
    """End the meeting: what one rank does afterwards, an export say, is its own."""
    dist.destroy_process_group()


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
        at_most: load none of a later version.
    """

    def __init__(self, config: RunConfig, model_folder: str, checkpoints: str, *, at_most: int | None = None) -> None:
        settings = config.learner
        torch.set_num_threads(settings.threads)
        rng.seed(config.run.seed, dist.get_rank())
        device = "cuda" if settings.num_gpus > 0 else "cpu"
        model: Any = load(model_folder)
        if isinstance(settings.lora, Lora):
            adapt(model, settings.lora, seed=config.run.seed)
        # Off a GPU there is nowhere to offload to: `deltal replay` may look at a GPU's run here.
        offload = settings.cpu_offload and device == "cuda"
        if not offload:
            model.to(device)
        check_forward(model)
        if settings.activation_checkpointing:
            compute_anew(model)
        self._config = config
        dtype = getattr(torch, settings.compute_dtype)
        self.model = shard(model, compute_dtype=dtype, device=device, cpu_offload=offload)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True,
        )  # fmt: skip
        self._reference = _reference(model_folder, settings, device) if config.algorithm.has_reference else None
        self._rate_factor = schedule(settings, config.run.steps)
        self._checkpoints = Checkpoints(checkpoints, keep=settings.keep_checkpoints)
        head = model.get_output_embeddings()
        self._instrument = Instrument(config, vocabulary=head.out_features, width=head.in_features, device=device)
        self.version, extra = self._checkpoints.load(self.model, self.optimizer, at_most=at_most)
        self._instrument.restore(extra.get("alpha"))
        self.saved_version = self.version
        self.passed_over = self._checkpoints.passed_over

    def train(self, groups: Sequence[ScoredGroup]) -> tuple[Batch, StepResult, float]:
        """Train the batch of this version and go to the next; returns batch, result and learning rate.

        A skipped batch leaves everything but the version as it was.
        """
        config, started, drawn = self._config, time.monotonic(), rng.state()
        alpha = self._instrument.alpha()
        batch = assemble(self.version, groups, config, alpha=alpha)
        own = config.algorithm.aggregation.normalize_over == "mini_batch"
        cut = mini_batches(
            batch, count=config.algorithm.mini_batches, seed=config.run.seed,
            anew=partial(coefficients, config=config, alpha=alpha) if own else None,
        )  # fmt: skip
        assembled = time.monotonic() - started
        rate = config.learner.learning_rate * self._rate_factor(self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sketcher = self._instrument.sketcher(batch)
        result = train_batch(
            self.model, self.optimizer, cut, config.algorithm, config.learner,
            temperature=config.rollout.temperature, version=self.version, reference=self._reference,
            sketcher=sketcher,
        )  # fmt: skip
        result.seconds["assemble"] = assembled
        if result.skipped:
            rng.restore(drawn)
        elif sketcher is not None:
            started = time.monotonic()
            result.variance = self._instrument.read(batch, sketcher, alpha)
            result.seconds["instrument"] = time.monotonic() - started
        self.version += 1
        return batch, result, rate

    def row(
        self, batch: Batch, result: StepResult, rate: float, seconds: dict[str, float], *, redone: bool
    ) -> dict[str, Any]:
        """The step's row of metrics.jsonl; `seconds` are the phases the actor timed."""
        seconds = result.seconds | seconds
        return step_row(batch, result, self._config, learning_rate=rate, seconds=seconds, redone=redone)

    def share(self) -> dict[str, Any]:
        """This rank's part of the weights in the rollout dtype: `tensors`, `digest` and `bytes`; `whole`: the digest
        of all ranks' parts, as the PolicyStore makes it. All ranks call it.

        Every rank gathers every parameter and keeps each K-th: as bytes for the object store, as torch tensors for
        `learner.transport: direct`. Tied weights appear once, adapters are merged.
        """
        rank, ranks, name_of_dtype = dist.get_rank(), dist.get_world_size(), self._config.rollout.dtype
        device = "cuda" if self._config.weights_stay_on_gpu else "cpu"
        tensors: dict[str, TensorBytes[Any] | torch.Tensor] = {}
        checks, size = [], 0
        for place, (name, full) in enumerate(published(self.model)):
            if place % ranks != rank:
                continue
            kept = full.to(device=device, dtype=getattr(torch, name_of_dtype), copy=True).contiguous()
            data: Any = kept.cpu().view(-1).view(torch.uint8).numpy()
            if self._config.learner.transport == "direct":
                tensors[name] = kept
            else:
                tensors[name] = TensorBytes(data=data, dtype=name_of_dtype, shape=tuple(full.shape))
            checks.append(f"{name}:{zlib.crc32(memoryview(data))}")
            size += data.nbytes
        digests: list[Any] = [None] * ranks
        dist.all_gather_object(digests, _digest(checks))
        return {"tensors": tensors, "digest": digests[rank], "whole": _digest(digests), "bytes": size}

    def save(self, version: int | None = None, *, keep: Collection[int] = ()) -> None:
        """Begin to checkpoint this version, unless it is saved already; checkpoints of the versions `keep` stay.

        `version`: after a skipped batch the one before it, whose state this still is.
        """
        version = self.version if version is None else version
        if version > self.saved_version:
            extra = {"config": self._config.model_dump(mode="json"), "alpha": self._instrument.state()}
            self._checkpoints.save(version, self.model, self.optimizer, extra, keep=keep)
            self.saved_version = version

    def written(self) -> dict[str, Any] | None:
        """`version`, `seconds` and `bytes` of a checkpoint that was completed since last asked for.

        Raises LearnerError when it could not be written.
        """
        return self._checkpoints.finished()

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete. Raises LearnerError when it could not be written."""
        self._checkpoints.wait()


def _digest(checks: Sequence[str]) -> str:
    return hashlib.sha256("".join(checks).encode()).hexdigest()[:16]


def _reference(folder: str, settings: LearnerConfig, device: str) -> torch.nn.Module:
    """The model the run began from, frozen and sharded like the policy, held in the dtype it computes in."""
    dtype = getattr(torch, settings.compute_dtype)
    model: Any = load(folder, dtype=dtype).to(device).requires_grad_(False)
    return shard(model, compute_dtype=dtype, device=device)
