"""Laws of the trainer: what it compares the policy with, and over what it makes coefficients anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltal.config import RandomModel, RunConfig
from deltal.learner.model import load, prepare
from deltal.learner.trainer import Trainer
from deltal.types import ScoredGroup
from tests.unit.builders import run_config, scored

pytestmark = pytest.mark.usefixtures("process_group", "model_cache")

MODEL = RandomModel()


def config_of(**algorithm: Any) -> RunConfig:
    return run_config(
        algorithm=algorithm, rollout={"max_response_tokens": 64}, learner={"learning_rate": 1e-2, "max_grad_norm": 1e3}
    )


def groups(version: int) -> list[ScoredGroup]:
    return [
        scored(i, rewards=(0.0, 1.0, 0.5), lengths=(3 + i, 17, 9 * i + 1), version=version, prompt_length=5)
        for i in range(4)
    ]


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def kl_of_a_step(trainer: Trainer) -> float:
    batch, result, rate = trainer.train(groups(trainer.version))
    row = trainer.row(batch, result, rate, {}, redone=False)
    assert row["reference_kl"] == pytest.approx(result.sums.reference_kl / result.sums.tokens)
    return float(row["reference_kl"])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_reference_is_the_model_the_run_began_from_also_after_a_resume(tmp_path: Path, kind: str) -> None:
    folder, config = prepare(MODEL), config_of(kl={"kind": kind})
    began = Trainer(config, folder, str(tmp_path))
    assert kl_of_a_step(began) == pytest.approx(0.0, abs=1e-6)
    moved = kl_of_a_step(began)
    assert abs(moved) > 1e-4
    began.save()
    began.finish()
    resumed = Trainer(config, folder, str(tmp_path))
    assert resumed.version == 2
    assert not torch.equal(flat(resumed.model), flat(load(folder)))
    assert kl_of_a_step(resumed) == pytest.approx(kl_of_a_step(began), rel=1e-4)


def test_without_a_kl_term_no_second_model_is_held(tmp_path: Path) -> None:
    trainer = Trainer(config_of(), prepare(MODEL), str(tmp_path))
    batch, result, rate = trainer.train(groups(0))
    assert trainer.row(batch, result, rate, {}, redone=False)["reference_kl"] is None


@pytest.mark.parametrize("kind", ["delta_l", "dapo"])
def test_what_is_normalized_over_the_mini_batch_is_another_update(tmp_path: Path, kind: str) -> None:
    moved = {}
    for over in ("batch", "mini_batch"):
        config = config_of(aggregation={"kind": kind, "normalize_over": over}, mini_batches=3)
        trainer = Trainer(config, prepare(MODEL), str(tmp_path / over))
        trainer.train(groups(0))
        moved[over] = flat(trainer.model)
    assert not torch.equal(moved["batch"], moved["mini_batch"])
