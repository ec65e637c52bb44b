"""What a pool and its verifying processes say to each other: JSON behind a length of four bytes, big-endian.

    pool -> process   {task, answer, fields, text, token}; text null: only whether the prompt can be judged
    process -> pool   {ready} once · {begin, token} when the task's libraries are in · then one of
                      {reward, correct, parsed, reason, seconds, token} and {error, token} (the data set's fault)

The token is new for every item: an answer without it was not written by our code.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from deltal.types import Prompt, Verdict

FRAME_BYTES = 1 << 20
"""Longest message of a verifying process: more is no verdict of ours."""


class FrameReader:
    """Whole messages out of the pieces a pipe gives."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """Messages that are whole now. Raises ValueError for what is no message."""
        self._buffer += received
        whole: list[dict[str, Any]] = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > FRAME_BYTES:
                raise ValueError(f"a message of {size} bytes")
            if len(self._buffer) < 4 + size:
                break
            message = json.loads(self._buffer[4 : 4 + size])
            if not isinstance(message, dict):
                raise ValueError("no JSON object")
            whole.append(message)
            self._buffer = self._buffer[4 + size :]
        return whole


class Call:
    """The items of one `verify_many`: which wait, which have their verdict."""

    def __init__(self, items: Sequence[tuple[Prompt, str | None]]) -> None:
        self.items = items
        self.verdicts: list[Verdict | None] = [None] * len(items)
        self.waiting = deque(range(len(items)))
        self.tries = [0] * len(items)
        self.unfinished = len(items)

    def request(self, item: int) -> dict[str, Any]:
        """What a process needs to judge one item."""
        prompt, text = self.items[item]
        return {"task": prompt.task, "answer": prompt.answer, "fields": request_fields(prompt), "text": text}

    def finish(self, item: int, verdict: Verdict) -> None:
        """The item's verdict; its place is the item's."""
        self.verdicts[item] = verdict
        self.unfinished -= 1


def request_fields(prompt: Prompt) -> dict[str, Any]:
    """The prompt's fields, and as `prompt` the question itself where no field says otherwise."""
    asked = [message.content for message in prompt.messages if message.role == "user"]
    return {"prompt": asked[-1] if asked else "", **prompt.fields}


def verdict_of(message: Mapping[str, Any]) -> Verdict:
    """The verdict in a message. Raises KeyError, TypeError or ValueError when it holds none."""
    return Verdict(
        reward=float(message["reward"]),
        correct=bool(message["correct"]),
        parsed=message["parsed"],
        reason=str(message["reason"]),
        seconds=float(message["seconds"]),
    )


def to_frame(message: Mapping[str, Any]) -> bytes:
    """`message` with its length; lone surrogates of a decoded response survive as JSON escapes."""
    encoded = json.dumps(message, default=str).encode()
    return len(encoded).to_bytes(4, "big") + encoded


def read_frame(descriptor: int) -> dict[str, Any] | None:
    """Wait for one message on a pipe; None when the other end is closed."""
    head = _read(descriptor, 4)
    body = _read(descriptor, int.from_bytes(head, "big")) if head else None
    return dict(json.loads(body)) if body else None


def write_frame(descriptor: int, message: Mapping[str, Any]) -> None:
    """Write one message whole."""
    left = memoryview(to_frame(message))
    while left:
        left = left[os.write(descriptor, left) :]


def _read(descriptor: int, count: int) -> bytes | None:
    pieces: list[bytes] = []
    while count:
        piece = os.read(descriptor, min(count, 1 << 16))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
