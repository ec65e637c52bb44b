"""What two ranks must decide together: to skip, to give a checkpoint up, which one to load. Two processes, no Ray."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from deltal.config import RandomModel, RunConfig
from deltal.errors import FolderError
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.lora import merged
from deltal.learner.model import prepare
from deltal.learner.trainer import Trainer
from deltal.types import ScoredGroup
from tests.ranks import together
from tests.unit.builders import run_config, same_state, scored

RANKS = 2
Found = dict[str, Any]


def settings(mini_batches: int = 1, **learner: Any) -> RunConfig:
    return run_config(
        rollout={"max_response_tokens": 64}, algorithm={"mini_batches": mini_batches},
        learner={"ranks": RANKS, "learning_rate": 1e-3, "micro_batch_tokens": 96, "keep_checkpoints": 9, **learner},
    )  # fmt: skip


def batch(version: int, *, broken: bool = False) -> list[ScoredGroup]:
    """`broken`: one response's log-probabilities are not finite; its row is one rank's."""
    groups = [
        scored(10 * version + i, rewards=[float((i + r) % 3 == 0) for r in range(4)],
               lengths=[3 + 7 * r + i for r in range(4)], version=version)
        for i in range(4)
    ]  # fmt: skip
    if broken:
        group = groups[-1].group
        wrong = tuple(replace(one, logprobs=np.full_like(one.logprobs, np.nan)) for one in group.responses)
        groups[-1] = replace(groups[-1], group=replace(group, responses=wrong))
    return groups


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in merged(trainer.model)}


def skipping(rank: int, folder: str) -> Found:
    """The second mini-batch's gradient, or the first's, is not finite."""
    trainer = Trainer(settings(mini_batches=2), prepare(RandomModel()), folder)
    trainer.train(batch(0))
    before = weights(trainer)
    _, skipped, _ = trainer.train(batch(1, broken=True))
    after = weights(trainer)
    _, good, _ = trainer.train(batch(2))
    return {"skipped": [skipped.skipped, good.skipped], "before": before, "after": after, "version": trainer.version}


def failing(rank: int, folder: str) -> Found:
    """Rank 1's disk is full for checkpoint 2; checkpoint 4 is damaged afterwards."""
    trainer = Trainer(settings(), prepare(RandomModel()), folder)
    trainer.train(batch(0))
    trainer.save()
    trainer.finish()
    trainer.train(batch(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    trainer.save()
    try:
        trainer.finish()
        error = ""
    except FolderError as raised:
        error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found: Found = {"error": error, "versions": [Checkpoints(folder, keep=9).versions()]}
    for version in (2, 3):
        trainer.train(batch(version))
        trainer.save()
        trainer.finish()
        found[f"weights {version + 1}"] = weights(trainer)
    dist.barrier()
    found["versions"].append(Checkpoints(folder, keep=9).versions())
    shard = sorted(Path(folder, "00000004").glob("__1_*"))[0]
    dist.barrier()
    if rank == 0:
        shard.write_bytes(shard.read_bytes()[:-1])
    dist.barrier()
    again = Trainer(settings(), prepare(RandomModel()), folder)
    return found | {"loaded": again.version, "passed_over": again.passed_over, "weights": weights(again)}


def adapting(rank: int, folder: str) -> Found:
    """Adapters are checkpointed and loaded by ranks that each hold a part of them."""
    lora = settings(lora={"kind": "lora", "rank": 4})
    trainer = Trainer(lora, prepare(RandomModel()), folder)
    start = weights(trainer)
    for version in range(2):
        trainer.train(batch(version))
    trainer.save()
    trainer.finish()
    again = Trainer(lora, prepare(RandomModel()), folder)
    found = {"loaded": again.version, "start": start, "before": weights(trainer), "after": weights(again)}
    figures = [one.train(batch(2))[1] for one in (trainer, again)]
    return found | {"figures": [(figure.sums.loss, figure.grad_norms) for figure in figures]}


def computing(rank: int, folder: str) -> Found:
    """Gradient norm of the same batch, as usual, with activations made anew, and in bfloat16."""
    ways = {"plain": {}, "recomputed": {"activation_checkpointing": True}, "bfloat16": {"compute_dtype": "bfloat16"}}
    found = {}
    for way, learner in ways.items():
        trainer = Trainer(settings(**learner), prepare(RandomModel()), f"{folder}/{way}")
        found[way] = trainer.train(batch(0))[1].grad_norms[0]
    return found


PARTS = (skipping, failing, adapting, computing)


def everything(rank: int, folder: str) -> dict[str, Found]:
    """All parts, one after the other, in the same two processes."""
    return {part.__name__: part(rank, f"{folder}/{part.__name__}") for part in PARTS}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What each of the two ranks found."""
    prepare(RandomModel())
    folder = tmp_path_factory.mktemp("ranks")
    return together(everything, RANKS, str(folder / "checkpoints"), folder=folder)


Both = list[dict[str, Found]]


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(found: Both):
    for skipped in (one["skipping"] for one in found):
        assert skipped["skipped"] == [True, False]
        assert same_state(skipped["before"], skipped["after"])
        assert skipped["version"] == 3


def test_a_disk_full_for_one_rank_and_a_damaged_shard_are_everyone_s(found: Both):
    for failed in (one["failing"] for one in found):
        assert "00000002 cannot be written: File too large; free some space" in failed["error"]
        assert failed["versions"] == [[1], [1, 3, 4]]
        assert failed["loaded"] == 3
        assert len(failed["passed_over"]) == 1
        assert "00000004 is damaged" in failed["passed_over"][0]
        assert same_state(failed["weights"], failed["weights 3"])
        assert not same_state(failed["weights"], failed["weights 4"])


def test_adapters_that_are_sharded_go_on_from_their_checkpoint(found: Both):
    for adapted in (one["adapting"] for one in found):
        assert adapted["loaded"] == 2
        assert same_state(adapted["before"], adapted["after"])
        assert not same_state(adapted["start"], adapted["after"])
        assert adapted["figures"][0] == adapted["figures"][1]


def test_recomputed_activations_and_narrow_types_give_the_same_gradient_under_sharding(found: Both):
    for computed in (one["computing"] for one in found):
        assert computed["recomputed"] == pytest.approx(computed["plain"], rel=1e-5)
        assert computed["bfloat16"] == pytest.approx(computed["plain"], rel=0.05)
