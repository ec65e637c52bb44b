"""Laws of the plan: parameters are counted exactly, memory is estimated from above, and what is short is named."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from deltal.config import HfModel, ModelShape, RandomModel, RunConfig
from deltal.config.lora import Lora
from deltal.errors import ModelError, ResourceError, UserError
from deltal.learner.batch import pack
from deltal.learner.head import WORK
from deltal.learner.lora import adapt
from deltal.learner.model import load, prepare
from deltal.learner.step import forward
from deltal.plan import memory
from deltal.plan.machine import named_gpus
from deltal.plan.memory import activation_bytes, parameter_count
from deltal.plan.model_folder import model_shape
from deltal.plan.plan import Machine, check, check_model_folder, machine, plan
from tests.unit.builders import scored
from tests.unit.test_batch import items_of

GIB = 2**30
LARGE = Machine(ram_gib=1000, shm_free_gib=500, cpus=64, gpus=8)
SMOLLM2 = ModelShape(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    tied_embeddings=True,
)


def run_config(**rooms: Any) -> RunConfig:
    data = {"kind": "generated"}
    return RunConfig.model_validate({"model": {"kind": "random", "shape": SMOLLM2.model_dump()}, "data": data, **rooms})


def hf_model(shape: ModelShape, device: str) -> torch.nn.Module:
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied_embeddings,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [{}, {"heads": 6, "kv_heads": 2, "head_dim": 64, "hidden_size": 192, "layers": 3}])
def test_parameters_are_counted_exactly(architecture: str, tied: bool, size: dict[str, int]) -> None:
    shape = ModelShape.model_validate({"architecture": architecture, "tied_embeddings": tied, **size})
    assert parameter_count(shape) == sum(p.numel() for p in hf_model(shape, "meta").parameters())


def test_smollm2_has_its_published_size() -> None:
    assert parameter_count(SMOLLM2) == 134_515_008


@pytest.mark.usefixtures("model_cache")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tokens", [256, 512])
def test_activations_are_estimated_from_above_and_closely(architecture: str, tokens: int) -> None:
    shape = ModelShape.model_validate(
        {"architecture": architecture, "hidden_size": 192, "intermediate_size": 512, "layers": 4, "heads": 3}
        | {"kv_heads": 1, "head_dim": 64, "vocab_size": 258}
    )
    model = load(prepare(RandomModel(shape=shape)))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    kept = []  # storages must live until all are seen, or an address would be counted for two tensors

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    lengths = [tokens // 8] * 3
    groups = [scored(i, rewards=[0.0, 1.0, 0.0], lengths=lengths, prompt_length=tokens // 8) for i in range(2)]
    (micro,) = pack(items_of(groups), budget=tokens, ranks=1)[0]
    assert len(micro.tokens) == tokens
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(model, micro, 1.0, chunk=1)
    assert 0.94 < sum(saved.values()) / activation_bytes(shape, tokens, "float32") <= 1.01


def test_the_head_works_on_as_many_logits_as_planned() -> None:
    assert memory.LOGIT_ROWS == WORK


@pytest.mark.usefixtures("model_cache")
@pytest.mark.parametrize("targets", [("q_proj",), ("k_proj", "down_proj"), Lora().targets])
def test_adapters_are_counted_exactly(targets: tuple[str, ...]) -> None:
    shape, lora = ModelShape(hidden_size=96, heads=3, kv_heads=1), Lora(rank=3, targets=targets)
    model = load(prepare(RandomModel(shape=shape)))
    adapt(model, lora, seed=0)
    assert memory.adapter_count(shape, lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def learner_of(**learner: Any) -> Any:
    (actor,) = [actor for actor in plan(run_config(learner=learner)).actors if actor.role == "learner"]
    return actor


def test_with_adapters_only_they_have_gradients_moments_and_a_place_in_checkpoints() -> None:
    plain, adapted = learner_of().ram_gib, learner_of(lora={"kind": "lora", "rank": 8}).ram_gib
    for part in ("gradients", "optimizer", "checkpoint copy"):
        assert adapted[part] < 0.05 * plain[part]
    assert plain["weights"] < adapted["weights"] < 1.05 * plain["weights"]
    assert adapted["published"] == plain["published"]


def test_offloaded_state_is_counted_in_the_machine_s_memory() -> None:
    for offload in (False, True):
        actor = learner_of(num_gpus=1, cpu_offload=offload)
        for part in ("weights", "gradients", "optimizer"):
            assert (part in actor.ram_gib, part in actor.gpu_gib) == (offload, not offload)
        assert {"activations", "logits"} <= set(actor.gpu_gib)


def test_recomputed_activations_are_fewer_and_both_are_told() -> None:
    kept, again = learner_of(), learner_of(activation_checkpointing=True)
    assert again.ram_gib["activations"] < 0.1 * kept.ram_gib["activations"]
    text = printed(plan(run_config()).table())
    assert f"tokens: {kept.ram_gib['activations']:.2f} GiB" in text
    assert f"(learner.activation_checkpointing): {again.ram_gib['activations']:.2f} GiB" in text


@pytest.mark.parametrize(
    ("text", "count", "gib"), [("8xH100", 8, 80), ("a100-40", 1, 40), ("2 x 48", 2, 48), ("4xRTX4090", 4, 24)]
)
def test_gpus_can_be_named_or_measured(text: str, count: int, gib: float) -> None:
    found = named_gpus(text)
    assert (found.gpus, found.gpu_gib) == (count, gib)


def test_unknown_gpus_are_refused() -> None:
    for text in ("8xB1000", "", "x", "many"):
        with pytest.raises(UserError, match="like 8xH100"):
            named_gpus(text)


def test_a_gpu_that_is_too_small_is_named_with_what_to_change() -> None:
    config = run_config(rollout={"num_gpus": 1}, learner={"num_gpus": 0.5, "ranks": 2, "micro_batch_tokens": 8192})
    assert plan(config).problems(named_gpus("2x1000")) == []
    (problem,) = plan(config).problems(named_gpus("2x24"))
    assert "one learner actor needs about" in problem
    assert "90% of 12.0 GiB may be used: raise learner.ranks" in problem
    # A machine whose GPUs nobody measured is not compared.
    assert plan(config).problems(LARGE) == []


def test_learner_state_is_sixteen_bytes_a_parameter_divided_by_ranks() -> None:
    for ranks in (1, 4):
        (learner,) = (a for a in plan(run_config(learner={"ranks": ranks})).actors if a.role == "learner")
        state = sum(learner.ram_gib[part] for part in ("weights", "gradients", "optimizer"))
        assert state * GIB * ranks == pytest.approx(16 * parameter_count(SMOLLM2), rel=1e-6)
        assert learner.count == ranks


def test_a_plan_lists_every_actor_with_what_it_asks_of_ray() -> None:
    made = plan(run_config(rollout={"workers": 3, "num_cpus": 0.25}, verify={"workers": 2}, learner={"ranks": 2}))
    counts = {actor.role: actor.count for actor in made.actors}
    singles = dict.fromkeys(("controller", "prompt queue", "rollout queue", "replay", "policy"), 1)
    assert counts == {**singles, "rollout": 3, "verify": 2, "learner": 2}
    assert all(actor.num_cpus == 0 for actor in made.actors if actor.role in singles)
    assert made.cpus == pytest.approx(3 * 0.25 + 2 * 0.05 + 2)
    assert made.gpus == 0


def test_on_gpu_the_weights_are_not_counted_as_memory_of_the_machine() -> None:
    made = plan(run_config(rollout={"num_gpus": 1}, learner={"num_gpus": 1}))
    for actor in made.actors:
        if actor.role in ("rollout", "learner"):
            assert "weights" in actor.gpu_gib
            assert "weights" not in actor.ram_gib
    assert made.gpus == 2
    assert made.kv_sequences is None


def test_the_object_store_holds_two_versions_of_the_weights() -> None:
    store = plan(run_config()).object_store_gib
    assert store["weights"] * GIB == 2 * 4 * parameter_count(SMOLLM2)


@pytest.mark.parametrize("gpus", [0, 1])
def test_weights_that_go_straight_to_the_workers_wait_with_their_rank(gpus: int) -> None:
    room = {"num_gpus": gpus}
    made = plan(run_config(learner={"transport": "direct", **room}, rollout=room))
    (learner,) = [actor for actor in made.actors if actor.role == "learner"]
    assert "weights" not in made.object_store_gib
    assert ("published" in learner.ram_gib, "published" in learner.gpu_gib) == (gpus == 0, gpus == 1)


@pytest.mark.parametrize(
    ("short", "rooms", "named"),
    [
        ({"ram_gib": 4}, {}, r"memory: the run needs about .* GiB.*micro_batch_tokens"),
        ({"ram_gib": 24}, {"rollout": {"workers": 9}}, r"memory: .*lower rollout.workers"),
        ({"shm_free_gib": 0.06}, {}, r"/dev/shm has 0.06 GiB free: enlarge it \(docker run --shm-size"),
        ({"cpus": 1}, {}, r"CPUs: the run asks for 1.55, this machine has 1"),
        ({"gpus": 0}, {"learner": {"num_gpus": 1}}, r"GPUs: the run asks for 1, this machine has 0"),
        ({}, {"rollout": {"kv_cache_gib": 0.01}}, r"KV cache: \d+% of one longest sequence fits"),
    ],
)
def test_what_is_short_is_named_with_what_to_change(short: dict[str, Any], rooms: dict[str, Any], named: str) -> None:
    facts = {"ram_gib": 1000, "shm_free_gib": 500, "cpus": 64, "gpus": 8, **short}
    (problem,) = plan(run_config(**rooms)).problems(Machine(**facts))
    assert "\n" not in problem
    with pytest.raises(ResourceError, match=named):
        check(run_config(**rooms), Machine(**facts))


def test_a_plan_that_fits_has_no_problem() -> None:
    assert check(run_config(), LARGE).problems(LARGE) == []


def test_an_unknown_shape_is_planned_as_far_as_it_can_be() -> None:
    config = run_config(model={"kind": "hf", "path": "org/name"})
    made = plan(config)
    assert made.parameters is None
    assert made.problems(LARGE) == []
    assert "size not known" in printed(made.table())


def test_the_table_names_every_role_and_the_sum() -> None:
    text = printed(plan(run_config()).table())
    for expected in ("134.5 M parameters", "controller", "rollout", "learner", "optimizer 1.00", "object store", "all"):
        assert expected in text


def test_the_shape_is_read_from_a_saved_config(tmp_path: Path) -> None:
    for architecture in ("llama", "qwen2", "qwen3"):
        shape = SMOLLM2.model_copy(update={"architecture": architecture})
        hf_model(shape, "meta").config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
        assert model_shape(HfModel(path=str(tmp_path))) == shape
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "model_type": "mamba"}))
    assert model_shape(HfModel(path=str(tmp_path))) is None
    assert model_shape(RandomModel()) == ModelShape()


def test_this_machine_can_be_read() -> None:
    found = machine()
    assert found.ram_gib > 0.5
    assert found.cpus > 0
    assert found.shm_free_gib >= 0
    assert found.gpus >= 0


def printed(thing: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_model_folder_must_be_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for lacking, name, text in (
        ("no such folder", None, ""),
        ("lacks config.json", "config.json", "{}"),
        ("lacks weights", "model.safetensors", ""),
        ("lacks a tokenizer", "tokenizer.json", "{}"),
    ):
        with pytest.raises(ModelError, match=lacking):
            check_model_folder(str(folder))
        folder.mkdir(exist_ok=True)
        if name:
            (folder / name).write_text(text)
    check_model_folder(str(folder))
    (folder / "config.json").write_text("[broken")
    with pytest.raises(ModelError, match="cannot be read"):
        check_model_folder(str(folder))
    with pytest.raises(ModelError, match="is a file"):
        check_model_folder(str(folder / "config.json"))


def test_a_hub_name_passes_and_a_path_that_does_not_exist_does_not() -> None:
    check_model_folder("Qwen/Qwen2.5-3B")
    check_model_folder("gpt2")
    for path in ("./nowhere", "/nowhere/model", "../nowhere", "a/b/c", "~/nowhere-at-all"):
        with pytest.raises(ModelError, match="no such folder"):
            check_model_folder(path)
