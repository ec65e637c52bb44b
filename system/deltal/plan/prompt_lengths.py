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


def chat_notes(settings: RunConfig, prompts: Sequence[Prompt]) -> list[str]:
    """What is odd about the prompts as the model will see them, a line each; nothing when no tokenizer is at hand.

    Raises DataError when all that were looked at are too long.
    """
    chat = chat_at_hand(settings, hub=False)
    if chat is None:
        return []
    notes = [counted(chat, prompts, settings.chat.max_prompt_tokens)]
    first, last = (chat.encode(prompt).tolist() for prompt in (prompts[0], prompts[-1]))
    if prompts[0].id != prompts[-1].id and first == last:
        notes.append(
            "the first prompt and the last are the same tokens: does chat.template, or data.template, leave the "
            "question out?"
        )
    if not chat.stop_token_ids:
        notes.append("the model names no token that ends a response: every response will be as long as it may be")
    return [note for note in notes if note]


def counted(chat: Chat, prompts: Sequence[Prompt], limit: int) -> str | None:
    """A line on prompts that will be skipped for their length; None when there are none.

    Raises DataError when all that were looked at are too long.
    """
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
