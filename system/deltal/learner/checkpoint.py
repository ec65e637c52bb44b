"""Checkpoints of learner state only: weights, optimizer, version, RNG, α (cursor and ledger live in the journal).

A checkpoint's life: `copied -> written -> complete -> pruned`. Training waits only for the copy; a thread writes it, by
torch DCP, so another number of ranks can load it. A folder `checkpoints/<version>` counts once its `complete.json`,
written last, holds the size and checksum of every other file in it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from deltal.errors import FULL, DeadlineError, DeltalError, LearnerError, not_written, one_line
from deltal.learner import rng
from deltal.learner.checksum import Sums, problem_of, sum_of, summed

# torch's own is no Exception but a BaseException.
UNREADABLE = (Exception, CheckpointException)
CUT_SHORT = "unexpected pos"
WRITE_SECONDS = 1800.0
"""Longest a checkpoint may take to be written."""


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
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future[dict[str, Any]]] | None = None
        self._group: Any = None
        self.passed_over: list[str] = []
        """A line for each checkpoint that `load` found damaged."""

    def versions(self) -> list[int]:
        """Versions with a complete checkpoint, ascending."""
        return sorted(int(n) for n in self._names() if self._fs.exists(f"{self._path}/{n}/complete.json"))

    # --- writing ----------------------------------------------------------------------------------

    def save(
        self, version: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any], *,
        keep: Collection[int] = (),
    ) -> None:  # fmt: skip
        """Copy the state after `version` batches, and write the copy in the background; all ranks call it.

        `extra` (JSON values) comes back with `load`. Afterwards older ones than the newest go, but for those in `keep`.
        Raises as `finished` when the one before, for which it waits, could not be written.
        """
        self.wait()
        if self._group is None:
            # The thread's own: its collectives may run at any time between the training's.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=WRITE_SECONDS))
        is_new = not optimizer.state
        weights, moments = _state(model, optimizer)
        if is_new:
            optimizer.state.clear()  # torch made an empty one to have something to save.
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        state = stager.stage({"model": weights, "optimizer": moments})
        stager.close()
        mark = {"version": version, "ranks": dist.get_world_size(), "optimizer_is_new": is_new, **extra}
        work = self._thread.submit(self._write, version, state, rng.state(), mark, frozenset(keep))
        self._writing = (version, work)

    def finished(self) -> dict[str, Any] | None:
        """`version`, `seconds` and `bytes` (of all ranks) of a write that ended since it was last asked for, or None.

        Raises FolderError or LearnerError when it could not be written; nothing that was complete is lost then.
        """
        if self._writing is None or not self._writing[1].done():
            return None
        work, self._writing = self._writing[1], None
        return work.result()

    def wait(self) -> dict[str, Any] | None:
        """Until the write under way has ended; then as `finished`. Raises DeadlineError when it does not end."""
        if self._writing is not None:
            version, work = self._writing
            try:
                work.exception(WRITE_SECONDS)
            except TimeoutError:
                raise DeadlineError(f"checkpoint {version} was not written within {WRITE_SECONDS:.0f} s") from None
        return self.finished()

    def _write(
        self, version: int, state: Any, random: rng.State, mark: dict[str, Any], keep: frozenset[int]
    ) -> dict[str, Any]:
        """All ranks' threads together. When one fails, all raise FolderError for a full disk, else LearnerError."""
        where, started = f"{self._path}/{version:08d}", time.monotonic()
        sums: Sums = {}
        told: list[Any] = [None] * dist.get_world_size()
        try:
            self._on_first_rank(lambda: self._remove(version))
            writer = summed(self._storage(version, writing=True), sums)
            dcp_save(state, storage_writer=writer, process_group=self._group)
            dist.all_gather_object(told, (sums, random), group=self._group)
            self._on_first_rank(lambda: self._complete(where, mark, told))
        except UNREADABLE as error:
            if dist.get_rank() == 0:
                # A full disk needs the space.
                with contextlib.suppress(Exception):
                    self._remove(version)
            raise _not_written(where, one_line(error, line=0)) from error
        with contextlib.suppress(Exception):  # The next one prunes again.
            if dist.get_rank() == 0:
                self._prune(version, keep)
        size = sum(entry["bytes"] for files, _ in told for entry in files.values())
        return {"version": version, "seconds": time.monotonic() - started, "bytes": size}

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0 while the others wait; its failure is everyone's."""
        outcome: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except UNREADABLE as error:
                outcome = [one_line(error, line=0)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise LearnerError(outcome[0])

    def _complete(self, where: str, mark: dict[str, Any], told: list[tuple[Sums, rng.State]]) -> None:
        """The random state of all ranks, and the mark that makes the checkpoint count."""
        box = io.BytesIO()
        torch.save([random for _, random in told], box)
        self._fs.pipe_file(f"{where}/random.pt", box.getvalue())
        files = {name: entry for sums, _ in told for name, entry in sums.items()}
        files["random.pt"] = sum_of(box.getvalue())
        text = json.dumps({**mark, "at": time.time(), "files": files})
        self._fs.pipe_file(f"{where}/complete.json", text.encode())

    def _prune(self, version: int, keep: frozenset[int]) -> None:
        # Newer ones than this were passed over as damaged: they must not push out what can be read.
        older = [known for known in self.versions() if known <= version]
        for old in {int(name) for name in self._names() if int(name) < version}:
            # What is not complete was cut off by a crash.
            if old not in older[-self._keep :] and old not in keep:
                self._remove(old)

    def _remove(self, version: int) -> None:
        where = f"{self._path}/{version:08d}"
        if self._fs.exists(where):
            # The mark first, so that half a checkpoint never counts.
            if self._fs.exists(f"{where}/complete.json"):
                self._fs.rm_file(f"{where}/complete.json")
            self._fs.rm(where, recursive=True)

    # --- reading ----------------------------------------------------------------------------------

    def load(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, at_most: int | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Load the newest complete checkpoint (of `at_most` batches); returns its version and extras, (0, {}) when
        there is none. All ranks call it.

        One that cannot be read is named, and the one before is taken. Raises LearnerError when there are some and none
        can be read.
        """
        box = [[version for version in self.versions() if at_most is None or version <= at_most]]
        dist.broadcast_object_list(box, src=0)
        for version in reversed(box[0]):
            try:
                mark = self._checked(version)
                weights, moments = _state(model, optimizer)
                dcp_load({"model": weights, "optimizer": moments}, storage_reader=self._storage(version, writing=False))
            except UNREADABLE as error:
                # Any reader error means the same here: this checkpoint is of no use, an older one may be.
                where = f"{self._path}/{version:08d}"
                self.passed_over.append(f"checkpoint {where} is damaged and passed over: {one_line(error, line=0)}")
                print(f"deltal: {self.passed_over[-1]}", file=sys.stderr)  # noqa: T201
                continue
            set_state_dict(
                model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=_options(model)
            )
            if mark["optimizer_is_new"]:
                optimizer.state.clear()
            self._restore_random(version, mark["ranks"])
            return version, mark
        if box[0]:
            # Reading writes into the model's own weights, so they may be neither the start model's nor a checkpoint's.
            raise LearnerError(f"no checkpoint in {self._path} can be read; move it away to train from the start again")
        return 0, {}

    def load_weights(self, version: int, model: torch.nn.Module) -> None:
        """Load only the weights of one checkpoint into an unsharded model, without a process group.

        Raises LearnerError when it cannot be read.
        """
        state = {"model": _state(model, ())[0]}
        try:
            self._checked(version)
            dcp_load(state, storage_reader=self._storage(version, writing=False))
        except UNREADABLE as error:
            raise LearnerError(
                f"checkpoint {self._path}/{version:08d} is damaged: {one_line(error, line=0)}"
            ) from error
        set_model_state_dict(model, state["model"], options=_options(model))

    def _checked(self, version: int) -> dict[str, Any]:
        """The mark of a checkpoint whose files are what was written. Raises LearnerError on all ranks alike when they
        are not; each reads its share of the files.
        """
        where = f"{self._path}/{version:08d}"
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mark: dict[str, Any] = {}
        try:
            mark = json.loads(self._fs.cat_file(f"{where}/complete.json"))
            found = (problem_of(self._fs, f"{where}/{name}", mark["files"][name])
                     for name in sorted(mark["files"])[rank::ranks])  # fmt: skip
            problem = next(filter(None, found), None)
        except UNREADABLE as error:
            problem = f"complete.json cannot be read ({one_line(error)})"
        problems = [problem]
        if ranks > 1:
            problems = [None] * ranks
            dist.all_gather_object(problems, problem)
        for problem in filter(None, problems):
            raise LearnerError(problem)
        return mark

    def _restore_random(self, version: int, ranks: int) -> None:
        """This rank's generators; with another number of ranks than saved they stay as they were seeded."""
        if ranks == dist.get_world_size():
            data = self._fs.cat_file(f"{self._path}/{version:08d}/random.pt")
            rng.restore(torch.load(io.BytesIO(data), weights_only=True)[dist.get_rank()])

    def _names(self) -> list[str]:
        """Folders that may be checkpoints."""
        if not self._fs.exists(self._path):
            return []
        self._fs.invalidate_cache(self._path)
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._path, detail=False)]
        return [name for name in names if name.isdigit()]

    def _storage(self, version: int, *, writing: bool) -> Any:
        if self._is_local:
            path = f"{self._path}/{version:08d}"
            return FileSystemWriter(path) if writing else FileSystemReader(path)
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

        url = f"{self._folder}/{version:08d}"
        return FsspecWriter(url) if writing else FsspecReader(url)


def _not_written(where: str, why: str) -> DeltalError:
    """A full disk is the user's to free; what else there is may be anybody's."""
    for code in FULL:
        # torch wraps what each rank met into a text, in words of its own where a write was cut short.
        if os.strerror(code) in why or (code == errno.ENOSPC and CUT_SHORT in why):
            return not_written(f"checkpoint {where}", OSError(code, os.strerror(code)))
    return LearnerError(f"checkpoint {where} could not be written: {why}")


def _state(
    model: torch.nn.Module, optimizers: torch.optim.Optimizer | tuple[()]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer state. Frozen weights, those under adapters, are the start model's and left out."""
    weights, moments = get_state_dict(model, optimizers, options=_options(model))
    # torch leaves a tied weight's second name in.
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in weights.items() if name not in frozen}, moments


def _options(model: torch.nn.Module) -> StateDictOptions:
    frozen = not all(parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)
