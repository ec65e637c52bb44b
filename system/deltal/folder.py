"""The run folder (path or fsspec URL): all a run needs to be resumed. Held by one living run at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import yaml

from deltal.config import RunConfig
from deltal.config.file import resolve
from deltal.errors import ConfigError, FolderError, RunInUseError, RunNotFoundError, UserError, not_written, one_line

MISSED_BEATS = 10


def runs_root(config: RunConfig | None = None) -> str:
    """Where runs live: the config's folder, else DELTAL_RUNS, else ./runs."""
    configured: str | None = config.run.folder if config else None
    return configured or os.environ.get("DELTAL_RUNS") or "runs"


class RunFolder:
    """Files of one run.

    Args:
        url: path or fsspec URL; a local path is made absolute, since actors have other working folders.
    """

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:  # no such protocol, or its package is not installed
            raise UserError(f"the run folder {url} cannot be opened: {one_line(error)}") from error
        self.is_local = "://" not in url or url.startswith("file://")
        self.url = self._path if self.is_local else url.rstrip("/")

    @staticmethod
    def find(run: str) -> RunFolder:
        """The folder of a run given by name or by path. Raises RunNotFoundError that says where it looked."""
        looked = [run] if "/" in run else [f"{runs_root()}/{run}", run]
        for url in looked:
            folder = RunFolder(url)
            if folder.exists("config.yaml"):
                return folder
        raise RunNotFoundError(f"there is no run {run}: looked for config.yaml in {' and '.join(looked)}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return str(self._path).rstrip("/").rsplit("/", 1)[-1]

    def make(self) -> None:
        """Create the folder. Raises FolderError."""
        with _writing(self.url):
            self._fs.makedirs(self._path, exist_ok=True)

    def forget(self) -> None:
        """Take back what was written for a run that never began; whatever else lies there stays."""
        if not self.is_local or self.exists("journal"):
            return
        for name in ("config.yaml", "data.json", "lock.json", "cluster.json"):
            Path(f"{self._path}/{name}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            Path(self._path).rmdir()

    def path(self, name: str) -> str:
        """Path or URL of a file in the folder."""
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file exists."""
        return bool(self._fs.exists(f"{self._path}/{name}"))

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises FileNotFoundError."""
        return bytes(self._fs.cat_file(f"{self._path}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Replace the file as a whole: a reader sees the old one or the new one. Raises FolderError."""
        target = f"{self._path}/{name}"
        with _writing(self.path(name)):
            if not self.is_local:
                self._fs.pipe_file(target, data)
                return
            temporary = Path(f"{target}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                temporary.write_bytes(data)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def read_json(self, name: str) -> Any:
        """A file's JSON object, None when it is missing. Raises UserError when it is damaged."""
        try:
            found = json.loads(self.read(name)) if self.exists(name) else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path(name)} is damaged: {one_line(error, line=0)}") from error
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{self.path(name)} is damaged: a {type(found).__name__} where a JSON object was expected")
        return found

    def write_json(self, name: str, value: Any) -> None:
        """Write indented JSON; NaN and infinity become null, which every reader knows."""
        self.write(name, json.dumps(_finite(value), indent=1).encode())

    def append_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append JSON lines; on object storage, which has no append, the file is rewritten. Raises FolderError."""
        data = "".join(json.dumps(_finite(row)) + "\n" for row in rows).encode()
        with _writing(self.path(name)):
            if self.is_local:
                path = Path(f"{self._path}/{name}")
                with path.open("ab+") as file:
                    # A line cut by a crash must not swallow the next one.
                    if file.tell() and _last_byte(path) != b"\n":
                        data = b"\n" + data
                    file.write(data)
            else:
                old = self.read(name) if self.exists(name) else b""
                self._fs.pipe_file(f"{self._path}/{name}", old + data)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All JSON lines of a file; a last line cut by a crash is left out."""
        if not self.exists(name):
            return []
        rows = []
        for line in self.read(name).splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
        return rows

    def config(self) -> RunConfig:
        """The run's resolved settings. Raises ConfigError, in one line, when they cannot be read."""
        where = f"{self.path('config.yaml')} (damaged, or written by another version of deltal)"
        try:
            values = yaml.safe_load(self.read("config.yaml"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {one_line(error, line=0)}") from error
        return resolve(values if isinstance(values, dict) else {}, where=where)

    def replace_config(self, config: RunConfig) -> None:
        """Write other settings; those before stay as config.1.yaml, config.2.yaml, …"""
        number = next(n for n in itertools.count(1) if not self.exists(f"config.{n}.yaml"))
        self.write(f"config.{number}.yaml", self.read("config.yaml"))
        self.write_config(config)

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved settings."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        self.write("config.yaml", text.encode())


class FolderLock:
    """A lease on a run folder, renewed by a thread: a killed run can be resumed, a living one not started twice.

    Args:
        folder: the run's.
        beat: seconds between heartbeats; the lease ends after ten missed ones, at once when its process is gone.
        on_loss: called when another process took the folder.
    """

    def __init__(self, folder: RunFolder, *, beat: float, on_loss: Callable[[], None] = lambda: None) -> None:
        self._folder, self._beat, self._on_loss = folder, beat, on_loss
        me = psutil.Process()
        self._holder = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": me.pid, "born": me.create_time()}
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._renew, daemon=True, name="folder-lock")

    def __enter__(self) -> FolderLock:
        """Take the folder. Raises RunInUseError that names the holder."""
        self._refuse_living(self._folder.read_json("lock.json"))
        self._write()
        # Two that saw a dead lease at once both write; the later one stands, and the other sees it here.
        time.sleep(0.1)
        held = self._folder.read_json("lock.json") or {}
        if held.get("id") != self._holder["id"]:
            self._refuse_living(held)
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        # A heartbeat under way would write the lock again after its release.
        self._beating.join(10.0)
        # On a full disk the lock stays: it ends with its process.
        with contextlib.suppress(FolderError):
            held = self._folder.read_json("lock.json") or {}
            if held.get("id") == self._holder["id"]:
                self._folder.write_json("lock.json", {})

    def _refuse_living(self, held: Any) -> None:
        if held and held.get("id") != self._holder["id"] and lock_is_alive(held, self._beat):
            raise RunInUseError(
                f"{self._folder.url} is in use by process {held.get('pid')} on {held.get('host')}; "
                "`deltal stop` it first, or choose another --run name"
            )

    def _write(self) -> None:
        self._folder.write_json("lock.json", self._holder | {"at": time.time()})

    def _renew(self) -> None:
        while not self._released.wait(self._beat):
            # A passing fault of the storage costs a beat, not the lock.
            with contextlib.suppress(Exception):
                held = self._folder.read_json("lock.json") or {}
                if held.get("id") != self._holder["id"]:
                    self._on_loss()
                    return
                self._write()


def lock_is_alive(held: dict[str, Any] | None, beat: float) -> bool:
    """Whether a lock's holder lives: its process on this host, its heartbeat from another one."""
    if not held or "pid" not in held:
        return False
    if held.get("host") == socket.gethostname():
        try:
            return bool(abs(psutil.Process(held["pid"]).create_time() - held.get("born", 0.0)) < 1.0)
        except psutil.NoSuchProcess:
            return False
    return time.time() - float(held.get("at", 0.0)) < MISSED_BEATS * beat


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """A disk that is full or not ours to write is told in one line."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
