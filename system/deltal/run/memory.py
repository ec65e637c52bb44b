"""How much memory a model takes where: parameters, learner, engine, object store. Arithmetic only.

Symbols: N parameters, V vocabulary, h width, i MLP width, l layers, H heads of width d, K key-value heads, T tokens of
one forward, b bytes a number.
"""

from __future__ import annotations

from deltal.config import ModelShape, RunConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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


def activation_bytes(shape: ModelShape, tokens: int, dtype: str, *, recomputed: bool = False) -> int:
    """Peak of one forward and backward over T packed tokens.

    b·l·(T·(8h + 3Hd + 4i) + T²) saved for backward, T² being the mask each layer keeps; qwen3's norms on q and k keep
    2(H + K)d more a token. Then 3·4·T·V for float32 logits, their log-softmax and its gradient. Measured on
    transformers 5.19 with sdpa on CPU: 2 to 4% less. Kernels without a dense mask (GPU) need no T².
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_token = 8 * shape.hidden_size + 3 * queries + 4 * shape.intermediate_size
    if shape.architecture == "qwen3":
        per_token += 2 * (queries + keys)
    a_layer = BYTES[dtype] * (tokens * per_token + tokens * tokens)
    # With recomputation only each layer's input is kept, and one layer at a time is whole.
    inputs = BYTES[dtype] * shape.layers * tokens * shape.hidden_size
    saved = inputs + a_layer if recomputed else shape.layers * a_layer
    return saved + 3 * 4 * tokens * shape.vocab_size


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """One token's keys and values in all layers: 2·l·K·d·b."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[dtype]


def forward_tokens(config: RunConfig) -> int:
    """T of the largest forward: the token budget, or one longest response, which rides alone."""
    return max(config.learner.micro_batch_tokens, sequence_tokens(config))


def sequence_tokens(config: RunConfig) -> int:
    """Longest prompt and response together."""
    return config.chat.max_prompt_tokens + config.rollout.max_response_tokens


def learner_bytes(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Of one rank. Weights, gradients and AdamW's two moments are float32 and divided by K; activations are not."""
    parameters, ranks = parameter_count(shape), config.learner.ranks
    parts = {
        "weights": 4 * parameters // ranks,
        "gradients": 4 * parameters // ranks,
        "optimizer": 8 * parameters // ranks,
        "activations": activation_bytes(
            shape,
            forward_tokens(config),
            config.learner.compute_dtype,
            recomputed=config.learner.activation_checkpointing,
        ),
    }
    if config.algorithm.has_reference:
        parts["reference"] = BYTES[config.learner.compute_dtype] * parameters // ranks
    if config.algorithm.mini_batches > 1:
        parts["snapshot"] = 12 * parameters // ranks  # What a skipped batch goes back to.
    if ranks > 1:
        parts["gathered layer"] = BYTES[config.learner.compute_dtype] * largest_unit(shape)
    return parts


def checkpoint_copy_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Of one rank, in the machine's memory: weights and moments that are being written while training goes on."""
    return 12 * parameter_count(shape) // config.learner.ranks


def largest_unit(shape: ModelShape) -> int:
    """Parameters FSDP holds unsharded at once: embeddings, and two layers (one computing, one prefetched)."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    layers = (parameter_count(shape) - embeddings) // shape.layers
    return embeddings + 2 * layers


def engine_bytes(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Of one RolloutWorker on CPU: weights (a tied head is packed a second time) and the reserved KV cache."""
    width = BYTES[config.rollout.dtype]
    parts = {"weights": width * parameter_count(shape), "KV cache": int(config.rollout.kv_cache_gib * 2**30)}
    if shape.tied_embeddings:
        parts["packed head"] = width * shape.vocab_size * shape.hidden_size
    return parts


def object_store_bytes(config: RunConfig, shape: ModelShape | None) -> dict[str, int]:
    """Of the whole run: published weights in the rollout's dtype, and the groups in flight, all at full length."""
    groups = (config.replay.max_ahead + 2) * config.replay.prompts_per_batch
    tokens = config.rollout.responses_per_prompt * config.rollout.max_response_tokens
    parts = {"groups": groups * (tokens * RESPONSE_TOKEN_BYTES + 8 * config.chat.max_prompt_tokens)}
    if shape is not None:
        parts["weights"] = KEPT_VERSIONS * BYTES[config.rollout.dtype] * parameter_count(shape)
    return parts
