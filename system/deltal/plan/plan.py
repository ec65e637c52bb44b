"""What a run will ask of the machine: actors, CPUs, GPUs, memory. For --dry-run, and checked before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from deltal.config import LearnerConfig, ModelShape, RolloutConfig, RunConfig
from deltal.errors import ResourceError
from deltal.plan import memory
from deltal.plan.machine import GIB, Machine, machine
from deltal.plan.model_folder import check_model_folder, model_shape

__all__ = ["ActorPlan", "Machine", "Plan", "check", "check_model_folder", "machine", "plan"]

PROCESS_GIB = {"rollout": 0.7, "learner": 0.42, "verify": 0.2}
"""Of a process with its libraries before it does anything (vLLM and torch, torch, math-verify); 0.15 for the others."""
SANDBOX_GIB = 0.15
"""Of one verifying process; `verify.memory_mib` bounds its address space, which is never all used."""
RAY_GIB = 1.0
"""Ray's own processes on a head node."""
SPILL_SHARE = 0.8
"""Of the object store: above it Ray spills objects to disk, which costs a step seconds."""
HEADROOM = 0.9
"""Share of the memory a plan may use: Ray kills workers at 95%."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPlan:
    """One role."""

    role: str
    count: int
    num_cpus: float
    """Of one actor, in Ray's sense; fractions share a core."""
    num_gpus: float
    ram_gib: Mapping[str, float] = field(default_factory=dict)
    """Of one actor, by part."""
    gpu_gib: Mapping[str, float] = field(default_factory=dict)
    """Of one actor, by part; empty on CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run's demands, estimated from above."""

    actors: tuple[ActorPlan, ...]
    parameters: int | None
    """None when the model's shape is not known before its weights are at hand."""
    activations: str
    """What recomputation would change; empty when the shape is not known."""
    object_store_gib: Mapping[str, float]
    kv_sequences: float | None
    """Longest sequences that fit into one CPU worker's KV cache; None on GPU, or when the shape is not known."""

    @property
    def ram_gib(self) -> float:
        """All actors, the object store and Ray itself."""
        actors = sum(actor.count * sum(actor.ram_gib.values()) for actor in self.actors)
        return actors + sum(self.object_store_gib.values()) + RAY_GIB

    @property
    def object_store_bytes(self) -> int:
        """What a local Ray is given: it writes to disk what is above 80%, and frees a version late."""
        return int((1.5 * sum(self.object_store_gib.values()) / SPILL_SHARE + 0.5) * GIB)

    @property
    def cpus(self) -> float:
        """Of all actors, in Ray's sense."""
        return sum(actor.count * actor.num_cpus for actor in self.actors)

    @property
    def gpus(self) -> float:
        """Of all actors."""
        return sum(actor.count * actor.num_gpus for actor in self.actors)

    def facts(self) -> dict[str, Any]:
        """For programs: plain values, sizes in GiB."""
        return {
            "actors": [asdict(actor) for actor in self.actors],
            "parameters": self.parameters,
            "object_store_gib": dict(self.object_store_gib),
            "cpus": self.cpus,
            "gpus": self.gpus,
            "ram_gib": self.ram_gib,
        }

    def table(self) -> Table:
        """For people: a line a role, then the object store and the sum."""
        size = "size not known" if self.parameters is None else f"{self.parameters / 1e6:,.1f} M parameters"
        table = Table(title=f"plan: {size}", title_justify="left", caption=self.activations, caption_justify="left")
        for heading in ("role", "count", "CPUs each", "GPUs each", "memory each, GiB"):
            table.add_column(heading, justify="right" if heading != "role" else "left")
        table.add_column("of that")
        for actor in self.actors:
            table.add_row(
                actor.role,
                str(actor.count),
                f"{actor.num_cpus:g}",
                f"{actor.num_gpus:g}",
                f"{sum(actor.ram_gib.values()):.2f}",
                Text(_parts(actor.ram_gib) + (f"; on GPU: {_parts(actor.gpu_gib)}" if actor.gpu_gib else "")),
            )
        store = self.object_store_gib
        table.add_row("object store", "", "", "", f"{sum(store.values()):.2f}", Text(_parts(store)))
        table.add_row("Ray", "", "", "", f"{RAY_GIB:.2f}", "")
        table.add_section()
        table.add_row("all", "", f"{self.cpus:g}", f"{self.gpus:g}", f"{self.ram_gib:.2f}", "")
        return table

    def problems(self, available: Machine) -> list[str]:
        """One line for each thing that is short: how much, and what to change. Empty when the plan fits."""
        problems = []
        if self.ram_gib > HEADROOM * available.ram_gib:
            largest = max(self.actors, key=lambda actor: actor.count * sum(actor.ram_gib.values()))
            problems.append(
                f"memory: the run needs about {self.ram_gib:.1f} GiB, {HEADROOM:.0%} of this machine's "
                f"{available.ram_gib:.1f} GiB may be used; {largest.role} takes most: {_ADVICE[largest.role]}"
            )
        store = sum(self.object_store_gib.values())
        if store > available.shm_free_gib:
            problems.append(
                f"shared memory: the object store needs about {store:.2f} GiB, /dev/shm has "
                f"{available.shm_free_gib:.2f} GiB free: enlarge it (docker run --shm-size, "
                "or an emptyDir with medium: Memory in Kubernetes)"
            )
        if self.cpus > available.cpus + 1e-9:
            problems.append(
                f"CPUs: the run asks for {self.cpus:g}, this machine has {available.cpus:g}: lower rollout.workers, "
                "verify.workers or learner.ranks, or their num_cpus (fractions share a core)"
            )
        if self.gpus > available.gpus + 1e-9:
            problems.append(
                f"GPUs: the run asks for {self.gpus:g}, this machine has {available.gpus}: lower rollout.num_gpus and "
                "learner.num_gpus (0 runs on CPU), or use --address of a cluster that has them"
            )
        for actor in self.actors if available.gpu_gib is not None else ():
            needed, share = sum(actor.gpu_gib.values()), (available.gpu_gib or 0.0) * min(1.0, actor.num_gpus)
            if needed > HEADROOM * share:
                problems.append(
                    f"GPU memory: one {actor.role} actor needs about {needed:.1f} GiB, {HEADROOM:.0%} of {share:.1f} "
                    f"GiB may be used: {_GPU_ADVICE[actor.role]}"
                )
        if self.kv_sequences is not None and self.kv_sequences < 1:
            problems.append(
                f"KV cache: {self.kv_sequences:.0%} of one longest sequence fits: raise rollout.kv_cache_gib, or lower "
                "rollout.max_response_tokens or chat.max_prompt_tokens"
            )
        return problems


