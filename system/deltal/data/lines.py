"""Numbered lines of a text file: unpacked, in UTF-8, without byte-order marks. What is no text is said, not guessed."""

from __future__ import annotations

import codecs
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

from deltal.errors import DataError, one_line

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a packed file to what fsspec calls the packing."""
WIDE = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
"""Byte-order marks in which a line end is more than one byte; the longer ones come first."""
NO_TEXT = {b"PAR1": "Parquet: data.kind=parquet reads it", b"PK\x03\x04": "a zip archive: unpack it first"}


def numbered_lines(place: str) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line of a path or fsspec URL, however the file is packed.

    The packing is seen by the first bytes, whatever the file is called. Raises DataError for a file that cannot be
    read or unpacked, and for one that is no text.
    """
    import fsspec

    try:
        with fsspec.open(place, "rb") as file:
            yield from enumerate(_lines(file, place), start=1)
    except (OSError, ImportError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{place} cannot be read: {one_line(error)}") from error


def _lines(file: Any, place: str) -> Iterator[bytes]:
    head = _head(file)
    packing = next((name for magic, name in PACKED.items() if head.startswith(magic)), None)
    if packing is not None:
        file = _unpacked(file, packing, place)
        head = _head(file)
    for magic, told in NO_TEXT.items():
        if head.startswith(magic):
            raise DataError(f"{place} is {told}")
    encoding = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    if encoding is None:
        yield from file
    else:
        yield from (line.encode() for line in io.StringIO(file.read().decode(encoding), newline="\n"))


def _head(file: Any) -> bytes:
    """The first bytes; the file is at its beginning again."""
    head = bytes(file.read(8))
    file.seek(0)
    return head


def _unpacked(file: Any, packing: str, place: str) -> Any:
    from fsspec.compression import compr

    if packing not in compr:
        raise DataError(
            f"{place} is packed with {packing}, which this Python cannot read: unpack it, or `pip install zstandard`"
        )
    return compr[packing](file, mode="rb")
