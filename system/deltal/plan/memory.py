"""How much memory a model takes where: parameters, learner, engine, object store. Arithmetic only.

Symbols: N parameters, V vocabulary, h width, i MLP width, l layers, H heads of width d, K key-value heads, T tokens of
one forward, b bytes a number.
"""

from __future__ import annotations

from deltal.config import ModelShape, RunConfig, is_wrapped
from deltal.config.lora import Lora

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_ROWS = 128
"""Tokens whose logits the head works on at once (learner/head.py)."""
KEPT_BY_ALLOCATOR = 0.55
"""Freed memory that malloc keeps between activations of other sizes, as a share of them; measured 0.25 to 0.9."""
KEPT_VERSIONS = 2
"""Published policy versions alive at once: the newest, and the one workers may still be loading."""
RESPONSE_TOKEN_BYTES = 13
"""Of one response token in the object store: token 4, log-probability 4, mask 1, text about 4."""


def parameter_count(shape: ModelShape) -> int:
    """N, exactly, of llama, qwen2 (biases on q, k, v) and qwen3 (norms on q and k)."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden_size * (2 * queries + 2 * keys) + 3 * shape.hidden_size * shape.intermediate_size
    layer += 2 * shape.hidden_size
    if shape.architecture == "qwen2":
        layer += queries + 2 * keys
    if shape.architecture == "qwen3":
        layer += 2 * shape.head_dim
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return embeddings + shape.layers * layer + shape.hidden_size


def adapter_count(shape: ModelShape, lora: Lora) -> int:
    """Numbers in all adapters: rank · (in + out) for each target. Targets of other names are not counted."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {
        "q_proj": shape.hidden_size + queries,
        "k_proj": shape.hidden_size + keys,
        "v_proj": shape.hidden_size + keys,
        "o_proj": queries + shape.hidden_size,
        "gate_proj": shape.hidden_size + shape.intermediate_size,
        "up_proj": shape.hidden_size + shape.intermediate_size,
        "down_proj": shape.intermediate_size + shape.hidden_size,
    }
    return shape.layers * lora.rank * sum(sides.get(target, 0) for target in lora.targets)


def activation_bytes(
    shape: ModelShape, tokens: int, dtype: str, *, recomputed: bool = False, masked: bool = False
) -> int:
    """Saved for backward by one forward of T packed tokens, without the head.

    b·l·T·(6h + 4Hd + 4i + H): norms, attention, MLP; qwen3's norms on q and k keep 2(H + K)d more a token. Measured on
    transformers 5.19 on CPU: 0 to 2% less. `masked`: attention under a dense mask, as on GPU, keeps T² more a layer.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_token = 6 * shape.hidden_size + 4 * queries + 4 * shape.intermediate_size + shape.heads
    if shape.architecture == "qwen3":
        per_token += 2 * (queries + keys)
    a_layer = BYTES[dtype] * (tokens * per_token + (tokens * tokens if masked else 0))
    state = BYTES[dtype] * tokens * shape.hidden_size
    # With recomputation only each layer's input is kept, and one layer at a time is whole. 4: the last norm.
    return (shape.layers * state + a_layer if recomputed else shape.layers * a_layer) + 4 * state


def head_bytes(shape: ModelShape, tokens: int, chunk: int, *, frozen: bool) -> int:
    """Of the head: float32 logits kept for `chunk` tokens, thrice those that are worked on, and its own gradient, which
    waits until backward is through.
    """
    rows = min(tokens, chunk) + 3 * min(tokens, LOGIT_ROWS)
    return 4 * shape.vocab_size * (rows + (0 if frozen else shape.hidden_size))


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """One token's keys and values in all layers: 2·l·K·d·b."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[dtype]


def forward_tokens(config: RunConfig) -> int:
    """T of the largest forward: the token budget, or one longest response, which rides alone."""
    return max(config.learner.micro_batch_tokens, sequence_tokens(config))


def sequence_tokens(config: RunConfig) -> int:
    """Longest prompt and response together."""
    return config.chat.max_prompt_tokens + config.rollout.max_response_tokens