_ADVICE = {
    "rollout": "lower rollout.workers or rollout.kv_cache_gib",
    "learner": "lower learner.micro_batch_tokens or rollout.max_response_tokens, or take a smaller model",
    "verify": "lower verify.workers or verify.processes",
}
_GPU_ADVICE = {
    "rollout": "take larger GPUs, a narrower rollout.dtype or a smaller model",
    "learner": "raise learner.ranks, lower learner.micro_batch_tokens, or switch on learner.activation_checkpointing "
    "or learner.cpu_offload",
}


def plan(config: RunConfig, *, model_folder: str | None = None) -> Plan:
    """The plan of `config`; reads at most the model's config.json and starts nothing.

    `model_folder`: where a gguf_package model was converted to, when it was.
    Raises ModelError when a config.json cannot be read.
    """
    shape = model_shape(config.model, model_folder)
    kv_sequences = None
    if shape is not None and config.rollout.num_gpus == 0:
        token = memory.kv_bytes_per_token(shape, config.rollout.dtype)
        kv_sequences = config.rollout.kv_cache_gib * GIB / (token * memory.sequence_tokens(config))
    small = {"process": 0.15}
    singles = ("controller", "prompt queue", "rollout queue", "replay", "policy")
    return Plan(
        actors=(
            *(ActorPlan(role=role, count=1, num_cpus=0.0, num_gpus=0.0, ram_gib=small) for role in singles),
            _with_model(
                "rollout", config.rollout, config.rollout.workers, there=memory.engine_bytes(config, shape), here={}
            ),
            ActorPlan(
                role="verify",
                count=config.verify.workers,
                num_cpus=config.verify.num_cpus,
                num_gpus=0.0,
                ram_gib={"process": PROCESS_GIB["verify"], "sandboxes": SANDBOX_GIB * config.verify.processes},
            ),
            _learner(config, shape),
        ),
        parameters=None if shape is None else memory.parameter_count(shape),
        activations=_activations(config, shape),
        object_store_gib=_gib(memory.object_store_bytes(config, shape)),
        kv_sequences=kv_sequences,
    )


def check(config: RunConfig, available: Machine, *, model_folder: str | None = None) -> Plan:
    """The plan, if it fits. Raises ResourceError with the first thing that is short."""
    made = plan(config, model_folder=model_folder)
    problems = made.problems(available)
    if problems:
        raise ResourceError(problems[0])
    return made


def _with_model(
    role: str, room: RolloutConfig | LearnerConfig, count: int, *, there: Mapping[str, int], here: Mapping[str, int]
) -> ActorPlan:
    """An actor that computes with the model. `there`: bytes beside the model, on its GPU if it has one; `here`: bytes
    in the machine's memory in any case.
    """
    process = {"process": PROCESS_GIB[role], **_gib(here)}
    on_gpu = room.num_gpus > 0
    return ActorPlan(
        role=role,
        count=count,
        num_cpus=room.num_cpus,
        num_gpus=room.num_gpus,
        ram_gib=process if on_gpu else {**process, **_gib(there)},
        gpu_gib=_gib(there) if on_gpu else {},
    )


def _learner(config: RunConfig, shape: ModelShape | None) -> ActorPlan:
    there: dict[str, int] = {}
    here: dict[str, int] = {}
    if shape is not None:
        state, there = memory.learner_state_bytes(config, shape), memory.learner_work_bytes(config, shape)
        here = memory.learner_copy_bytes(config, shape)
        if config.learner.cpu_offload:
            if "reference" in state:  # it stays on the GPU
                there = {"reference": state.pop("reference"), **there}
            here = {**state, **here}
        else:
            there = {**state, **there}
    return _with_model("learner", config.learner, config.learner.ranks, there=there, here=here)


def _activations(config: RunConfig, shape: ModelShape | None) -> str:
    """What recomputing them would save, in a line."""
    if shape is None:
        return ""
    tokens, on_gpu = memory.forward_tokens(config), config.learner.num_gpus > 0
    kept, again = (
        memory.activation_bytes(shape, tokens, config.learner.compute_dtype, recomputed=recomputed, masked=on_gpu) / GIB
        for recomputed in (False, True)
    )
    return (
        f"activations of a forward of {tokens} tokens: {kept:.2f} GiB; recomputed in backward "
        f"(learner.activation_checkpointing): {again:.2f} GiB"
    )


def _gib(parts: Mapping[str, int]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def _parts(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
