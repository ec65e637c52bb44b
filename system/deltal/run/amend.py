"""Settings that `deltal resume` may change: those under which a recorded step comes out the same.

A learner that comes back redoes recorded batches, and must arrive at the weights that were published. So nothing may
change that the weights, the rewards or the order of prompts depend on; who wants that forks: `deltal train --from`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from deltal.config import RunConfig
from deltal.config.file import resolve
from deltal.errors import ConfigError

FREE = (
    "run.steps", "run.export", "run.max_resumes", "run.max_restarts", "run.heartbeat_seconds", "run.silence_deadline",
    "rollout.workers", "rollout.max_sequences", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization",
    "rollout.threads", "rollout.num_cpus", "rollout.num_gpus", "rollout.step_deadline",
    "verify.workers", "verify.processes", "verify.num_cpus",
    "replay.group_deadline", "replay.lease_seconds", "replay.flush_*", "replay.max_refill",
    "learner.ranks", "learner.micro_batch_tokens", "learner.logit_chunk_tokens", "learner.activation_checkpointing",
    "learner.checkpoint_every", "learner.keep_checkpoints", "learner.max_skipped", "learner.max_mismatch",
    "learner.threads", "learner.cpu_offload", "learner.transport", "learner.num_cpus", "learner.num_gpus",
    "learner.*_deadline",
    "evaluation.every", "evaluation.deadline", "monitor.*",
)  # fmt: skip
"""Dotted keys, as patterns. Another number of ranks or token budget adds up in another order: equal to rounding."""


def amended(config: RunConfig, overrides: Sequence[str], *, done: int) -> RunConfig:
    """`config` with `key.sub=value` overrides, after `done` steps.

    Raises ConfigError for a wrong key or value, and for one that would change what is trained.
    """
    changed = resolve(config.model_dump(mode="json"), overrides, where="resume")
    before, after = (dict(_leaves(one.model_dump(mode="json"))) for one in (config, changed))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        if key == "run.steps":
            _check_steps(config, changed.run.steps, done)
        elif not any(fnmatch(key, pattern) for pattern in FREE):
            # A run that has trained nothing has no weights of its own to begin from.
            whence, start = (" from this one's weights", f" --from {config.run.name}") if done else ("", "")
            raise ConfigError(
                f"{key} = {before.get(key)} is fixed for a run: it decides what is trained or measured; to begin a new "
                f"run{whence}: deltal train CONFIG{start} {key}={after.get(key)}"
            )
    return changed


def _check_steps(config: RunConfig, steps: int, done: int) -> None:
    if config.learner.schedule.kind != "constant":
        raise ConfigError(f"run.steps is fixed for a run whose learning rate is {config.learner.schedule.kind} over it")
    if steps < done:
        raise ConfigError(f"run.steps = {steps} is below the {done} steps that are done")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every plain setting."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
