"""From a sampled group to its verdicts: the one way, in a run's Verifiers and offline."""

from __future__ import annotations

from deltal.config import VerifyConfig
from deltal.types import Group, Verdict
from deltal.verify.sandbox.pool import SandboxPool
from deltal.verify.tasks.overlong import punished, unjudged


def judge(pool: SandboxPool, group: Group, settings: VerifyConfig, *, limit: int) -> list[Verdict]:
    """One verdict a response; what is overlong is dealt with as the settings say. `limit` is M, in tokens."""
    judged = [unjudged(response, settings) for response in group.responses]
    open = [i for i, verdict in enumerate(judged) if verdict is None]
    found = pool.verify_many([(group.prompt, group.responses[i].text) for i in open])
    for i, verdict in zip(open, found, strict=True):
        judged[i] = verdict
    return [
        punished(verdict, response, settings, limit=limit)
        for verdict, response in zip(judged, group.responses, strict=True)
        if verdict is not None
    ]
