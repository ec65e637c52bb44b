"""One model in three places: the learner's packed forward, the engine before and after updates, the export.

The engine runs in a process of its own, as it does in a run: vLLM changes classes of transformers in its process.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltal.config import RolloutConfig
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.export import export
from deltal.learner.model import load
from deltal.learner.published import published
from deltal.learner.self_check import check_forward
from deltal.rollout import vllm_engine
from deltal.rollout.engine import Sampling
from deltal.types import TensorBytes
from tests.system.test_engine import PROMPT, disturb, greedy, logprobs
from tests.unit.builders import family_folder, run_config
from tests.unit.families import COMPUTED, ENGINE_APART, ENGINE_REFUSES, settings_of

pytestmark = pytest.mark.usefixtures("process_group")

OFTEN = ("qwen3", "gemma3_text", "phi3", "olmo2", "granite", "stablelm", "cohere2", "qwen3_moe")
"""Unlike each other in norms, heads, multipliers, layers or experts; the others are slow tests."""
EACH = [
    pytest.param(family, marks=() if family in OFTEN else pytest.mark.slow)
    for family in COMPUTED
    if family not in ENGINE_REFUSES
]
GREEDY = Sampling(temperature=0.0, max_tokens=12, seed=None, stop_token_ids=())
WILD = Sampling(temperature=2.0, max_tokens=24, seed=5, stop_token_ids=())


def serve(calls: Connection) -> None:
    """One engine at a time: `create` folder, `load` version and shard, `sample`; answers, or the error's text."""
    logging.disable(logging.WARNING)
    engine: Any = None
    while True:
        verb, *given = calls.recv()
        try:
            if verb == "create":
                engine = None
                gc.collect()  # An engine that ends takes vLLM's process groups with it, whoever's they are by then.
                settings = RolloutConfig(max_sequences=4, kv_cache_gib=0.1)
                engine = vllm_engine.create(given[0], settings, max_model_len=128, seed=1)
            elif verb == "load":
                engine.load(*given)
            else:
                for name, sampling in (("greedy", GREEDY), ("wild", WILD)):
                    engine.add(name, PROMPT, sampling)
            done: dict[str, Any] = {}
            while engine.running:
                done |= {sampled.key: sampled for sampled in engine.step()}
            calls.send((done, None))
        except Exception as error:
            calls.send((None, f"{type(error).__name__}: {error}"))


class Engine:
    """The process that holds it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._calls, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()

    def ask(self, *call: Any) -> dict[str, Any]:
        self._calls.send(call)
        assert self._calls.poll(120), f"no answer to {call[0]}"
        done, error = self._calls.recv()
        if error is not None:
            raise RuntimeError(error)
        return done  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.process.terminate()
    made.process.join(30)


def shard_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What a single rank would publish."""
    return [
        {
            name: TensorBytes(
                data=tensor.detach().clone().contiguous().view(-1).view(torch.uint8).numpy(),
                dtype="float32",
                shape=tuple(tensor.shape),
            )
            for name, tensor in published(model)
        }
    ]


def exported(model: torch.nn.Module, version: int, folder: str, place: Path) -> torch.nn.Module:
    """Through a checkpoint and the export, as plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    store = Checkpoints(str(place / "checkpoints"), keep=9)
    store.save(version, model, torch.optim.AdamW(model.parameters()), {})
    store.wait()
    config = run_config(model={"kind": "hf", "path": folder})
    export(str(place / "checkpoints"), str(place / f"out-{version}"), config=config)
    return AutoModelForCausalLM.from_pretrained(place / f"out-{version}", dtype=torch.float32).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", EACH)
def test_learner_engine_and_export_are_the_same_model_before_and_after_updates(
    family: str, engine: Engine, tmp_path: Path
) -> None:
    folder = family_folder(tmp_path / "start", **settings_of(family))
    model = load(folder)
    engine.ask("create", folder)
    seen = set()
    for version in range(3):
        if version:
            disturb(model, version)
        check_forward(model)
        plain = exported(model, version, folder, tmp_path)
        engine.ask("load", version, shard_of(model))
        done = engine.ask("sample")
        sampled = done["greedy"].tokens.tolist()  # less than 12 when one of them ends it
        assert sampled == greedy(plain, len(sampled)), version
        told = logprobs(plain, PROMPT, done["wild"].tokens, 2.0)
        assert np.abs(told - done["wild"].logprobs).max() < ENGINE_APART.get(family, 2e-4), version
        seen.add(round(float(told.sum()), 3))
    assert len(seen) == 3, "each update changed what is sampled"


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(ENGINE_REFUSES))
def test_a_family_that_vllm_does_not_take_is_said_to_be_so_in_one_line(
    family: str, engine: Engine, tmp_path: Path
) -> None:
    folder = family_folder(tmp_path / "start", **settings_of(family))
    shards = shard_of(load(folder))

    def try_it() -> None:
        for call in (("create", folder), ("load", 0, shards), ("sample",)):
            engine.ask(*call)

    with pytest.raises(RuntimeError, match=r"ModelError: vLLM (cannot|does not)") as caught:
        try_it()
    assert "\n" not in str(caught.value)


def test_weights_that_an_update_lacks_are_missed(engine: Engine, tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "start", **settings_of("qwen3"))
    (shard,) = shard_of(load(folder))
    engine.ask("create", folder)
    engine.ask("load", 0, [shard])
    del shard["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r"1 of its \d+ weights get no values, model.layers.1.mlp.down_proj.weight"):
        engine.ask("load", 1, [shard])
