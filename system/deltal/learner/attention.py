"""Attention of a packed row on CPU: block by block, so that what may not be seen is not computed at all.

A segment is a prompt and its responses. With one response it is one causal block. With more there are three kinds: the
prompt on itself and each response on itself, both causal, and all responses on the prompt, whole. A response's two
results are one softmax, joined by their log-sum-exps; backward goes through each block alone, given the joined ones.
No mask is made, and nothing of size T² is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltal.errors import ModelError

ATTENTION = "deltal_packed"
"""transformers' name for `packed_attention`."""
HARMLESS = frozenset({
    "dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "past_key_values",
    "position_embeddings", "layer_idx", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "enable_gqa",
})  # fmt: skip
"""What architectures hand to their attention that changes nothing here: dropout is off, windows are looked at by the
head, the others only tell.
"""
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, slots=True)
class Segment:
    """Places in a row: the prompt is start … prompt_end, the responses follow one after the other."""

    start: int
    prompt_end: int
    ends: tuple[int, ...]
    """Of each response."""

    def blocks(self) -> Iterator[tuple[slice, slice, bool]]:
        """Queries, keys, and whether the block is causal; a response's own block comes after that on the prompt."""
        if len(self.ends) < 2:
            whole = slice(self.start, max((self.prompt_end, *self.ends)))
            yield whole, whole, True
            return
        prompt = slice(self.start, self.prompt_end)
        yield prompt, prompt, True
        yield slice(self.prompt_end, self.ends[-1]), prompt, False
        for start, end in zip((self.prompt_end, *self.ends), self.ends, strict=False):
            yield slice(start, end), slice(start, end), True


class _Packed(torch.autograd.Function):
    """float[1, H, T, d], all three with H heads; `scale` multiplies the scores."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, segments: Sequence[Segment]
    ) -> Tensor:
        out = torch.empty_like(query)
        sums = torch.empty(query.shape[:3], dtype=torch.float32)
        for segment in segments:
            for number, (rows, columns, causal) in enumerate(segment.blocks()):
                own, own_sum = _flash(
                    query[:, :, rows], key[:, :, columns], value[:, :, columns], 0.0, causal, scale=scale
                )
                if number > 1:
                    before = sums[:, :, rows]
                    joined = torch.logaddexp(before, own_sum)
                    own = own * (own_sum - joined).exp()[..., None]
                    own += out[:, :, rows] * (before - joined).exp()[..., None]
                    own_sum = joined
                out[:, :, rows], sums[:, :, rows] = own, own_sum
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.scale, ctx.segments = scale, segments
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        by_query, by_key, by_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for segment in ctx.segments:
            for rows, columns, causal in segment.blocks():
                parts = _flash_backward(
                    by_out[:, :, rows], query[:, :, rows], key[:, :, columns], value[:, :, columns], out[:, :, rows],
                    sums[:, :, rows], 0.0, causal, scale=ctx.scale,
                )  # fmt: skip
                by_query[:, :, rows] += parts[0]
                by_key[:, :, columns] += parts[1]
                by_value[:, :, columns] += parts[2]
        return by_query, by_key, by_value, None, None


def tell_segments(segments: Sequence[Segment]) -> Tensor:
    """A mask that carries the segments to every layer's attention: all architectures hand a mask on, not all hand on
    what else they are given. Of four dimensions, so that transformers makes none of its own.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    mask.segments = segments  # type: ignore[attr-defined]
    return mask


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    otherwise: Callable[..., tuple[Tensor, None]], scaling: float | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers: the mask's segments say who sees whom; without them it is `otherwise`.

    `query` [1, H, T, d], `key` and `value` [1, K, T, d]. Returns [1, T, H, d]. Raises ModelError for an architecture
    whose attention does more than this: caps scores, has sinks or biases, sees what is to come.
    """
    more = sorted(name for name, given in rest.items() if given is not None and name not in HARMLESS)
    if rest.get("is_causal") is False:
        more.append("is_causal = False")
    if more:
        raise ModelError(f"{type(module).__name__} asks its attention for {', '.join(more)}: not supported")
    segments: Sequence[Segment] | None = getattr(attention_mask, "segments", None)
    if segments is None:
        if attention_mask is not None and attention_mask.numel() == 1 < query.shape[2]:
            raise ModelError(f"{type(module).__name__} changes the mask it is given: not supported")
        return otherwise(module, query, key, value, attention_mask, scaling=scaling, **rest)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Packed.apply(query, key, value, scale, segments)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None
