"""A learner killed with kill -9 and resumed arrives at the bits of one that was never killed. K processes, no Ray."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from deltal.config import RandomModel, RunConfig
from deltal.config.file import resolve
from deltal.learner.model import prepare
from deltal.learner.trainer import Trainer
from deltal.types import ScoredGroup
from tests.ranks import together
from tests.unit.builders import scored

EVERY = 3
"""Steps between checkpoints."""


def settings(ranks: int) -> RunConfig:
    return resolve(
        {
            "model": {"kind": "random"},
            "data": {"kind": "generated"},
            "rollout": {"max_response_tokens": 64},
            "algorithm": {"aggregation": {"kind": "delta_l", "alpha": "auto"}, "mini_batches": 2},
            "learner": {"ranks": ranks, "learning_rate": 1e-3, "micro_batch_tokens": 96, "keep_checkpoints": 9,
                        "schedule": {"kind": "cosine", "warmup_steps": 2}},
        }
    )  # fmt: skip


def batch(version: int) -> list[ScoredGroup]:
    """Recorded groups: the same whoever asks."""
    return [
        scored(10 * version + i, rewards=[float((version + i + r) % 3 == 0) for r in range(4)],
               lengths=[3 + 7 * r + i + version for r in range(4)], version=version)
        for i in range(5)
    ]  # fmt: skip


def learn(rank: int, ranks: int, folder: str, until: int, ends: str) -> dict[str, Any]:
    """One rank. `ends`: `in order`, or by kill -9, one step after checkpoint EVERY or while it is being written."""
    trainer = Trainer(settings(ranks), prepare(RandomModel()), folder)
    found: dict[str, Any] = {"began_at": trainer.version, "loaded": full(trainer), "losses": {}}
    while trainer.version < until:
        version = trainer.version
        _, result, _ = trainer.train(batch(version))
        found["losses"][version] = (result.sums.loss, result.grad_norms)
        if trainer.version % EVERY == 0:
            trainer.save()
            if ends == "while written":
                os.kill(os.getpid(), signal.SIGKILL)
        if trainer.version == EVERY + 1 and ends == "a step later":
            trainer.finish()
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.finish()
    return found | {"digest": trainer.share()["whole"], "weights": full(trainer)}


def full(trainer: Trainer) -> dict[str, torch.Tensor]:
    told = {}
    for name, parameter in trainer.model.named_parameters():
        whole: Any = parameter.detach()
        told[name] = (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).clone()
    return told


def learner(ranks: int, folder: Path, name: str, until: int, ends: str = "in order") -> dict[str, Any]:
    """K ranks with the checkpoints of `name`, to their end; what rank 0 found, empty when they were killed."""
    arguments = (learn, ranks, ranks, str(folder / name), until, ends)
    if ends == "in order":
        found: dict[str, Any] = together(*arguments, folder=folder / f"{name}-found")[0]
        return found
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        together(*arguments, folder=folder / f"{name}-killed")
    return {}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare(RandomModel())
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def straight(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """Six steps of K ranks that nothing disturbed; they leave a checkpoint of the sixth."""
    return {"ranks": request.param} | learner(request.param, folder, f"straight-{request.param}", 2 * EVERY)


def test_three_steps_a_kill_and_three_more_are_six_steps_to_the_last_bit(straight: dict[str, Any], folder: Path):
    ranks = straight["ranks"]
    assert learner(ranks, folder, f"killed-{ranks}", 2 * EVERY, "a step later") == {}
    resumed = learner(ranks, folder, f"killed-{ranks}", 2 * EVERY)
    assert resumed["began_at"] == EVERY
    assert resumed["digest"] == straight["digest"]
    assert same_weights(resumed["weights"], straight["weights"])
    assert not same_weights(resumed["weights"], resumed["loaded"])
    for version, figures in resumed["losses"].items():
        assert figures == straight["losses"][version], f"batch {version} was redone to other figures"


def test_another_number_of_ranks_resumes_with_the_same_weights(straight: dict[str, Any], folder: Path):
    ranks = straight["ranks"]
    other = learner(3 - ranks, folder, f"straight-{ranks}", 2 * EVERY)
    assert other["began_at"] == 2 * EVERY
    assert same_weights(other["loaded"], straight["weights"])


def test_a_kill_while_a_checkpoint_is_written_loses_no_bit(straight: dict[str, Any], folder: Path):
    ranks = straight["ranks"]
    learner(ranks, folder, f"cut-{ranks}", 2 * EVERY, "while written")
    resumed = learner(ranks, folder, f"cut-{ranks}", 2 * EVERY)
    assert resumed["began_at"] in (0, EVERY), "a half-written checkpoint is none"
    assert same_weights(resumed["weights"], straight["weights"])
