"""How many prompts are longer than `chat.max_prompt_tokens`, as far as the tokenizer is at hand before the start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltal.config import RunConfig
from deltal.data.chat import Chat
from deltal.errors import DataError
from deltal.plan.model_inputs import chat_at_hand
from deltal.types import Prompt

SAMPLE = 256
"""Prompts looked at, evenly spread over the data set: the same ones every time."""


def length_note(settings: RunConfig, prompts: Sequence[Prompt]) -> str | None:
    """A line on prompts that will be skipped for their length; None when there are none, or no tokenizer to tell.

    Raises DataError when all that were looked at are too long.
    """
    chat = chat_at_hand(settings, hub=False)
    return None if chat is None else counted(chat, prompts, settings.chat.max_prompt_tokens)


def counted(chat: Chat, prompts: Sequence[Prompt], limit: int) -> str | None:
    """The same, with a tokenizer."""
    places = sorted({int(place) for place in np.linspace(0, len(prompts) - 1, min(SAMPLE, len(prompts)))})
    lengths = [len(chat.encode(prompts[place])) for place in places]
    too_long = sum(length > limit for length in lengths)
    if too_long == len(lengths):
        raise DataError(
            f"all prompts of data are longer than chat.max_prompt_tokens = {limit}: the shortest of {len(lengths)} "
            f"looked at has {min(lengths)} tokens; raise it, or shorten them"
        )
    if not too_long:
        return None
    return (
        f"{too_long} of {len(lengths)} prompts looked at are longer than chat.max_prompt_tokens = {limit} and will be "
        f"skipped; the longest has {max(lengths)} tokens"
    )
