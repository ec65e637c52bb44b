"""What the length limit M does to a reward. The verdict's `correct` stays as it was judged.

`wrong`: a response cut at M is not judged, its reward is 0. `soft`: DAPO's soft punishment. `verify`, `filter`: nothing
here; `filter` takes effect in the learner's batch. All is done before the ReplayBuffer sees a group, so that its
filter of equal rewards looks at final ones.
"""

from __future__ import annotations

import dataclasses

from deltal.config import VerifyConfig
from deltal.types import Response, Verdict


def unjudged(response: Response, settings: VerifyConfig) -> Verdict | None:
    """The verdict of a response that need not be judged, else None."""
    if response.finish == "length" and settings.overlong == "wrong":
        return Verdict(reward=0.0, correct=False, parsed=None, reason="overlong", seconds=0.0)
    return None


def punished(verdict: Verdict, response: Response, settings: VerifyConfig, *, limit: int) -> Verdict:
    """The verdict with the soft punishment in its reward, where the settings ask for it; `limit` is M."""
    if settings.overlong != "soft":
        return verdict
    loss = soft_punishment(response, limit=limit, cache=settings.overlong_cache_tokens)
    return dataclasses.replace(verdict, reward=verdict.reward + loss)


def soft_punishment(response: Response, *, limit: int, cache: int) -> float:
    """DAPO (arXiv 2503.14476, equation 13): 0 up to limit - cache tokens, then linear down to -1 at the limit.

    A response that was cut gets -1.
    """
    if response.finish == "length":
        return -1.0
    return -min(max(response.length - (limit - cache), 0) / cache, 1.0)
