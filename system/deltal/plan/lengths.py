"""How long a prompt with its response may be, and which heads can be computed, as a model's config.json tells.

Pure: a config's facts in, a number or an error out. What a config does not say is left to the engine, which refuses to
be made (rollout/vllm_engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltal.config import RunConfig
from deltal.errors import ConfigError, ModelError

POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
"""Names of the limit in the configs of different families; where there are several the smallest counts."""
SCALED_ALREADY = ("default", "dynamic", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rope scaling under which the limit holds as it is written; others multiply it by their factor. `dynamic`
would too, but beyond the limit transformers lets the longest sequence of a row decide for all of them.
"""
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of a head that vLLM's attention on CPU takes; others fail at the first step, not when the engine is made."""


def text_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about text: all of it, or `text_config` of a model that also sees."""
    inner = facts.get("text_config")
    return inner if isinstance(inner, Mapping) else facts


def longest(facts: Mapping[str, Any]) -> tuple[int, str] | None:
    """Most tokens of one sequence, and the config's name for it; None when the config does not say.

    A sliding window counts as a limit: the learner's attention has none, so longer sequences could not be trained.
    """
    facts = text_facts(facts)
    found = [(int(limit), name) for limit, name in (_positions(facts), _window(facts)) if limit]
    return min(found, default=None)


def check_length(facts: Mapping[str, Any], settings: RunConfig) -> None:
    """Whether the longest prompt with the longest response fits the model. Raises ConfigError with both numbers."""
    known = longest(facts)
    prompt, response = settings.chat.max_prompt_tokens, settings.rollout.max_response_tokens
    if known is None or prompt + response <= known[0]:
        return
    raise ConfigError(
        f"chat.max_prompt_tokens + rollout.max_response_tokens = {prompt} + {response} = {prompt + response} tokens, "
        f"but the model takes {known[0]} ({known[1]} in its config): lower one of the two"
    )


def check_heads(facts: Mapping[str, Any], settings: RunConfig) -> None:
    """Whether vLLM on CPU takes the width of the model's heads. Raises ModelError when it does not."""
    facts = text_facts(facts)
    width, heads = facts.get("hidden_size") or facts.get("n_embd"), facts.get("num_attention_heads")
    heads = heads or facts.get("n_head")
    # Multi-head latent attention has widths of other names.
    if settings.rollout.num_gpus > 0 or facts.get("kv_lora_rank") or not (width and heads):
        return
    head = facts.get("head_dim") or width // heads
    if head not in CPU_HEADS:
        raise ModelError(
            f"the model's heads are {head} wide, and vLLM on CPU takes {', '.join(map(str, CPU_HEADS))} only: take "
            "another model, or rollout.num_gpus=1"
        )


def _positions(facts: Mapping[str, Any]) -> tuple[float | None, str]:
    limits = [(limit, name) for name in POSITIONS if (limit := _number(facts.get(name)))]
    if real := _number(facts.get("model_max_length")):  # Cohere's, above what max_position_embeddings says
        limits = [(real, "model_max_length")]
    limit, name = min(limits, default=(None, ""))
    for scaling in _rope_scalings(facts):
        kind, factor = scaling.get("rope_type") or scaling.get("type"), _number(scaling.get("factor"))
        if kind in ("longrope", "su"):
            # Beyond it other factors are used: by vLLM for all sequences, by transformers for those that are longer.
            name = "original_max_position_embeddings"
            return _number(scaling.get(name)) or _number(facts.get(name)), name
        is_scaled = kind in SCALED_ALREADY or "gemma3" in str(facts.get("model_type"))
        if limit is not None and factor is not None and not is_scaled:
            return limit * factor, f"{name} times the factor of its rope scaling"
    return limit, name


def _window(facts: Mapping[str, Any]) -> tuple[float | None, str]:
    kinds = facts.get("layer_types")
    for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        window = _number(facts.get(name))
        if window is None or (kinds is not None and kind not in kinds):
            continue
        # Qwen's windows are off unless they are switched on, and begin at a layer that may not be there.
        is_off = not facts.get("use_sliding_window", not str(facts.get("model_type")).startswith(("qwen2", "qwen3")))
        first, layers = _number(facts.get("max_window_layers")), _number(facts.get("num_hidden_layers"))
        if is_off or (kinds is None and first is not None and layers is not None and first >= layers):
            continue
        return window, name
    return None, ""


def _rope_scalings(facts: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of rope scaling: one for all layers, or one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        given = facts.get(name)
        if isinstance(given, Mapping):
            inner = [part for part in given.values() if isinstance(part, Mapping)]
            yield from inner or [given]


def _number(value: Any) -> float | None:
    """A positive number, or None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None
