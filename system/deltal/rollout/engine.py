"""What a RolloutWorker asks of an engine, and what it gets back. No engine's own names appear here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltal.types import Finish, Span, TensorBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one response is drawn. top-p, top-k and penalties are missing on purpose: they would bias the ratio."""

    temperature: float
    max_tokens: int
    seed: int | None
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A finished response: tokens int32[L], logprobs float32[L] of the distribution sampled from."""

    key: str
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    spans: tuple[Span, ...]
    finish: Finish


Shard = Mapping[str, TensorBytes[NDArray[np.uint8]]]


class Engine(Protocol):
    """An in-process inference engine; one thread calls all of it."""

    @property
    def version(self) -> int | None:
        """Policy version of the loaded weights; None before the first load."""

    @property
    def running(self) -> int:
        """Responses being sampled or waiting."""

    @property
    def waiting(self) -> int:
        """Of `running`, those that wait for a place in the engine's batch."""

    def add(self, key: str, prompt_tokens: NDArray[np.int32], sampling: Sampling) -> None:
        """Ask for one response."""

    def step(self) -> list[Sampled]:
        """One engine step; the responses that finished in it."""

    def abort(self, keys: Sequence[str]) -> None:
        """Forget responses; nothing is returned for them."""

    def load(self, version: int, shards: Sequence[Shard]) -> None:
        """Swap in weights between steps; running requests go on, their next token is of the new version."""

    def token_counts(self) -> dict[str, Any]:
        """`written`: tokens sampled so far."""
