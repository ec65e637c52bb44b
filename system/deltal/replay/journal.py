"""The journal: immutable segment files, each written whole, under one folder (path or fsspec URL).

A segment `<incarnation>-<number>.journal` holds one flush. There is no append, hence no torn tail: locally a
temporary file is linked to its name (which fails when the name exists), elsewhere it is one PUT. A writer whose
incarnation is not the newest stops: a second writer is seen, not merged.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import numpy as np

from deltal.errors import JournalError, not_written
from deltal.replay.ledger import Admitted, Opened, Record, Trained
from deltal.types import GroupId, ScoredGroup

MAGIC = b"deltal-journal-1\n"
NAME = re.compile(r"^(\d{6})-(\d{8})\.journal$")


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"the journal cannot hold a {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
    return np.frombuffer(value[1], dtype=value[0])


_decoder = msgspec.msgpack.Decoder(list[Record], dec_hook=_decode_array)


def encode(records: Iterable[Record]) -> bytes:
    """A segment's bytes: magic, crc32 of the rest, msgpack of the records."""
    body = msgspec.msgpack.encode(list(records), enc_hook=_encode_array)
    return MAGIC + zlib.crc32(body).to_bytes(4, "big") + body


def decode(data: bytes, where: str) -> list[Record]:
    """The records of a segment. Raises JournalError that names `where` when the bytes are damaged."""
    head, body = data[: len(MAGIC) + 4], data[len(MAGIC) + 4 :]
    if head[: len(MAGIC)] != MAGIC or int.from_bytes(head[len(MAGIC) :], "big") != zlib.crc32(body):
        raise JournalError(f"{where} is damaged (checksum); restore it from a copy of the run folder")
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise JournalError(f"{where} cannot be read: {error}") from error


class Journal:
    """Reads all segments of a folder; writes new ones after `open_writer`.

    Args:
        folder: path or fsspec URL of the journal folder; a missing one is an empty journal.
    """

    def __init__(self, folder: str) -> None:
        self._fs, self._folder = fsspec.core.url_to_fs(folder)
        self._is_local = "file" in np.atleast_1d(self._fs.protocol)
        self._where: dict[GroupId, str] = {}
        self._incarnation = 0
        self._number = 0

    def segments(self) -> list[str]:
        """Names of all segments in the order they were written."""
        self._fs.invalidate_cache(self._folder)
        if not self._fs.exists(self._folder):
            return []
        names = (path.rsplit("/", 1)[-1] for path in self._fs.ls(self._folder, detail=False))
        return sorted(name for name in names if NAME.match(name))

    def read(self) -> Iterator[Record]:
        """All records in order. Raises JournalError on a damaged or missing segment."""
        last: tuple[int, int] | None = None
        for name in self.segments():
            incarnation, number = (int(part) for part in NAME.match(name).groups())  # type: ignore[union-attr]
            if last and (incarnation, number) not in ((last[0], last[1] + 1), (last[0] + 1, 0)):
                lost = (last[0], last[1] + 1) if incarnation == last[0] else (last[0] + 1, 0)
                raise JournalError(f"{self._folder}: segment {lost[1]} of incarnation {lost[0]} is missing")
            last = (incarnation, number)
            yield from self._load(name)

    def policy_version(self) -> int:
        """Batches trained, by the newest record that tells of one; only segments behind it are read."""
        for name in reversed(self.segments()):
            for record in reversed(self._load(name)):
                if isinstance(record, Trained):
                    return record.version + 1
        return 0

    def open_writer(self, at: float) -> Opened:
        """Begin a new incarnation, above all that exist. Returns its first record, already on disk.

        Raises FolderError when the disk does not take it.
        """
        try:
            self._fs.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            raise not_written(self._folder, error) from error
        names = self.segments()
        self._incarnation = 1 + (int(names[-1].split("-")[0]) if names else 0)
        self._number = 0
        opened = Opened(self._incarnation, at)
        self.write([opened])
        return opened

    def write(self, records: list[Record]) -> int:
        """One new segment; on disk when this returns. Returns its size in bytes. Raises JournalError when
        another writer has begun, FolderError when the disk does not take it.
        """
        successor = f"{self._folder}/{self._incarnation + 1:06d}-{0:08d}.journal"
        if self._fs.exists(successor):
            raise JournalError(f"{self._folder}: a newer ReplayBuffer writes this journal; this one stops")
        name = f"{self._incarnation:06d}-{self._number:08d}.journal"
        data = encode(records)
        try:
            self._create(f"{self._folder}/{name}", data)
        except OSError as error:
            raise not_written(f"{self._folder}/{name}", error) from error
        self._number += 1
        self._remember(name, records)
        return len(data)

    def find(self, ids: Iterable[GroupId]) -> list[ScoredGroup]:
        """The scored groups of `ids`, in that order, read back from their segments."""
        wanted = list(ids)
        found: dict[GroupId, ScoredGroup] = {}
        for name in sorted({self._where[id] for id in wanted if id in self._where}):
            for record in self._load(name):
                if isinstance(record, Admitted):
                    found[record.scored.group.id] = record.scored
        missing = [str(id) for id in wanted if id not in found]
        if missing:
            raise JournalError(f"{self._folder}: no segment holds group {', '.join(missing[:3])}")
        return [found[id] for id in wanted]

    def _load(self, name: str) -> list[Record]:
        records = decode(self._fs.cat_file(f"{self._folder}/{name}"), f"{self._folder}/{name}")
        self._remember(name, records)
        return records

    def _remember(self, name: str, records: list[Record]) -> None:
        for record in records:
            if isinstance(record, Admitted):
                self._where[record.scored.group.id] = name

    def _create(self, path: str, data: bytes) -> None:
        if not self._is_local:
            if self._fs.exists(path):
                raise JournalError(f"{path} exists already: a second ReplayBuffer writes this journal")
            self._fs.pipe_file(path, data)
            return
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                # fsync before the ack: an acked group that is not on disk would be lost by a power cut.
                os.fsync(file.fileno())
            os.link(temporary, path)
        except FileExistsError:
            raise JournalError(f"{path} exists already: a second ReplayBuffer writes this journal") from None
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # The name, too, must survive a power cut.
        finally:
            os.close(folder)
