"""Held-out evaluation: what is outstanding and what came back. No Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltal.config import RunConfig
from deltal.results.statistics import mean_interval, pass_at
from deltal.types import Group, GroupId, Prompt, RolloutRequest, ScoredGroup


@dataclass
class Evaluation:
    """One pass over the held-out prompts: `requested -> scored`, each prompt once, whatever is delivered twice."""

    label: str
    """`before`, `after` or `during`."""
    version: int
    """Policy version when it began."""
    checkpoint: int | None
    """Version of the checkpoint that was made for it: `version`, or a few steps before; None for the start model."""
    requests: dict[GroupId, RolloutRequest] = field(default_factory=dict)
    results: dict[GroupId, ScoredGroup] = field(default_factory=dict)

    @staticmethod
    def of(label: str, version: int, prompts: Sequence[Prompt], config: RunConfig) -> Evaluation:
        """Requests for all held-out prompts at `version`."""
        settings, rollout = config.evaluation, config.rollout
        requests = {}
        for index, prompt in enumerate(prompts[: settings.prompts]):
            id = GroupId(purpose="eval", epoch=version, index=index)
            requests[id] = RolloutRequest(
                id=id,
                prompt=prompt,
                issued_version=version,
                responses=settings.responses_per_prompt,
                temperature=rollout.temperature if settings.temperature is None else settings.temperature,
                max_tokens=rollout.max_response_tokens,
            )
        every = settings.every or 1
        checkpoint = {"before": None, "after": version}.get(label, version // every * every)
        return Evaluation(label=label, version=version, checkpoint=checkpoint, requests=requests)

    def take(self, scored: ScoredGroup) -> None:
        """Keep a result of this evaluation; others and second deliveries are ignored."""
        if scored.group.id in self.requests:
            self.results.setdefault(scored.group.id, scored)

    def give_up(self, ids: Iterable[GroupId]) -> None:
        """Count prompts that end whoever reads them as wrong."""
        for id in ids:
            if id in self.requests:
                request = self.requests[id]
                group = Group(
                    id=id, prompt=request.prompt, issued_version=request.issued_version, worker="", seconds=0.0,
                    prompt_tokens=np.zeros(0, dtype=np.int32), responses=(),
                )  # fmt: skip
                self.take(ScoredGroup(group=group, verdicts=()))

    def missing(self, present: set[GroupId]) -> list[RolloutRequest]:
        """Requests without a result that are in no queue and no lease."""
        return [r for id, r in self.requests.items() if id not in self.results and id not in present]

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has its result."""
        return len(self.results) == len(self.requests)

    def row(self) -> dict[str, Any]:
        """The result for evaluations.jsonl: accuracy (avg@n) in [0, 1] with its interval, and each prompt's own; pass@k
        by k = 1, 2, 4 … n, with intervals.

        A prompt longer than the limit has no response and counts as wrong.
        """
        ordered = [self.results[id] for id in sorted(self.results)]
        correct = [float(np.mean([v.correct for v in s.verdicts])) if s.verdicts else 0.0 for s in ordered]
        spans = [span for s in ordered for r in s.group.responses for span in r.spans]
        lengths = [response.length for s in ordered for response in s.group.responses]
        return {
            "label": self.label,
            "version": self.version,
            "checkpoint": self.checkpoint,
            "prompts": len(ordered),
            "accuracy": float(np.mean(correct)) if correct else None,
            "interval_95": mean_interval(correct) if correct else None,
            "pass_at": pass_at([(len(s.verdicts), sum(v.correct for v in s.verdicts)) for s in ordered]),
            "versions": sorted({span.version for span in spans}),
            "response_length": float(np.mean(lengths)) if lengths else None,
            "too_long": sum(not s.verdicts for s in ordered),
            "correct": correct,
        }
