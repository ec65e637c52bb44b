"""K ranks of FSDP2 over gloo give the summed gradient of one rank and the same update, whatever the token budget."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deltal.algorithm import AGGREGATIONS
from deltal.config import RandomModel, RunConfig
from deltal.config.file import load_config, resolve
from deltal.config.lora import Lora
from deltal.learner.batch import assemble, mini_batches, pack
from deltal.learner.lora import adapt, merged, whole
from deltal.learner.model import load, prepare
from deltal.learner.step import StepSums, accumulate, shard
from tests.ranks import together
from tests.unit.builders import scored

LIMIT = 1e-5
"""Largest ‖Δg‖ / ‖g‖ between shardings (design, numeric rule 6)."""

Case = tuple[str, int]
"""Aggregation and token budget."""
RATE = 1e5
"""Of gradient descent: the change must be far above the weights' own rounding."""
DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
MODELS: dict[str, Any] = {
    "tiny": RandomModel(),
    "tiny with adapters": RandomModel(),
    "smollm2": load_config(DEMO).model,
}


def settings(method: str) -> RunConfig:
    return resolve(
        {
            "model": {"kind": "random"},
            "data": {"kind": "generated"},
            "rollout": {"max_response_tokens": 64},
            "algorithm": {"aggregation": {"kind": method}},
        }
    )


def all_steps(rank: int, ranks: int, work: list[tuple[str, list[Case]]]) -> list[dict[Case, list[torch.Tensor]]]:
    """`steps` of several models by the same processes."""
    return [steps(rank, ranks, model, cases) for model, cases in work]


def steps(rank: int, ranks: int, model_name: str, cases: list[Case]) -> dict[Case, list[torch.Tensor]]:
    """One rank's part of all cases; on rank 0 each one's full gradient, and its change of the weights by SGD."""
    model = load(prepare(MODELS[model_name]))
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model_name == "tiny with adapters":
        put_adapters(model)
    model = shard(model, compute_dtype=torch.float32, device="cpu")
    assert {name: weight.shape for name, weight in merged(model)} == names
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        scored(i, rewards=[float((i + r) % 3 == 0) for r in range(4)], lengths=[3 + 7 * r + i for r in range(4)])
        for i in range(1 if model_name == "smollm2" else 6)
    ]
    made = {}

    def told(tensor: Any) -> torch.Tensor:
        full = whole(tensor)  # all ranks gather; of SmolLM2 one of them has room to keep it
        return full if rank == 0 else full.new_zeros(0)

    for method, budget in cases:
        config = settings(method)
        model.zero_grad()
        micros = pack(mini_batches(assemble(0, groups, config), count=1, seed=0)[0], budget=budget, ranks=ranks)[rank]
        accumulate(model, micros, [None] * len(micros), config.algorithm, temperature=1.0, version=0, sums=StepSums())
        gradient = [told(parameter.grad) for parameter in trained]
        own = [parameter.detach().clone() for parameter in trained]
        before = [told(parameter) for parameter in own]
        torch.optim.SGD(trained, lr=RATE).step()
        change = [told(p) - start for p, start in zip(trained, before, strict=True)]
        with torch.no_grad():
            for parameter, start in zip(trained, own, strict=True):
                parameter.copy_(start)
        made[method, budget] = [torch.cat([part.flatten() for part in parts]) for parts in (gradient, change)]
    return made


def put_adapters(model: torch.nn.Module) -> None:
    """Adapters that are not at their start, where A has no gradient; the same on all ranks."""
    adapt(model, Lora(rank=4), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)


def difference(several: torch.Tensor, one: torch.Tensor) -> float:
    return float((several - one).norm() / one.norm())


@pytest.mark.parametrize(
    "models",
    [
        {"tiny": sorted(AGGREGATIONS), "tiny with adapters": ["delta_l"]},
        pytest.param({"smollm2": ["delta_l"]}, marks=pytest.mark.slow),
    ],
    ids=["tiny", "smollm2"],
)
def test_update_does_not_depend_on_sharding(models: dict[str, list[str]], tmp_path: Path):
    whole_row, packed, alone = 4096, 80, 1  # a budget of one token packs nothing: every response rides alone
    right: dict[tuple[str, str], list[torch.Tensor]] = {}
    for model in models:
        prepare(MODELS[model])
    for ranks in (1, 2, 3):
        # Of the large model each budget is tried once: its gradients take seconds.
        large = (whole_row, alone) if ranks == 1 else (packed,)
        work = [
            (model, [(method, budget) for method in methods
                     for budget in (large if model == "smollm2" else (whole_row, packed, alone))])
            for model, methods in models.items()
        ]  # fmt: skip
        found = together(all_steps, ranks, ranks, work, folder=tmp_path / str(ranks), seconds=540.0)[0]
        for (model, _), made in zip(work, found, strict=True):
            for (method, budget), (gradient, change) in made.items():
                gradient_of_one, change_of_one = right.setdefault((model, method), [gradient, change])
                assert float(gradient_of_one.norm()) > 0
                assert difference(gradient, gradient_of_one) <= LIMIT, (model, ranks, method, budget)
                assert difference(change, change_of_one) <= LIMIT, (model, ranks, method, budget)
