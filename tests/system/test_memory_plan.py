"""The plan's memory against the memory that real processes held: a learner's steps, an engine's sampling."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltal.config import RunConfig
from deltal.config.file import load_config
from deltal.plan.plan import plan
from tests.bench.peak import peak_bytes

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30
TOLERANCE = 0.15
FEW = ["replay.prompts_per_batch=4", "learner.threads=1", "rollout.threads=1"]
"""Two micro-batches of the demo, one of which computes beside the other's gradients: more hold no more. One thread
waits for no other on a busy machine.
"""


def learner(config: RunConfig, folder: str, answer: Any) -> None:
    """What a LearnerRank does, without Ray: full batches, each published, one checkpointed beside the next."""
    import torch.distributed as dist

    from deltal.learner.model import prepare
    from deltal.learner.trainer import Trainer
    from tests.unit.builders import scored

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    trainer = Trainer(config, prepare(config.model), folder)
    responses, length = config.rollout.responses_per_prompt, config.rollout.max_response_tokens
    shares: dict[int, Any] = {}
    for step in range(3):
        rewards = [float(i % 2) for i in range(responses)]
        # Groups of long and of short responses fill a row of the token budget together.
        groups = [
            scored(
                8 * step + i, rewards=rewards, lengths=[length // (1 + i % 2)] * responses, version=step,
                prompt_length=config.chat.max_prompt_tokens,
            )
            for i in range(config.replay.prompts_per_batch)
        ]  # fmt: skip
        trainer.train(groups)
        shares = {}  # the one before goes first
        shares = {trainer.version: trainer.share()}
        if step == 1:
            trainer.save()
    trainer.finish()
    assert shares
    answer.put(peak_bytes())
    dist.destroy_process_group()


def engine(config: RunConfig, folder: str, answer: Any) -> None:
    """What a RolloutWorker does, without Ray: loads, samples as many sequences at once as it may, loads again."""
    from deltal.rollout import vllm_engine

    os.environ.update(vllm_engine.environment(config.rollout))
    from deltal.learner.model import prepare
    from deltal.rollout.engine import Sampling

    limit = config.chat.max_prompt_tokens + config.rollout.max_response_tokens
    made = vllm_engine.create(prepare(config.model), config.rollout, max_model_len=limit, seed=0)
    import numpy as np

    for i in range(config.rollout.max_sequences):
        tokens = np.arange(config.chat.max_prompt_tokens, dtype=np.int32)
        sampling = Sampling(
            temperature=1.0, max_tokens=config.rollout.max_response_tokens, seed=None, stop_token_ids=()
        )
        made.add(str(i), tokens, sampling)
    while made.running:
        made.step()
    answer.put(peak_bytes())


def measured(what: Callable[[RunConfig, str, Any], None], config: RunConfig, folder: Path) -> float:
    """GiB that a process of its own held at most."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=what, args=(config, str(folder), answer))
    process.start()
    peak = answer.get(timeout=400)
    process.join(60)
    return float(peak) / GIB


def planned(config: RunConfig, role: str) -> float:
    (actor,) = [actor for actor in plan(config).actors if actor.role == role]
    return sum(actor.ram_gib.values())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("demo", FEW, marks=pytest.mark.slow),
        pytest.param(
            "demo",
            [*FEW, "learner.activation_checkpointing=true", "learner.micro_batch_tokens=1024"],
            marks=pytest.mark.slow,
        ),
        pytest.param("demo", [*FEW, "learner.lora.kind=lora"], marks=pytest.mark.slow),
        ("tiny", []),
    ],
)
def test_a_learner_holds_what_was_planned(name: str, settings: list[str], tmp_path: Path) -> None:
    config = load_config(str(CONFIGS / f"{name}.yaml"), settings)
    held = measured(learner, config, tmp_path)
    print(f"learner of {name} {settings}: planned {planned(config, 'learner'):.2f} GiB, held {held:.2f} GiB")
    assert planned(config, "learner") == pytest.approx(held, rel=TOLERANCE)


@pytest.mark.parametrize("name", [pytest.param("demo", marks=pytest.mark.slow), "tiny"])
def test_an_engine_holds_what_was_planned(name: str, tmp_path: Path) -> None:
    config = load_config(str(CONFIGS / f"{name}.yaml"), FEW)
    held = measured(engine, config, tmp_path)
    print(f"engine of {name}: planned {planned(config, 'rollout'):.2f} GiB, held {held:.2f} GiB")
    assert planned(config, "rollout") == pytest.approx(held, rel=TOLERANCE)
