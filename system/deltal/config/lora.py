"""The settings of LoRA: whether all weights are trained, or low-rank adapters beside some of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deltal.config.base import Positive, Real, Settings


class NoLora(Settings):
    """All weights are trained."""

    kind: Literal["none"] = "none"


class Lora(Settings):
    """W + alpha / rank · B A beside each target, with A [rank, in] and B [out, rank]; only A and B are trained."""

    kind: Literal["lora"] = "lora"
    rank: Positive = Field(16, description="rows of A")
    alpha: Real = Field(32.0, gt=0.0, description="the adapter counts alpha / rank")
    dropout: Real = Field(
        0.0, ge=0.0, le=0.0, description="0 and nothing else: a ratio needs the distribution that was sampled from"
    )
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="linear layers of a decoder layer that get an adapter",
    )


LoraConfig = Annotated[NoLora | Lora, Field(discriminator="kind")]
