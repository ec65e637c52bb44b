"""Laws of LoRA: only adapters are trained, and everyone else sees whole weights under the base model's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from deltal.config import HfModel, RandomModel, RunConfig
from deltal.config.lora import Lora
from deltal.errors import ConfigError, ModelError, UserError
from deltal.learner.export import export
from deltal.learner.lora import adapt, merged, with_adapter
from deltal.learner.model import load, prepare
from deltal.learner.trainer import Trainer
from deltal.plan.model_folder import check_model_folder, model_shape
from deltal.types import ScoredGroup
from tests.unit.builders import run_config, scored

pytestmark = pytest.mark.usefixtures("process_group", "model_cache")

TOKENS = torch.tensor([[72, 105, 256, 3, 77, 200]])
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}


def config_of(architecture: str = "qwen2", *, tied: bool = True, **learner: Any) -> RunConfig:
    settings = {"lora": LORA, "learning_rate": 3e-2, "max_grad_norm": 1e3, **learner}
    shape = {"architecture": architecture, "tied_embeddings": tied}
    model = {"kind": "random", "shape": shape}
    return run_config(model=model, rollout={"max_response_tokens": 64}, learner=settings)


def groups(version: int) -> list[ScoredGroup]:
    return [scored(i, rewards=(0.0, 1.0, 0.5), lengths=(3 + i, 17, 9 * i + 1), version=version) for i in range(4)]


def trained(config: RunConfig, folder: Path, steps: int = 2) -> Trainer:
    trainer = Trainer(config, prepare(config.model), str(folder))
    for _ in range(steps):
        trainer.train(groups(trainer.version))
    return trainer


def saved(config: RunConfig, folder: Path) -> Trainer:
    trainer = trained(config, folder)
    trainer.save()
    trainer.finish()
    return trainer


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def same_function(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_an_adapted_model_begins_as_its_base_and_alike_on_all_ranks() -> None:
    folder = prepare(RandomModel())
    models = [load(folder) for _ in range(2)]
    for number, model in enumerate(models):
        torch.manual_seed(number)  # As ranks are seeded.
        adapt(model, Lora(rank=4), seed=7)
        assert torch.equal(logits(model), logits(load(folder)))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recomputing", [False, True])
def test_only_the_adapters_are_trained(tmp_path: Path, recomputing: bool) -> None:
    config = config_of(activation_checkpointing=recomputing)
    before = dict(load(prepare(config.model)).named_parameters())
    after = dict(trained(config, tmp_path).model.named_parameters())
    for name, parameter in after.items():
        if ".lora_" in name:
            assert parameter.requires_grad
            assert float(parameter.detach().abs().sum()) > 0, name
        else:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    assert sum(".lora_B" in name for name in after) == 7 * 2


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("llama", False), ("qwen3", True)])
def test_published_weights_have_the_base_s_names_and_compute_what_the_adapters_do(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    config = config_of(architecture, tied=tied)
    trainer, plain = trained(config, tmp_path), load(prepare(config.model))
    weights = dict(merged(trainer.model))
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: parameter.shape for name, parameter in plain.named_parameters()
    }
    assert set(trainer.share()["tensors"]) == set(weights)
    start = logits(plain)
    plain.load_state_dict(weights, strict=False)
    assert same_function(logits(plain), logits(trainer.model))
    assert not same_function(logits(plain), start)


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("llama", False)])
def test_an_export_is_merged_and_computes_what_the_adapters_do(tmp_path: Path, architecture: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(architecture, tied=tied)
    trainer = saved(config, tmp_path / "checkpoints")
    export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert same_function(logits(model), logits(trainer.model))
    assert model.config.tie_word_embeddings == tied


def test_an_exported_adapter_is_peft_s_and_can_be_the_start_of_another_run(tmp_path: Path) -> None:
    config = config_of()
    trainer = saved(config, tmp_path / "checkpoints")
    out = tmp_path / "out"
    export(str(tmp_path / "checkpoints"), str(out), config=config, adapter=True)
    assert (out / "adapter_model.safetensors").stat().st_size < 100_000
    assert not (out / "model.safetensors").exists()
    assert same_function(logits(with_adapter(load(prepare(config.model)), out)), logits(trainer.model))
    start = HfModel(path=str(out))
    check_model_folder(start.path)
    assert model_shape(start) == config.model.shape
    again = prepare(start)
    assert again != str(out)
    assert same_function(logits(load(again)), logits(trainer.model))
    assert prepare(start) == again


def test_a_run_without_adapters_has_none_to_export(tmp_path: Path) -> None:
    config = config_of(lora={"kind": "none"})
    saved(config, tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has no adapter: export it without --adapter"):
        export(str(tmp_path / "checkpoints"), str(tmp_path / "out"), config=config, adapter=True)


def test_a_checkpoint_holds_the_adapters_alone_and_training_goes_on_equal(tmp_path: Path) -> None:
    config = config_of()
    straight = saved(config, tmp_path)
    stored = FileSystemReader(tmp_path / "00000002").read_metadata().state_dict_metadata
    weights = {name for name in stored if name.startswith("model.")}
    assert len(weights) == 2 * 7 * 2
    assert all(".lora_" in name for name in stored if not name.startswith("optimizer.param_groups"))
    resumed = Trainer(config, prepare(config.model), str(tmp_path))
    assert resumed.version == 2
    for trainer in (straight, resumed):
        trainer.train(groups(2))
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_reference_of_a_kl_term_is_the_base(tmp_path: Path) -> None:
    values = config_of().model_dump()
    values["algorithm"]["kl"] = {"kind": "k3", "coefficient": 0.1}
    trainer = Trainer(RunConfig.model_validate(values), prepare(RandomModel()), str(tmp_path))
    _, first, _ = trainer.train(groups(0))
    _, second, _ = trainer.train(groups(1))
    assert first.sums.reference_kl == pytest.approx(0.0, abs=1e-6)
    assert second.sums.reference_kl > 1e-4


@pytest.mark.parametrize(
    ("targets", "said"),
    [(("q_prj",), "learner.lora.targets q_prj: .*not found"), (("lm_head",), "in no decoder layer")],
)
def test_targets_that_cannot_be_adapted_are_named(targets: tuple[str, ...], said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        adapt(load(prepare(RandomModel())), Lora(targets=targets), seed=0)
    assert "\n" not in str(error.value)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout"):
        Lora(dropout=0.1)


def test_an_adapter_folder_must_be_whole(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(ModelError, match="a LoRA adapter without weights"):
        check_model_folder(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"/nowhere/base.*no such folder"):
        check_model_folder(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        check_model_folder(str(tmp_path))


def test_offload_without_a_gpu_is_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="it needs num_gpus above 0"):
        config_of(cpu_offload=True)
