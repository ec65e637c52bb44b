"""A prompt and response that are longer than the model takes are refused with both numbers, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltal.errors import ConfigError, ModelError
from deltal.plan.inputs import check_inputs
from deltal.plan.lengths import longest
from tests.unit.builders import run_config

SCALED = {"max_position_embeddings": 100}


@pytest.mark.parametrize(
    ("facts", "limit", "named"),
    [
        ({"max_position_embeddings": 4096}, 4096, "max_position_embeddings"),
        ({"n_positions": 1024, "max_position_embeddings": None}, 1024, "n_positions"),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 9}, 64, "max_position"),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072, "model_max_length"),
        (SCALED | {"rope_scaling": {"type": "linear", "factor": 4.0}}, 400, "rope scaling"),
        (SCALED | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 400, "rope scaling"),
        (SCALED | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 100, "max_position_embeddings"),
        (SCALED | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 100, "max_position_embeddings"),
        (SCALED | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 100, "max_position_embeddings"),
        (SCALED | {"rope_scaling": None}, 100, "max_position_embeddings"),
        (
            SCALED | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            200,
            "rope scaling",
        ),
        (
            SCALED | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            100,
            "max_position_embeddings",
        ),
        (
            SCALED | {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 40},
            40,
            "original_max_position_embeddings",
        ),
        (SCALED | {"sliding_window": 32}, 32, "sliding_window"),
        (SCALED | {"sliding_window": 32, "layer_types": ["full_attention"]}, 100, "max_position_embeddings"),
        (SCALED | {"sliding_window": 32, "use_sliding_window": False}, 100, "max_position_embeddings"),
        (SCALED | {"sliding_window": 32, "model_type": "qwen2"}, 100, "max_position_embeddings"),
        (
            SCALED
            | {"sliding_window": 32, "model_type": "qwen2", "use_sliding_window": True}
            | {"max_window_layers": 4, "num_hidden_layers": 4},
            100,
            "max_position_embeddings",
        ),
        (SCALED | {"attention_chunk_size": 16, "layer_types": ["chunked_attention"]}, 16, "attention_chunk_size"),
    ],
)
def test_the_longest_sequence_is_read_off_the_config(facts: dict[str, Any], limit: int, named: str) -> None:
    found = longest(facts)
    assert found is not None
    assert found[0] == limit
    assert named in found[1]


def test_a_config_that_names_no_limit_sets_none() -> None:
    assert longest({"hidden_size": 64, "max_position_embeddings": None, "sliding_window": None}) is None


def folder_with(folder: Path, **facts: Any) -> str:
    """A model folder that looks complete."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | facts))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return str(folder)


@pytest.mark.parametrize("kind", ["random", "hf"])
def test_a_prompt_and_response_beyond_the_model_s_limit_are_refused_with_both_numbers(
    kind: str, tmp_path: Path
) -> None:
    model = {"kind": "random"} if kind == "random" else {"kind": kind, "path": folder_with(tmp_path, n_positions=4096)}
    config = run_config(model=model, chat={"max_prompt_tokens": 1000}, rollout={"max_response_tokens": 3097})
    with pytest.raises(ConfigError, match=r"1000 \+ 3097 = 4097 tokens, but the model takes 4096 \(.*\): lower"):
        check_inputs(config, hub=False)


def test_a_hub_model_s_config_is_looked_at_when_it_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    folder_with(snapshot, max_position_embeddings=512)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    long = {"chat": {"max_prompt_tokens": 500}, "rollout": {"max_response_tokens": 13}}
    with pytest.raises(ConfigError, match="513 tokens, but the model takes 512"):
        check_inputs(run_config(model={"kind": "hf", "path": "some/model"}, **long), hub=False)
    other = run_config(model={"kind": "hf", "path": "some/other"}, **long)
    assert check_inputs(other, hub=False) == ["model some/other"]


def test_heads_that_vllm_on_cpu_does_not_take_are_refused(tmp_path: Path) -> None:
    path = folder_with(tmp_path, hidden_size=32, num_attention_heads=2)
    with pytest.raises(ModelError, match="heads are 16 wide, and vLLM on CPU takes 32, 64"):
        check_inputs(run_config(model={"kind": "hf", "path": path}), hub=False)
