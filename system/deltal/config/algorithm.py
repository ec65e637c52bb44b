"""The algorithm's settings: from rewards and lengths to the loss. What each formula is stands in `algorithm/`.

Choices are unions on `kind`; `kind` is the name in the registry of the file in `algorithm/` that serves it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from deltal.config.base import NonNegative, Positive, Real, Settings


def _alpha(value: object) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    raise ValueError("must be a number of at least 0, or auto")


class AutoAlpha(Settings):
    """How `alpha: auto` takes α = β, fitted while training under Var(g_i) ∝ L_i^β."""

    low: Real = Field(0.0, ge=0.0, description="least α")
    high: Real = Field(1.5, ge=0.0, description="largest α")
    fallback: Real = Field(1.0, ge=0.0, description="α while the estimate is uncertain")
    certain_within: Real = Field(0.3, gt=0.0, description="largest half width of β's 95% interval that is trusted")
    drift: Real = Field(0.03, ge=0.0, description="how far β may wander from one batch to the next, as a deviation")

    @model_validator(mode="after")
    def _low_is_not_above_high(self) -> AutoAlpha:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        return self


class AggregationBase(Settings):
    """Base of all aggregations."""

    normalize_over: Literal["batch", "mini_batch"] = Field(
        "batch",
        description="with several mini-batches: c_i of the whole batch, times B / b in a mini-batch of b responses; "
        "or c_i made anew from each mini-batch's own lengths",
    )


class DeltaL(AggregationBase):
    """ΔL Normalization (arXiv 2509.07558): c_i = L_i^-α / (M Σ L_j^-α)."""

    kind: Literal["delta_l"] = "delta_l"
    alpha: Annotated[float | Literal["auto"], PlainValidator(_alpha)] = Field(
        1.0, description="1 minimises variance when Var(g_i) grows as L_i; paper: 0.75 for Math; auto: fitted"
    )
    auto: AutoAlpha = Field(default_factory=lambda: AutoAlpha(), description="how `alpha: auto` behaves")


class DrGrpo(AggregationBase):
    """Dr. GRPO (arXiv 2503.20783): c_i = 1 / (B M)."""

    kind: Literal["dr_grpo"] = "dr_grpo"


class Grpo(AggregationBase):
    """GRPO (arXiv 2402.03300): c_i = 1 / (B L_i); biased."""

    kind: Literal["grpo"] = "grpo"


class Dapo(AggregationBase):
    """DAPO (arXiv 2503.14476): c_i = 1 / Σ L_j; biased."""

    kind: Literal["dapo"] = "dapo"


class SequenceSum(AggregationBase):
    """Mean over responses of the sum over tokens: c_i = 1 / B. `dr_grpo` without 1 / M."""

    kind: Literal["sequence_sum"] = "sequence_sum"


AggregationConfig = Annotated[DeltaL | DrGrpo | Grpo | Dapo | SequenceSum, Field(discriminator="kind")]
AdvantageKind = Literal["grpo", "grpo_no_std", "rloo", "reinforce_pp", "reinforce_pp_baseline", "max_rl"]
Level = Literal["token", "sequence"]


class PpoClip(Settings):
    """PPO's clipped surrogate (arXiv 1707.06347) with separate bounds (DAPO's clip-higher) and dual clip."""

    kind: Literal["ppo_clip"] = "ppo_clip"
    clip_low: Real = Field(0.2, gt=0.0, lt=1.0, description="ratio is clipped below 1 - clip_low")
    clip_high: Real = Field(0.3, gt=0.0, description="ratio is clipped above 1 + clip_high")
    dual_clip: Real | None = Field(
        None, gt=1.0, description="where the advantage is negative, the ratio counts at most so much; None: no bound"
    )


class Gspo(Settings):
    """GSPO (arXiv 2507.18071): PPO's surrogate with one ratio a response, the geometric mean of its tokens'."""

    kind: Literal["gspo"] = "gspo"
    clip_low: Real = Field(3e-4, gt=0.0, lt=1.0, description="the response's ratio is clipped below 1 - clip_low")
    clip_high: Real = Field(4e-4, gt=0.0, description="the response's ratio is clipped above 1 + clip_high")


class Cispo(Settings):
    """CISPO (arXiv 2506.13585): -A log π, weighted by a bounded ratio that is held constant."""

    kind: Literal["cispo"] = "cispo"
    clip_low: Real | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="the ratio counts at least 1 - clip_low; None, as in the paper's runs: no bound",
    )
    clip_high: Real = Field(4.0, gt=0.0, description="the ratio counts at most 1 + clip_high")


class Sapo(Settings):
    """SAPO (arXiv 2511.20347): a sigmoid of the ratio in place of the clip."""

    kind: Literal["sapo"] = "sapo"
    temperature_positive: Real = Field(1.0, gt=0.0, description="τ of tokens with positive advantage")
    temperature_negative: Real = Field(1.05, gt=0.0, description="τ of the others; larger: their gradient fades faster")


class Reinforce(Settings):
    """Plain policy gradient (Williams 1992): -A · log π."""

    kind: Literal["reinforce"] = "reinforce"


ObjectiveConfig = Annotated[PpoClip | Gspo | Cispo | Sapo | Reinforce, Field(discriminator="kind")]


class NoImportance(Settings):
    """All tokens count alike, whatever the engine's log-probability was."""

    kind: Literal["none"] = "none"


