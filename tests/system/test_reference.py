"""K ranks of FSDP2 over gloo compare with a sharded, frozen reference, and give the summed gradient of one rank."""

from pathlib import Path

import torch

from deltal.config import RandomModel
from deltal.config.file import resolve
from deltal.learner.batch import assemble, mini_batches, pack
from deltal.learner.model import load, prepare
from deltal.learner.step import StepSums, accumulate, shard
from tests.ranks import together
from tests.system.test_sharding import LIMIT, difference, whole
from tests.unit.builders import scored

CONFIG = resolve(
    {
        "model": {"kind": "random"},
        "data": {"kind": "generated"},
        "rollout": {"max_response_tokens": 64},
        "algorithm": {"kl": {"kind": "k3", "coefficient": 0.3}, "entropy_coefficient": 0.2},
    }
)


def step(rank: int, ranks: int, budget: int) -> tuple[torch.Tensor, float]:
    """One rank's part: the full gradient and the KL of all ranks."""
    model, reference = (load(prepare(RandomModel(seed=seed))) for seed in (0, 1))
    model = shard(model, compute_dtype=torch.float32, device="cpu")
    reference = shard(reference.eval().requires_grad_(False), compute_dtype=torch.float32, device="cpu")
    # One group without any advantage: only the terms under test reach it.
    groups = [scored(i, rewards=[float(i == 0), 1.0], lengths=[3 + 7 * i, 20]) for i in range(3)]
    items = mini_batches(assemble(0, groups, CONFIG), count=1, seed=0)[0]
    micros = pack(items, budget=budget, ranks=ranks, keep_all=True)[rank]
    sums = StepSums()
    accumulate(
        model, micros, [None] * len(micros), CONFIG.algorithm, temperature=1.0, version=0, sums=sums,
        reference=reference,
    )  # fmt: skip
    gradient = torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])
    kl = sums.reduced().reference_kl
    assert all(parameter.grad is None for parameter in reference.parameters())
    return gradient, kl


def step_of(ranks: int, budget: int, folder: Path) -> tuple[torch.Tensor, float]:
    gradient, kl = together(step, ranks, ranks, budget, folder=folder / f"{ranks}-{budget}")[0]
    return gradient, kl


def test_kl_and_entropy_do_not_depend_on_sharding(tmp_path: Path):
    for seed in (0, 1):
        prepare(RandomModel(seed=seed))
    one, kl = step_of(1, 4096, tmp_path)
    assert kl > 0
    gradient, other = step_of(2, 40, tmp_path)
    assert difference(gradient, one) <= LIMIT
    assert abs(other - kl) <= 1e-5 * kl
