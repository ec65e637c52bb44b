"""How many prompts are longer than `chat.max_prompt_tokens`, as far as the tokenizer is at hand before the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deltal.config import ModelConfig, RunConfig
from deltal.data.chat import Chat
from deltal.errors import DataError
from deltal.types import Prompt

SAMPLE = 256
"""Prompts looked at, evenly spread over the data set: the same ones every time."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def length_note(settings: RunConfig, prompts: Sequence[Prompt]) -> str | None:
    """A line on prompts that will be skipped for their length; None when there are none, or no tokenizer to tell.

    Raises DataError when all that were looked at are too long.
    """
    folder = tokenizer_at_hand(settings.model)
    return None if folder is None else counted(Chat(folder, settings.chat), prompts, settings.chat.max_prompt_tokens)


def tokenizer_at_hand(model: ModelConfig) -> str | None:
    """The folder of a model's tokenizer where it is on this machine already; nothing is made or fetched."""
    if model.kind != "hf":
        return None
    folder = Path(model.path).expanduser()
    return str(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


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