class TruncatedImportance(Settings):
    """Truncated importance sampling (TIS): min(exp(proximal - old), cap)."""

    kind: Literal["truncate"] = "truncate"
    cap: Real = Field(2.0, gt=0.0, description="largest weight")
    level: Level = Field("token", description="weight of a token by its own ratio, or by the product of its response's")


class MaskedImportance(Settings):
    """Masked importance sampling (IcePop): exp(proximal - old) between low and high, else 0."""

    kind: Literal["mask"] = "mask"
    low: Real = Field(0.5, ge=0.0, le=1.0, description="a smaller ratio leaves the loss")
    high: Real = Field(5.0, ge=1.0, description="a larger ratio leaves the loss")
    level: Level = Field("token", description="weight of a token by its own ratio, or by the product of its response's")


ImportanceConfig = Annotated[NoImportance | TruncatedImportance | MaskedImportance, Field(discriminator="kind")]


class NoKl(Settings):
    """No reference policy."""

    kind: Literal["none"] = "none"


class K1Kl(Settings):
    """KL(policy ‖ reference) by (log π - log ref) · log π, the first factor held constant: an unbiased gradient."""

    kind: Literal["k1"] = "k1"
    coefficient: Real = Field(0.001, gt=0.0, description="of the KL in the loss; a second model is loaded")


class K3Kl(Settings):
    """GRPO's KL term (arXiv 2402.03300, equation 4): ref / π - log(ref / π) - 1."""

    kind: Literal["k3"] = "k3"
    coefficient: Real = Field(0.001, gt=0.0, description="of the KL in the loss; a second model is loaded")


KlConfig = Annotated[NoKl | K1Kl | K3Kl, Field(discriminator="kind")]


class SketchConfig(Settings):
    """Random projections of each response's gradient of the LM head."""

    every: NonNegative = Field(1, description="steps between sketched steps; 0: never")
    size: Positive = Field(64, description="k; a sketch is k x k numbers a response")


class AlgorithmConfig(Settings):
    """From rewards and lengths to the loss."""

    aggregation: AggregationConfig = Field(
        default_factory=lambda: DeltaL(), description="lengths to token coefficients"
    )
    advantage: AdvantageKind = Field(
        "grpo_no_std",
        description="grpo_no_std: reward minus the group's mean; grpo: the same over the group's std; rloo: minus the "
        "mean of the others; max_rl: over the group's mean; reinforce_pp: whitened over the batch; "
        "reinforce_pp_baseline: minus the group's mean, then over the batch's std",
    )
    objective: ObjectiveConfig = Field(default_factory=lambda: PpoClip(), description="per-token loss")
    importance: ImportanceConfig = Field(
        default_factory=lambda: TruncatedImportance(),
        description="weight of a token for having been sampled by the engine and not by the learner",
    )
    kl: KlConfig = Field(
        default_factory=lambda: NoKl(), description="penalty for leaving the model that the run began from"
    )
    entropy_coefficient: Real = Field(0.0, ge=0.0, description="of the entropy that is added to the objective")
    mini_batches: Positive = Field(1, description="optimizer steps on one batch")
    sketch: SketchConfig = Field(
        default_factory=lambda: SketchConfig(),
        description="the variance instrument, and what `alpha: auto` is fitted on",
    )

    @property
    def has_reference(self) -> bool:
        """A frozen copy of the first model is needed."""
        return self.kl.kind != "none"

    @property
    def trains_every_response(self) -> bool:
        """A response with advantage 0 has a gradient all the same."""
        return self.has_reference or self.entropy_coefficient > 0

    @model_validator(mode="after")
    def _auto_alpha_needs_sketches(self) -> AlgorithmConfig:
        if getattr(self.aggregation, "alpha", None) == "auto" and not self.sketch.every:
            raise ValueError("alpha: auto is fitted on sketches: set algorithm.sketch.every to 1 or more")
        return self
