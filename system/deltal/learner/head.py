"""The head: hidden states to log-probabilities and entropies, a few tokens at a time.

[tokens × vocabulary] of a long row is never held at once: backward makes the logits anew. Those of the first `chunk`
tokens of a row are kept, which saves a matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from deltal.errors import ModelError
from deltal.learner.attention import tell_segments
from deltal.learner.batch import PackedMicroBatch
from deltal.learner.trunk import trunk_of

LOGIT_FACTORS: dict[str, Callable[[float], float]] = {
    "logits_scaling": lambda divisor: 1.0 / divisor,
    "logit_scale": lambda factor: factor,
    "lm_head_multiplier": lambda factor: factor,
}
"""Settings of architectures that multiply their logits by a number."""
WORK = 128
"""Tokens whose logits are worked on at once: enough for a matmul at full speed."""
Observe = Callable[[Tensor, Tensor, Tensor, slice], None]
"""Takes probabilities float32[n, V], hidden [n, d] and target int64[n] of some tokens, and where they stand."""


class _TokenLogprob(torch.autograd.Function):
    """Log-probability and entropy of every token, differentiable once in hidden states and weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, chunk: int, keep: int,
        observe: Observe | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logprob = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprob)
        kept = torch.empty(min(len(target), keep), len(weight), dtype=torch.float32, device=hidden.device)
        for part in _parts(len(target), chunk):
            logs = _log_probabilities(hidden[part], weight, temperature)
            logprob[part] = logs.gather(-1, target[part, None])[:, 0]
            if part.stop <= len(kept):
                kept[part] = logs
            probabilities = logs.exp()
            entropy[part] = -torch.einsum("tv,tv->t", probabilities, logs)
            if observe is not None:
                observe(probabilities, hidden[part], target[part], part)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.save_for_backward(hidden, weight, target, entropy, kept)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target, entropy, kept = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        for part in _parts(len(target), ctx.chunk):
            is_kept = part.stop <= len(kept)
            logs = kept[part] if is_kept else _log_probabilities(hidden[part], weight, ctx.temperature)
            # d log p_y/dz_v = [v = y] - p_v and dH/dz_v = -p_v (log p_v + H): both share the factor p_v.
            by_logits = logs.exp()
            if by_entropy is not None:
                factor = (logs + entropy[part, None]).mul_(-by_entropy[part, None])
                by_logits.mul_(factor if by_logprob is None else factor.sub_(by_logprob[part, None]))
            elif by_logprob is not None:
                by_logits.mul_(-by_logprob[part, None])
            if by_logprob is not None:
                by_logits.scatter_add_(1, target[part, None], by_logprob[part, None])
            by_logits = by_logits.div_(ctx.temperature).to(hidden.dtype)
            if by_hidden is not None:
                torch.matmul(by_logits, weight, out=by_hidden[part])
            if by_weight is None:
                continue
            if hidden.dtype == torch.float32:
                by_weight.addmm_(by_logits.t(), hidden[part])
            else:
                by_weight += by_logits.t() @ hidden[part]
        return by_hidden, None if by_weight is None else by_weight.to(weight.dtype), None, None, None, None, None


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    """Tokens that are worked on at once."""
    size = min(chunk, WORK)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _log_probabilities(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """float32[n, V]."""
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits /= temperature
    # Not logits - logsumexp: logits stand far from 0 in some models, and that difference loses their digits.
    return torch.log_softmax(logits, dim=-1)


def token_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float, chunk: int, observe: Observe | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` and entropy of softmax(hidden · weightᵀ / temperature), both float32[N], in nats.

    `hidden` [N, d]; `weight` [V, d]; `target` int64[N]. At most `chunk` rows of V numbers are kept for backward; beside
    them, WORK rows are held thrice. Both results carry exact gradients to `hidden` and `weight`. `observe` sees
    each part's probabilities, in order.
    """
    keep = chunk if torch.is_grad_enabled() else 0
    return _TokenLogprob.apply(hidden, weight, target, temperature, chunk, keep, observe)  # type: ignore[no-any-return, no-untyped-call]


def attach(model: torch.nn.Module) -> None:
    """Give a causal language model the method `token_logprobs(micro, temperature, chunk, observe)`.

    Raises ModelError for a head that is more than one matrix and a factor.
    """
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(f"{type(model).__name__} has no head that is one matrix: not supported")
    changes = ["final_logit_softcapping"] if getattr(config, "final_logit_softcapping", None) else []
    if head.bias is not None:
        changes.append("bias")
    if changes:
        raise ModelError(f"{type(model).__name__} changes its logits by {', '.join(changes)}: not supported")
    trunk_of(model)
    factors = [by(getattr(config, name)) for name, by in LOGIT_FACTORS.items() if _is_number(config, name)]
    model.logit_factor = math.prod(factors)  # type: ignore[assignment]
    model.token_logprobs = MethodType(_token_logprobs, model)  # type: ignore[assignment]


def _is_number(config: Any, name: str) -> bool:
    return isinstance(getattr(config, name, None), int | float)


def shard_head(model: torch.nn.Module) -> None:
    """Let FSDP2 gather the root's parameters around `token_logprobs`, as it does around `forward`."""
    register_fsdp_forward_method(model, "token_logprobs")


def _check_window(model: Any, micro: PackedMicroBatch) -> None:
    """Neither way of attention has a window or chunks: fine while no sequence is longer than they are."""
    kinds, windows = getattr(model.config, "layer_types", None), []
    for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        if getattr(model.config, name, None) and (kinds is None or kind in kinds):
            windows.append(getattr(model.config, name))
    longest = int(micro.positions.max()) + 1
    window = min(windows, default=longest)
    if longest > window:
        raise ModelError(
            f"{type(model).__name__} sees {window} tokens back only, and a prompt with its response has {longest}: "
            "not supported"
        )


def _token_logprobs(
    self: Any, micro: PackedMicroBatch, temperature: float, chunk: int, observe: Observe | None
) -> tuple[Tensor, Tensor]:
    trained = len(micro.target)
    # A row with nothing to train still runs model and head, so that all ranks meet in the same collectives.
    predict_at = micro.predict_at if trained else micro.tokens.new_zeros(1)
    target = micro.target if trained else micro.tokens.new_zeros(1)
    _check_window(self, micro)
    seen = tell_segments(micro.segments()) if micro.tokens.device.type == "cpu" else micro.attention_mask()
    output = trunk_of(self)(
        input_ids=micro.tokens[None], position_ids=micro.positions[None], attention_mask=seen, use_cache=False
    )
    hidden = output.last_hidden_state[0, predict_at]
    if self.logit_factor != 1.0:
        hidden = hidden * self.logit_factor  # A factor of the logits, in a place where the gradients know of it.
    logprob, entropy = token_logprob(
        hidden, self.get_output_embeddings().weight, target,
        temperature=temperature, chunk=chunk, observe=observe if trained else None,
    )  # fmt: skip
    # No view: FSDP hangs its hook for backward on what is returned here.
    return (logprob, entropy) if trained else (logprob[:0].clone(), entropy[:0].clone())
