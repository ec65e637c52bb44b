"""Rows held out of training: which question belongs to evaluation, by a hash of what it asks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from deltal.errors import DataError
from deltal.types import Prompt


def question(prompt: Prompt) -> str:
    """What a prompt asks, whatever its id and spacing: two prompts with the same question are one to a model."""
    return "\n".join(f"{message.role}: {' '.join(message.content.split())}" for message in prompt.messages)


def split_off(prompts: Sequence[Prompt], rows: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held out): `rows` different questions held out, in the order of their hashes; all else for training.

    The questions with the least hashes are held out, so that more rows in the file change few of them. A question that
    stands in the data twice is held out once and trained never. Raises DataError when too few are left for training.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(question(prompt), prompt)
    if len(first) <= rows:
        raise DataError(
            f"evaluation.data holds {rows} questions out of training, but data has only {len(first)} different ones: "
            f"lower evaluation.data.rows, for example to {max(1, len(first) // 10)}, or name other evaluation data"
        )
    held = sorted(first, key=lambda text: hashlib.sha256(text.encode()).digest())[:rows]
    apart = set(held)
    return [prompt for prompt in prompts if question(prompt) not in apart], [first[text] for text in held]
