"""Families of models that transformers and vLLM share, as tiny ones: what was tried, and what came of it.

The table of docs/models.md says the same in words.
"""

from __future__ import annotations

from typing import Any

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MULTIPLIED = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7}
ROPE = {"rope_theta": 10000.0}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 200}

COMPUTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, linear rope": {"rope_scaling": ROPE | {"rope_type": "linear", "factor": 2.0}},
    "llama, llama3 rope": {
        "rope_scaling": ROPE
        | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64}
    },
    "llama, dynamic rope": {"rope_scaling": ROPE | {"rope_type": "dynamic", "factor": 2.0}},
    "llama, yarn rope": {
        "rope_scaling": ROPE | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    },
    "qwen2": {},
    "qwen2, padded": {"vocab_size": 333},
    "qwen3": {},
    "qwen3, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 200},
    "gemma": {},
    "gemma3_text": GEMMA,
    "phi3": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 200},
    "granite": MULTIPLIED | {"attention_multiplier": 0.3},
    "smollm3": {},
    "gpt2": {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 256},
    "gpt_neox": {"num_key_value_heads": 2},
    "persimmon": {"num_key_value_heads": 2},
    "hunyuan_v1_dense": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},
    "stablelm": {},
    "stablelm, parallel": {"use_parallel_residual": True},
    "stablelm, norms": {"qk_layernorm": True},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 200},
    "nemotron": {},
    "seed_oss": {},
    "arcee": {},
    "apertus": {},
    "ernie4_5": {},
    "helium": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": MULTIPLIED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Settings of each, over those of `builders.family_folder`; the first word of a name is transformers' model type."""

ENGINE_REFUSES = {"stablelm, parallel", "stablelm, norms", "phimoe"}
"""Those of `COMPUTED` that vLLM does not run: said in one line, by the engine."""
ENGINE_APART = {"apertus": 0.02}
"""Nats by which vLLM's own arithmetic differs, where that is more than rounding: its activation."""

REFUSED: dict[str, str] = {
    "gemma2": "final_logit_softcapping",
    "gemma2 without final cap": "softcap",
    "phi": "changes its logits by bias",
    "gptj": "its attention cannot be replaced",
    "gpt_oss": "s_aux",
    "bloom": "cannot be computed packed",
    "mpt": "cannot be computed packed",
    "mamba": "cannot be computed packed",
    "qwen3_next": "nats off",
    "lfm2": "nats off",
    "falcon_h1": "nats off",
}
"""What is said of each."""

SETTINGS: dict[str, dict[str, Any]] = COMPUTED | {
    "gemma2": GEMMA,
    "gemma2 without final cap": GEMMA | {"final_logit_softcapping": None},
    "gptj": {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 256, "rotary_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 200},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 64, "n_heads": 2, "n_layers": 2},
    "qwen3_next": MOE,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def settings_of(family: str) -> dict[str, Any]:
    """The arguments of `family_folder` for it."""
    return {"family": family.replace(",", "").split()[0]} | SETTINGS.get(family, {})
