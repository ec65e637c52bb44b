"""The policy computes what the engine samples from: nothing of training mode is on, whatever a config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltal.learner.batch import pack
from deltal.learner.export import export
from deltal.learner.model import load
from deltal.learner.step import forward
from deltal.learner.trainer import Trainer
from deltal.learner.trunk import compute_anew
from tests.unit.builders import family_folder, run_config, scored, tiny_model
from tests.unit.test_batch import items_of

pytestmark = pytest.mark.usefixtures("process_group", "model_cache")

RANDOM: dict[str, dict[str, Any]] = {
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    "llama": {"attention_dropout": 0.3},
    "phi3": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
    "stablelm": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.3, "num_local_experts": 4},
}
"""Families with settings that are random in training mode: modules, numbers read in the forward, a router's noise."""


def logprobs(model: torch.nn.Module) -> Tensor:
    (micro,) = pack(items_of([scored(0, rewards=[0.0, 1.0], lengths=[20, 9])]), budget=64, ranks=1)[0]
    return forward(model, micro, 1.0)[0]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", sorted(RANDOM))
def test_a_forward_of_the_policy_is_never_random(family: str, recomputed: bool, tmp_path: Path) -> None:
    needed = {"num_local_experts": 4} if family == "mixtral" else {}
    noisy = load(family_folder(tmp_path / "noisy", family, **RANDOM[family]))
    calm = load(family_folder(tmp_path / "calm", family, **needed))
    noisy.load_state_dict(calm.state_dict())
    if recomputed:
        compute_anew(noisy)
    expected = logprobs(calm)
    assert torch.equal(logprobs(noisy), logprobs(noisy))
    torch.testing.assert_close(logprobs(noisy), expected, rtol=0, atol=1e-6)
    gradients = []
    for model in (noisy, calm):
        logprobs(model).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_trainer_keeps_it_so_for_policy_and_reference_and_the_export_keeps_the_config(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "start", "starcoder2", **RANDOM["starcoder2"])
    config = run_config(
        model={"kind": "hf", "path": folder}, algorithm={"kl": {"kind": "k3", "coefficient": 0.1}},
        learner={"activation_checkpointing": True},
    )  # fmt: skip
    trainer = Trainer(config, folder, str(tmp_path / "checkpoints"))
    _, result, _ = trainer.train([scored(0, rewards=[0.0, 1.0], lengths=[20, 9])])
    assert not any(module.training for module in trainer.model.modules())
    assert result.sums.reference_kl == pytest.approx(0.0, abs=1e-9), "policy and reference are the same model still"
    trainer.save()
    trainer.finish()
    export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config)
    kept = load(str(tmp_path / "out")).config
    assert {name: getattr(kept, name) for name in RANDOM["starcoder2"]} == RANDOM["starcoder2"]


def test_layers_that_are_computed_anew_keep_their_inputs_only() -> None:
    kept = {}
    for recomputed in (False, True):
        model, seen = tiny_model(), {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        if recomputed:
            compute_anew(model)

        def note(tensor: Tensor, seen: dict[int, Tensor] = seen, weights: set[int] = weights) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logprobs(model)
        kept[recomputed] = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    assert kept[True] < kept[False] / 2
