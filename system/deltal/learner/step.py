"""One batch into one update: Σ coefficient × objective, `backward`, clip, step. Knows torch, not Ray.

Gradients are summed over tokens, micro-batches and ranks, never averaged, so the update does not depend on the
sharding: each token carries its coefficient from `assemble`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from deltal.algorithm import engine_kl, importance_weight, kl_penalty, per_token_loss
from deltal.algorithm.sketch import Sketcher
from deltal.config import LearnerConfig, is_wrapped
from deltal.config.algorithm import AlgorithmConfig
from deltal.learner.batch import Item, PackedMicroBatch, pack
from deltal.learner.head import shard_head
from deltal.learner.snapshot import Snapshot
from deltal.learner.trunk import decoder_layers


def shard(
    model: torch.nn.Module, *, compute_dtype: torch.dtype, device: str, cpu_offload: bool = False
) -> torch.nn.Module:
    """FSDP2: each decoder layer, then the rest, over all ranks; gradients are summed over ranks.

    One rank in float32 has nothing to shard and nothing to cast: the model is returned as it is, which saves a copy of
    all weights in every micro-batch. `cpu_offload`: the model is on the CPU and stays there, a layer at a time is on
    the GPU. The process group must exist.
    """
    if not is_wrapped(dist.get_world_size(), str(compute_dtype).removeprefix("torch."), cpu_offload=cpu_offload):
        return model
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both are needed: the factor alone makes gloo fail in backward while its peers hang.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    shard_head(model)
    return model


def forward(
    model: torch.nn.Module, micro: PackedMicroBatch, temperature: float, *, chunk: int = 512,
    sketcher: Sketcher | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability and entropy of each of the N trained tokens, float32[N], both with gradient.

    Logits exist only where a response token is predicted, `chunk` tokens at a time. `sketcher` is shown the head.
    """
    observe = None
    if sketcher is not None:

        def observe(probabilities: Tensor, hidden: Tensor, target: Tensor, part: slice) -> None:
            sketcher.add(probabilities, hidden, target, micro.place[part], temperature)

    call: Any = model.token_logprobs
    logprob, entropy = call(micro, temperature, chunk, observe)
    return logprob, entropy


@dataclass
class StepSums:
    """Sums over the trained tokens of a batch, to be added up over ranks."""

    tokens: float = 0.0
    loss: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    importance: float = 0.0
    bounded: float = 0.0
    """Tokens whose importance weight was truncated or masked."""
    reference_kl: float = 0.0
    same_version: float = 0.0
    """Tokens the learner's own version sampled: only there engine and learner must agree."""
    difference: float = 0.0
    engine_kl: float = 0.0
    difference_max: float = 0.0

    def add(
        self, micro: PackedMicroBatch, loss: Tensor, clipped: Tensor, weight: Tensor, bounded: Tensor, entropy: Tensor,
        kl: Tensor, logprob: Tensor, version: int,
    ) -> None:  # fmt: skip
        """Add one micro-batch's tokens; `logprob` is the learner's at the batch's start."""
        self.tokens += len(micro.target)
        self.loss += float(loss.detach())
        self.entropy += float(entropy.detach().sum())
        self.clipped += float(clipped.sum())
        self.importance += float(weight.sum())
        self.bounded += float(bounded.sum())
        self.reference_kl += float(kl.sum())
        same = micro.version == version
        gap = (logprob.detach() - micro.old_logprob).abs()[same]
        if len(gap):
            self.same_version += len(gap)
            self.engine_kl += float(engine_kl(logprob, micro.old_logprob)[same].sum())
            self.difference += float(gap.sum())
            self.difference_max = max(self.difference_max, float(gap.max()))

    def reduced(self) -> StepSums:
        """The same over all ranks."""
        names = [one.name for one in fields(self) if one.name != "difference_max"]
        sums = torch.tensor([getattr(self, name) for name in names], dtype=torch.float64)
        largest = torch.tensor([self.difference_max], dtype=torch.float64)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return StepSums(**dict(zip(names, sums.tolist(), strict=True)), difference_max=float(largest))


@dataclass(kw_only=True)
class StepResult:
    """What one batch's update was, the same on all ranks."""

    sums: StepSums
    grad_norms: list[float] = field(default_factory=list)
    """Norm of the reduced gradient before clipping, one a mini-batch."""
    clipped: bool = False
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    variance: dict[str, Any] = field(default_factory=dict)
    """What the instrument read from the batch's sketches; empty when it was not sketched."""