def learner_state_bytes(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Of one rank, for the whole run. Weights, gradients and AdamW's two moments are float32 and divided by K."""
    learner, parameters = config.learner, parameter_count(shape)
    adapters = adapter_count(shape, learner.lora) if isinstance(learner.lora, Lora) else None
    trained = parameters if adapters is None else adapters
    parts = {
        "weights": 4 * (parameters + (adapters or 0)),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }
    if config.algorithm.mini_batches > 1:
        parts["snapshot"] = 12 * trained  # What a skipped batch goes back to.
    if config.algorithm.has_reference:
        parts["reference"] = BYTES[learner.compute_dtype] * parameters
    return {name: size // learner.ranks for name, size in parts.items()}


def learner_work_bytes(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Of one rank, while it computes: the largest forward and backward, and what FSDP2 gathers for them."""
    learner, tokens = config.learner, forward_tokens(config)
    parts = {
        "activations": activation_bytes(
            shape, tokens, learner.compute_dtype,
            recomputed=learner.activation_checkpointing, masked=learner.num_gpus > 0,
        ),
        "logits": head_bytes(shape, tokens, learner.logit_chunk_tokens, frozen=isinstance(learner.lora, Lora)),
    }  # fmt: skip
    # On CPU the checkpoint's copy is laid into what malloc keeps, before new memory is asked for.
    reused = 0 if learner.num_gpus > 0 else learner_copy_bytes(config, shape)["checkpoint copy"]
    parts["allocator"] = max(0, int(KEPT_BY_ALLOCATOR * parts["activations"]) - reused)
    if config.weights_stay_on_gpu:
        parts["published"] = BYTES[config.rollout.dtype] * parameter_count(shape) // learner.ranks
    if is_wrapped(learner.ranks, learner.compute_dtype, cpu_offload=learner.cpu_offload):
        parts["gathered layer"] = BYTES[learner.compute_dtype] * largest_unit(shape)
        if config.algorithm.has_reference:  # whose root stays gathered, for it has no backward
            parts["gathered reference"] = BYTES[learner.compute_dtype] * embedding_count(shape)
    return parts


def learner_copy_bytes(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Of one rank, in the machine's memory: the published version, and a checkpoint that is being written."""
    state = learner_state_bytes(config, shape)
    share = BYTES[config.rollout.dtype] * parameter_count(shape) // config.learner.ranks
    # Gradients are as large as the trained weights.
    copies = {} if config.weights_stay_on_gpu else {"published": share}
    return {**copies, "checkpoint copy": state["gradients"] + state["optimizer"]}


def largest_unit(shape: ModelShape) -> int:
    """Parameters FSDP holds unsharded at once: embeddings, and two layers (one computing, one prefetched)."""
    embeddings = embedding_count(shape)
    layers = (parameter_count(shape) - embeddings) // shape.layers
    return embeddings + 2 * layers


def embedding_count(shape: ModelShape) -> int:
    """Parameters of the embedding and the head; one matrix when they are tied."""
    return shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)


def engine_bytes(config: RunConfig, shape: ModelShape | None) -> dict[str, int]:
    """Of one RolloutWorker, with its model. On CPU a tied head is packed a second time, all sequences may be prefilled
    in one step; on GPU it is whatever `gpu_memory_utilization` leaves.
    """
    room = config.rollout
    width, parts = BYTES[room.dtype], {}
    if shape is not None:
        parts["weights"] = width * parameter_count(shape)
    if room.num_gpus > 0:
        return parts
    if shape is not None:
        if shape.tied_embeddings:
            parts["packed head"] = width * shape.vocab_size * shape.hidden_size
        tokens = room.max_sequences * sequence_tokens(config)
        layer = width * tokens * (6 * shape.hidden_size + 3 * shape.intermediate_size)
        parts["step"] = layer + 3 * 4 * room.max_sequences * shape.vocab_size
    parts["KV cache"] = int(2**30 * room.kv_cache_gib)
    return parts


def object_store_bytes(config: RunConfig, shape: ModelShape | None) -> dict[str, int]:
    """Of the whole run: published weights in the rollout's dtype, and the groups in flight, all at full length."""
    groups = (config.replay.max_ahead + 2) * config.replay.prompts_per_batch
    tokens = config.rollout.responses_per_prompt * config.rollout.max_response_tokens
    parts = {"groups": groups * (tokens * RESPONSE_TOKEN_BYTES + 8 * config.chat.max_prompt_tokens)}
    if shape is not None and config.learner.transport == "object_store":
        parts["weights"] = KEPT_VERSIONS * BYTES[config.rollout.dtype] * parameter_count(shape)
    return parts
