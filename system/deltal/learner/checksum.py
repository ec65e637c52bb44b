"""Sizes and CRC-32 of a checkpoint's files: made while they are written, compared before they are loaded."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

PIECE = 16 * 2**20
"""Bytes read at once when a file is checked."""
Sums = dict[str, dict[str, int]]
"""File name to `bytes` and `crc32`."""


class SummedStream:
    """A binary file being written; counts what goes through."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        """As of the stream; torch writes from start to end and never goes back."""
        view = memoryview(data).cast("B")
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += len(view)
        written: int = self._stream.write(data)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def summed(writer: Any, sums: Sums) -> Any:
    """`writer`, one of torch's FileSystemWriters, noting in `sums` each file that it has written."""
    create = writer.fs.create_stream

    @contextlib.contextmanager
    def create_stream(path: Any, mode: str) -> Iterator[Any]:
        with create(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            counted = SummedStream(stream)
            yield counted
        # The metadata is written under a name of its own and renamed.
        sums[PurePosixPath(str(path)).name.removesuffix(".tmp")] = {"bytes": counted.bytes, "crc32": counted.crc32}

    writer.fs.create_stream = create_stream
    return writer


def sum_of(data: bytes) -> dict[str, int]:
    """The entry of a file with these bytes."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def problem_of(fs: Any, path: str, expected: dict[str, int]) -> str | None:
    """What is wrong with a file: missing, cut, or changed; None when it is what was written. Reads all of it."""
    name = PurePosixPath(path).name
    if not fs.exists(path):
        return f"{name} is missing"
    size = fs.size(path)
    if size != expected["bytes"]:
        return f"{name} has {size} bytes of {expected['bytes']}"
    crc32 = 0
    with fs.open(path, "rb") as file:
        while piece := file.read(PIECE):
            crc32 = zlib.crc32(piece, crc32)
    return None if crc32 == expected["crc32"] else f"{name} was changed after it was written (checksum)"
