"""One batch into one update: Σ coefficient × objective, `backward`, clip, step. Knows torch, not Ray.

Gradients are summed over tokens, micro-batches and ranks, never averaged, so the update does not depend on the
sharding: each token carries its coefficient from `assemble`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from deltal.algorithm.objective import importance_weight, per_token_loss
from deltal.config import AlgorithmConfig, LearnerConfig
from deltal.learner.batch import Item, PackedMicroBatch, pack


def shard(model: torch.nn.Module, *, compute_dtype: torch.dtype, device: str) -> torch.nn.Module:
    """FSDP2: each decoder layer, then the rest, over all ranks; gradients are summed over ranks.

    One rank in float32 has nothing to shard and nothing to cast: the model is returned as it is, which saves a copy of
    all weights in every micro-batch. The process group must exist.
    """
    if dist.get_world_size() == 1 and compute_dtype == torch.float32:
        return model
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.get_submodule("model").get_submodule("layers").children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both are needed: the factor alone makes gloo fail in backward while its peers hang.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def forward(model: torch.nn.Module, micro: PackedMicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability, with gradient, and entropy, without, of each of the N trained tokens: float32[N] both.

    Logits exist only where a response token is predicted.
    """
    # A row with nothing to train still runs the model, so that all ranks meet in the same collectives.
    predict_at = micro.predict_at if len(micro.predict_at) else torch.zeros(1, dtype=torch.int64)
    output = model(
        input_ids=micro.tokens[None],
        attention_mask=micro.attention_mask(),
        position_ids=micro.positions[None],
        use_cache=False,
        logits_to_keep=predict_at.to(micro.tokens.device),
    )
    logits = output.logits[0].float() / temperature
    if not len(micro.target):
        return logits.sum() * torch.zeros(0, device=logits.device), torch.zeros(0, device=logits.device)
    log_sum = torch.logsumexp(logits, dim=-1)
    logprob = logits.gather(-1, micro.target[:, None])[:, 0] - log_sum
    with torch.no_grad():
        entropy = log_sum - (torch.exp(logits - log_sum[:, None]) * logits).sum(-1)
    return logprob, entropy


@dataclass
class StepSums:
    """Sums over the trained tokens of a batch, to be added up over ranks."""

    tokens: float = 0.0
    loss: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    importance: float = 0.0
    same_version: float = 0.0
    """Tokens the learner's own version sampled: only there engine and learner must agree."""
    difference: float = 0.0
    difference_max: float = 0.0

    def add(
        self, micro: PackedMicroBatch, loss: Tensor, clipped: Tensor, weight: Tensor, entropy: Tensor,
        logprob: Tensor, version: int,
    ) -> None:  # fmt: skip
        """Add one micro-batch's tokens."""
        self.tokens += len(micro.target)
        self.loss += float(loss.detach())
        self.entropy += float(entropy.sum())
        self.clipped += float(clipped.sum())
        self.importance += float(weight.sum())
        gap = (logprob.detach() - micro.old_logprob).abs()[micro.version == version]
        if len(gap):
            self.same_version += len(gap)
            self.difference += float(gap.sum())
            self.difference_max = max(self.difference_max, float(gap.max()))

    def reduced(self) -> StepSums:
        """The same over all ranks."""
        sums = torch.tensor([
            self.tokens, self.loss, self.entropy, self.clipped, self.importance, self.same_version, self.difference
        ], dtype=torch.float64)  # fmt: skip
        largest = torch.tensor([self.difference_max], dtype=torch.float64)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        tokens, loss, entropy, clipped, importance, same_version, difference = sums.tolist()
        return StepSums(
            tokens=tokens,
            loss=loss,
            entropy=entropy,
            clipped=clipped,
            importance=importance,
            same_version=same_version,
            difference=difference,
            difference_max=float(largest),
        )


@dataclass(kw_only=True)
class StepResult:
    """What one batch's update was, the same on all ranks."""

    sums: StepSums
    grad_norms: list[float] = field(default_factory=list)
    """Norm of the reduced gradient before clipping, one a mini-batch."""
    clipped: bool = False
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


def accumulate(
    model: torch.nn.Module, micros: Sequence[PackedMicroBatch], proximal: Sequence[Tensor | None],
    algorithm: AlgorithmConfig, *, temperature: float, version: int, sums: StepSums,
) -> None:  # fmt: skip
    """Add the gradient of Σ c_i · w · objective over all tokens of `micros` to the model's.

    `proximal`: log-probability of each micro-batch's tokens at the batch's start; None: the weights are still those.
    """
    for micro, start in zip(micros, proximal, strict=True):
        logprob, entropy = forward(model, micro, temperature)
        if not len(micro.target):
            logprob.sum().backward()  # type: ignore[no-untyped-call]
            continue
        reference = logprob.detach() if start is None else start
        objective, clipped = per_token_loss(logprob, reference, micro.advantage, algorithm.objective)
        weight = importance_weight(reference, micro.old_logprob, algorithm.importance_cap)
        loss = (micro.coefficient * weight * objective).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        sums.add(micro, loss, clipped, weight, entropy, reference, version)


def train_batch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, cut: Sequence[Sequence[Item]],
    algorithm: AlgorithmConfig, settings: LearnerConfig, *, temperature: float, version: int,
) -> StepResult:  # fmt: skip
    """All optimizer steps of one batch, one a mini-batch of `cut`.

    A non-finite gradient skips what is left of the batch on all ranks alike: its norm is the same number everywhere.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = next(model.parameters()).device
    packed = [pack(items, budget=settings.micro_batch_tokens, ranks=ranks)[rank] for items in cut]
    packed = [[_moved(micro, device) for micro in micros] for micros in packed]
    result = StepResult(sums=StepSums())
    started = time.monotonic()
    proximal: list[list[Tensor | None]] = [[None] * len(micros) for micros in packed]
    if len(packed) > 1:
        with torch.no_grad():
            proximal = [[forward(model, micro, temperature)[0] for micro in micros] for micros in packed]
    for micros, starts in zip(packed, proximal, strict=True):
        optimizer.zero_grad(set_to_none=True)
        accumulate(model, micros, starts, algorithm, temperature=temperature, version=version, sums=result.sums)
        norm = grad_norm(model.parameters())
        result.grad_norms.append(norm)
        if not math.isfinite(norm):
            result.skipped = True
            break
        step_started = time.monotonic()
        result.clipped |= clip(model.parameters(), norm, settings.max_grad_norm)
        optimizer.step()
        result.seconds["optimizer"] = result.seconds.get("optimizer", 0.0) + time.monotonic() - step_started
    optimizer.zero_grad(set_to_none=True)
    result.sums = result.sums.reduced()
    result.seconds["forward_backward"] = time.monotonic() - started - result.seconds.get("optimizer", 0.0)
    return result


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


def _moved(micro: PackedMicroBatch, device: torch.device) -> PackedMicroBatch:
    if device.type == "cpu":
        return micro
    return PackedMicroBatch(**{name: getattr(micro, name).to(device) for name in micro.__dataclass_fields__})
