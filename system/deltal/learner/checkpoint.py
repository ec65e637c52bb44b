"""Checkpoints of learner state only: weights, optimizer, schedule, version (cursor and ledger live in the journal).

A checkpoint is a folder `checkpoints/<version>`; its file `complete.json`, written last, makes it count. Written by
torch DCP, so another number of ranks can load it.
"""

from __future__ import annotations

import json
import time
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from deltal.errors import LearnerError, one_line

# torch's own is no Exception but a BaseException.
UNREADABLE = (Exception, CheckpointException)


class Checkpoints:
    """All checkpoints of a run.

    Args:
        folder: path or fsspec URL of the run's `checkpoints` folder.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str, *, keep: int) -> None:
        self._fs, self._path = fsspec.core.url_to_fs(folder)
        self._folder, self._keep = folder.rstrip("/"), keep
        self._is_local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    def versions(self) -> list[int]:
        """Versions with a complete checkpoint, ascending."""
        if not self._fs.exists(self._path):
            return []
        self._fs.invalidate_cache(self._path)
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._path, detail=False)]
        complete = [n for n in names if n.isdigit() and self._fs.exists(f"{self._path}/{n}/complete.json")]
        return sorted(int(name) for name in complete)

    def save(
        self, version: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]
    ) -> None:
        """Write the state after `version` batches; all ranks call it. Older ones than `keep` go afterwards.

        Raises LearnerError in one line when it cannot be written; nothing that was complete is lost then.
        """
        where = f"{self._path}/{version:08d}"
        if dist.get_rank() == 0 and self._fs.exists(where):
            self._fs.rm(where, recursive=True)
        dist.barrier()
        weights, moments = get_state_dict(model, optimizer)
        try:
            dcp_save({"model": weights, "optimizer": moments}, storage_writer=self._storage(version, writing=True))
        except UNREADABLE as error:
            raise LearnerError(f"checkpoint {where} could not be written: {one_line(error, line=-1)}") from error
        if dist.get_rank() == 0:
            complete = {"version": version, "ranks": dist.get_world_size(), "at": time.time(), **extra}
            self._fs.pipe_file(f"{where}/complete.json", json.dumps(complete).encode())
            # Newer ones than this were passed over as damaged: they must not push out what can be read.
            for old in [known for known in self.versions() if known <= version][: -self._keep]:
                self._fs.rm(f"{self._path}/{old:08d}", recursive=True)
        dist.barrier()

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        """Load the newest complete checkpoint; returns its version and extras, (0, {}) when there is none.

        One that cannot be read is named, and the one before is taken. Raises LearnerError when there are some and none
        can be read.
        """
        versions = self.versions()
        for version in reversed(versions):
            where = f"{self._path}/{version:08d}"
            weights, moments = get_state_dict(model, optimizer)
            try:
                extra: dict[str, Any] = json.loads(self._fs.cat_file(f"{where}/complete.json"))
                dcp_load({"model": weights, "optimizer": moments}, storage_reader=self._storage(version, writing=False))
            except UNREADABLE as error:
                # Any reader error means the same here: this checkpoint is of no use, an older one may be.
                print(f"deltal: checkpoint {where} is damaged and passed over: {one_line(error, line=-1)}")  # noqa: T201
                continue
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            return version, extra
        if versions:
            # Reading writes into the model's own weights, so they may be neither the start model's nor a checkpoint's.
            raise LearnerError(f"no checkpoint in {self._path} can be read; move it away to train from the start again")
        return 0, {}

    def load_weights(self, version: int, model: torch.nn.Module) -> None:
        """Load only the weights of one checkpoint into an unsharded model, without a process group.

        Raises LearnerError when it cannot be read.
        """
        state = {"model": model.state_dict()}
        try:
            dcp_load(state, storage_reader=self._storage(version, writing=False))
        except UNREADABLE as error:
            raise LearnerError(
                f"checkpoint {self._path}/{version:08d} is damaged: {one_line(error, line=-1)}"
            ) from error
        model.load_state_dict(state["model"])

    def _storage(self, version: int, *, writing: bool) -> Any:
        if self._is_local:
            path = f"{self._path}/{version:08d}"
            return FileSystemWriter(path) if writing else FileSystemReader(path)
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

        url = f"{self._folder}/{version:08d}"
        return FsspecWriter(url) if writing else FsspecReader(url)