def accumulate(
    model: torch.nn.Module, micros: Sequence[PackedMicroBatch], proximal: Sequence[Tensor | None],
    algorithm: AlgorithmConfig, *, temperature: float, version: int, sums: StepSums,
    reference: torch.nn.Module | None = None, chunk: int = 512, sketcher: Sketcher | None = None,
) -> None:  # fmt: skip
    """Add the gradient of Σ c_i · (w · objective + KL and entropy terms) over all tokens of `micros` to the model's.

    `proximal`: log-probability of each micro-batch's tokens at the batch's start; None: the weights are still those.
    `reference`: the frozen model of the KL term, where there is one.
    """
    for micro, start in zip(micros, proximal, strict=True):
        with torch.no_grad():
            reference_logprob = None if reference is None else forward(reference, micro, temperature, chunk=chunk)[0]
        logprob, entropy = forward(model, micro, temperature, chunk=chunk, sketcher=sketcher)
        if not len(micro.target):
            logprob.sum().backward()  # type: ignore[no-untyped-call]
            continue
        at_start = logprob.detach() if start is None else start
        objective, clipped = per_token_loss(logprob, at_start, micro.advantage, algorithm.objective, micro.place)
        weight, bounded = importance_weight(at_start, micro.old_logprob, algorithm.importance, micro.place)
        penalty, kl = kl_penalty(logprob, reference_logprob, algorithm.kl)
        per_token = weight * objective + penalty
        if algorithm.entropy_coefficient:
            per_token = per_token - algorithm.entropy_coefficient * entropy
        loss = (micro.coefficient * per_token).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        sums.add(micro, loss, clipped, weight, bounded, entropy, kl, at_start, version)


def train_batch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, cut: Sequence[Sequence[Item]],
    algorithm: AlgorithmConfig, settings: LearnerConfig, *, temperature: float, version: int,
    reference: torch.nn.Module | None = None, sketcher: Sketcher | None = None,
) -> StepResult:  # fmt: skip
    """All optimizer steps of one batch, one a mini-batch of `cut`. `reference`: the frozen model of the KL term.

    A loss or gradient that is not finite on any rank skips the batch on all: weights and optimizer are as before it,
    also those that earlier mini-batches had changed.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Not the parameters' own: with `cpu_offload` they wait elsewhere.
    device = torch.device("cuda" if settings.num_gpus > 0 else "cpu")
    keep_all = algorithm.trains_every_response
    packed = [pack(items, budget=settings.micro_batch_tokens, ranks=ranks, keep_all=keep_all)[rank] for items in cut]
    packed = [[micro.to(device) for micro in micros] for micros in packed]
    result = StepResult(sums=StepSums())
    started = time.monotonic()
    proximal: list[list[Tensor | None]] = [[None] * len(micros) for micros in packed]
    if len(packed) > 1:
        with torch.no_grad():
            proximal = [
                [forward(model, micro, temperature, chunk=settings.logit_chunk_tokens)[0] for micro in micros]
                for micros in packed
            ]
    # The first mini-batch changes nothing before it is known to be finite: alone it needs no way back.
    before = Snapshot(optimizer) if len(packed) > 1 else None
    for micros, starts in zip(packed, proximal, strict=True):
        optimizer.zero_grad(set_to_none=True)
        accumulate(
            model, micros, starts, algorithm, temperature=temperature, version=version, sums=result.sums,
            reference=reference, chunk=settings.logit_chunk_tokens, sketcher=sketcher,
        )  # fmt: skip
        norm = grad_norm(model.parameters())
        result.grad_norms.append(norm)
        if not _is_finite(result.sums.loss, norm):
            result.skipped = True
            if before is not None:
                before.restore()
            break
        step_started = time.monotonic()
        result.clipped |= clip(model.parameters(), norm, settings.max_grad_norm)
        optimizer.step()
        result.seconds["optimizer"] = result.seconds.get("optimizer", 0.0) + time.monotonic() - step_started
    optimizer.zero_grad(set_to_none=True)
    result.sums = result.sums.reduced()
    result.seconds["forward_backward"] = time.monotonic() - started - result.seconds.get("optimizer", 0.0)
    return result


def _is_finite(loss: float, norm: float) -> bool:
    """Whether every rank's loss and the gradient's norm are finite; the same answer on all ranks."""
    finite = torch.tensor(float(math.isfinite(loss) and math.isfinite(norm)))
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def grad_norm(parameters: Iterator[torch.nn.Parameter]) -> float:
    """Norm of the whole reduced gradient; the same on all ranks."""
    norm: Any = torch.nn.utils.get_total_norm(
        [p.grad for p in parameters if p.grad is not None], error_if_nonfinite=False
    )
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def clip(parameters: Iterator[torch.nn.Parameter], norm: float, limit: float) -> bool:
    """Scale the gradient down to `limit` when its norm is above; whether it was."""
    if norm <= limit:
        return False
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(limit / norm)
    return True


def schedule(settings: LearnerConfig, steps: int) -> Callable[[int], float]:
    """Learning-rate factor by step (0 is the first): linear warm-up, then constant, linear or cosine to 0."""
    warmup = settings.schedule.warmup_steps
    decay: Callable[[float], float] = {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    }[settings.schedule.kind]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay(min(1.0, (step - warmup) / max(1, steps - warmup)))

    return factor
