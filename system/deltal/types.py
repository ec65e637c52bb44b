"""What flows through deltal: frozen carriers with numpy inside, read-only, free of Ray and torch.

A group's life: `issued -> in flight -> admitted -> consumed | filtered | evicted`. Exactly one fate, ever;
`deltal audit` proves it from the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Purpose = Literal["train", "eval"]
Finish = Literal["stop", "length", "abort"]
Fate = Literal["consumed", "filtered", "evicted"]
Ref = TypeVar("Ref")
T = TypeVar("T")


def _freeze(array: Any, dtype: Any) -> NDArray[Any]:
    """A read-only one-dimensional copy-if-needed of `array` with `dtype`."""
    frozen = np.asarray(array, dtype=dtype)
    if frozen.flags.writeable:
        frozen = frozen.copy() if frozen is array else frozen
        frozen.flags.writeable = False
    return frozen


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One item of a data set with what is needed to judge an answer. Written by `data/`."""

    id: str
    """Unique in its data set."""
    task: str
    """Kind of verifier, a name of `verify/registry.py`."""
    messages: tuple[Message, ...]
    """The conversation so far, without system prompt and prefill (those are config)."""
    answer: str
    """The gold answer as text."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the task's verifier reads (JSON values), e.g. `nums` and `target`."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class GroupId:
    """Identity of a group. Redelivery, re-sampling and resume never change it."""

    purpose: Purpose
    epoch: int
    """Pass over the data set; for `eval`, the policy version that is evaluated."""
    index: int
    """Position in the epoch's shuffled order; for `eval`, position in the held-out set."""

    def __str__(self) -> str:
        return f"{self.purpose}/{self.epoch}/{self.index}"

    @staticmethod
    def parse(text: str) -> GroupId:
        """The inverse of `str`. Raises ValueError when `text` is no group id."""
        purpose, epoch, index = text.split("/")
        if purpose not in ("train", "eval"):
            raise ValueError(f"{text!r} is no group id: it must look like train/0/17")
        return GroupId(purpose=purpose, epoch=int(epoch), index=int(index))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """What a RolloutWorker needs to sample one group; travels through the prompt queue."""

    id: GroupId
    prompt: Prompt
    issued_version: int
    """Policy version at issue: no token may be sampled on older weights."""
    responses: int
    """How many responses make the group."""
    temperature: float
    max_tokens: int
    """Most tokens a response may have (M for training)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tokens from `start` on were sampled under policy `version`, up to the next span."""

    start: int
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What the policy wrote for a prompt. Written by the RolloutWorker."""

    tokens: NDArray[np.int32]
    """int32[L], the stop token included."""
    logprobs: NDArray[np.float32]
    """float32[L], natural log, of the distribution that was sampled from (temperature applied)."""
    mask: NDArray[np.bool_]
    """bool[L]: written by the policy. All True in single-turn."""
    spans: tuple[Span, ...]
    """Which version sampled which tokens, in order."""
    finish: Finish
    text: str
    """Decoded tokens without special ones; hostile, never put unescaped anywhere."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _freeze(self.tokens, np.int32))
        object.__setattr__(self, "logprobs", _freeze(self.logprobs, np.float32))
        object.__setattr__(self, "mask", _freeze(self.mask, np.bool_))
        if not len(self.tokens) == len(self.logprobs) == len(self.mask):
            raise ValueError(
                f"a response has {len(self.tokens)} tokens, {len(self.logprobs)} logprobs and "
                f"{len(self.mask)} mask entries: they must be equally many"
            )

    @property
    def length(self) -> int:
        """L: number of policy-written tokens."""
        return int(self.mask.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt and its responses. An empty `responses` means the prompt was too long to sample."""

    id: GroupId
    prompt: Prompt
    issued_version: int
    prompt_tokens: NDArray[np.int32]
    """int32[P]: chat template, system prompt and prefill included."""
    responses: tuple[Response, ...]
    worker: str
    """Name of the RolloutWorker that sampled it."""
    seconds: float
    """From the first token asked for to the last one written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_tokens", _freeze(self.prompt_tokens, np.int32))

    @property
    def oldest_version(self) -> int:
        """Oldest policy version any token was sampled under; the issued one when there is no token."""
        versions = [span.version for response in self.responses for span in response.spans]
        return min(versions, default=self.issued_version)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Result of verifying one response."""

    reward: float
    """The number that enters the advantage."""
    correct: bool
    parsed: str | None
    """What was understood as the answer, None when nothing was."""
    reason: str
    """Why, in a few words: `equal`, `different`, `no answer`, `overlong`, `timeout`, `crash`, …"""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """A group with one verdict a response."""

    group: Group
    verdicts: tuple[Verdict, ...]

    def __post_init__(self) -> None:
        if len(self.verdicts) != len(self.group.responses):
            raise ValueError(
                f"group {self.group.id} has {len(self.group.responses)} responses but {len(self.verdicts)} verdicts"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The groups of one sampling call: they train policy `version` into `version + 1`.

    Advantages and coefficients are made by the learner, once for the whole batch.
    """

    version: int
    groups: tuple[ScoredGroup, ...]
    """In the order of the journal's batch record."""
    advantages: NDArray[np.float32]
    """float32[B], B = responses of all groups in order."""
    coefficients: NDArray[np.float64]
    """float64[B], token coefficient c_i; 0 for a response without policy-written tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "advantages", _freeze(self.advantages, np.float32))
        object.__setattr__(self, "coefficients", _freeze(self.coefficients, np.float64))
        responses = sum(len(scored.verdicts) for scored in self.groups)
        if not len(self.advantages) == len(self.coefficients) == responses:
            raise ValueError(
                f"batch {self.version} has {responses} responses, {len(self.advantages)} advantages "
                f"and {len(self.coefficients)} coefficients"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorBytes(Generic[Ref]):
    """One published tensor: raw bytes and how to read them (numpy has no bfloat16)."""

    data: Ref
    dtype: str
    """torch name without prefix, e.g. `float32`, `bfloat16`."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyVersion(Generic[Ref]):
    """Published weights of one version; generic, so that this file knows no Ray."""

    version: int
    shards: tuple[Ref, ...]
    """One a learner rank, each a mapping of parameter name to `TensorBytes`."""
    digest: str
    """Of all shards, to recognise equal weights."""
    published_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease(Generic[T]):
    """Temporary ownership of a queue entry, ended by an ack or by its deadline."""

    key: GroupId
    item: T
    token: str
    deadline: float
    """On the queue's clock, seconds."""
    deliveries: int
    """How often this entry was leased, this time included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """A group's fate and its record; fate None: admitted, waiting for its batch."""

    group: GroupId
    fate: Fate | None
    step: int | None
    """Policy version it was trained on, when consumed."""
    reason: str
    duplicate: bool = False
    """The group was known already; the first outcome is given again."""
