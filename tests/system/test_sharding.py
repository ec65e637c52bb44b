"""K ranks of FSDP2 over gloo give the summed gradient of one rank, and publish the same weights."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deltal.config import RandomModel, RunConfig
from deltal.config_file import resolve
from deltal.learner.batch import assemble, mini_batches, pack
from deltal.learner.model import load, prepare
from deltal.learner.step import StepSums, accumulate, shard
from tests.unit.builders import scored

LIMIT = 1e-5
"""Largest ‖Δg‖ / ‖g‖ between shardings (design, numeric rule 6)."""


def settings(method: str) -> RunConfig:
    return resolve(
        {
            "model": {"kind": "random"},
            "data": {"kind": "generated"},
            "rollout": {"max_response_tokens": 64},
            "algorithm": {"aggregation": {"kind": method}},
        }
    )


def gradient(rank: int, ranks: int, meeting: str, method: str, budget: int, target: str) -> None:
    """One rank's part; rank 0 saves the full gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, ranks), rank=rank, world_size=ranks)
    model = shard(load(prepare(RandomModel())), compute_dtype=torch.float32, device="cpu")
    config = settings(method)
    groups = [
        scored(i, rewards=[float((i + r) % 3 == 0) for r in range(4)], lengths=[3 + 7 * r + i for r in range(4)])
        for i in range(6)
    ]
    batch = assemble(0, groups, config)
    micros = pack(mini_batches(batch, count=1, seed=0)[0], budget=budget, ranks=ranks)[rank]
    accumulate(model, micros, [None] * len(micros), config.algorithm, temperature=1.0, version=0, sums=StepSums())
    full: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        full[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    if rank == 0:
        torch.save(full, target)
    dist.barrier()
    dist.destroy_process_group()


def gradient_of(ranks: int, method: str, budget: int, folder: Path) -> torch.Tensor:
    """The summed gradient with `ranks` processes, as one vector."""
    target = folder / f"{ranks}-{method}-{budget}.pt"
    context = multiprocessing.get_context("spawn")
    arguments = (ranks, str(folder / f"meet-{target.name}"), method, budget, str(target))
    processes = [context.Process(target=gradient, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return torch.cat([grad.flatten() for grad in torch.load(target).values()])


@pytest.mark.parametrize("method", ["delta_l", "dapo"])
def test_update_does_not_depend_on_sharding(method: str, tmp_path: Path):
    prepare(RandomModel())
    one = gradient_of(1, method, 4096, tmp_path)
    assert float(one.norm()) > 0
    for ranks, budget in ((2, 64), (3, 128)):
        several = gradient_of(ranks, method, budget, tmp_path)
        assert float((several - one).norm() / one.norm()) <= LIMIT, (ranks, budget)
