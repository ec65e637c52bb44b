"""Laws of the run folder: one living holder, whole files, rows that survive a crash, and errors that say where."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deltal.errors import FolderError, RunInUseError, RunNotFoundError, UserError
from deltal.folder import MISSED_BEATS, FolderLock, RunFolder, lock_is_alive, runs_root
from tests.unit.builders import run_config

BEAT = 0.5


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """An empty run folder, as a path and as an fsspec URL."""
    made = RunFolder(str(tmp_path / "a-run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/a-run")
    made.make()
    return made


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A living process that ends when its input does."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def holder(process: subprocess.Popen[bytes], **more: Any) -> dict[str, Any]:
    """The lock as `process` would have written it."""
    born = psutil.Process(process.pid).create_time()
    return {"id": "other", "host": socket.gethostname(), "pid": process.pid, "born": born, "at": time.time()} | more


def locked(folder: RunFolder, **more: Any) -> FolderLock:
    return FolderLock(folder, beat=BEAT, **more)


def test_a_living_process_keeps_its_folder_however_old_its_heartbeat(
    folder: RunFolder, process: subprocess.Popen[bytes]
) -> None:
    folder.write_json("lock.json", holder(process, at=0.0))
    said = f"is in use by process {process.pid} on {socket.gethostname()}"
    with pytest.raises(RunInUseError, match=said), locked(folder):
        pass
    assert folder.read_json("lock.json")["id"] == "other"


def test_a_dead_process_loses_its_folder_at_once(folder: RunFolder, process: subprocess.Popen[bytes]) -> None:
    folder.write_json("lock.json", holder(process))
    process.kill()
    process.wait()
    with locked(folder):
        assert folder.read_json("lock.json")["pid"] == psutil.Process().pid
    assert folder.read_json("lock.json") == {}


def test_a_process_that_has_got_a_dead_one_s_number_does_not_hold_its_folder(
    folder: RunFolder, process: subprocess.Popen[bytes]
) -> None:
    folder.write_json("lock.json", holder(process, born=psutil.Process(process.pid).create_time() - 3600.0))
    with locked(folder):
        assert folder.read_json("lock.json")["id"] != "other"


def test_a_lock_of_another_host_ends_after_ten_missed_beats(folder: RunFolder) -> None:
    def held_for(beats: float) -> dict[str, Any]:
        return {"id": "other", "host": "elsewhere", "pid": 1, "born": 0.0, "at": time.time() - beats * BEAT}

    assert MISSED_BEATS == 10
    folder.write_json("lock.json", held_for(MISSED_BEATS - 2))
    with pytest.raises(RunInUseError, match="is in use by process 1 on elsewhere"), locked(folder):
        pass
    folder.write_json("lock.json", held_for(MISSED_BEATS + 1))
    with locked(folder):
        assert folder.read_json("lock.json")["host"] == socket.gethostname()


def test_a_folder_is_locked_while_held_and_free_afterwards(folder: RunFolder) -> None:
    for _ in range(2):
        with locked(folder):
            assert lock_is_alive(folder.read_json("lock.json"), BEAT)
            with pytest.raises(RunInUseError), locked(folder):
                pass
        assert not lock_is_alive(folder.read_json("lock.json"), BEAT)


@pytest.mark.parametrize("held", [None, {}, {"id": "x"}])
def test_no_lock_is_no_living_holder(held: dict[str, Any] | None) -> None:
    assert not lock_is_alive(held, BEAT)


def test_a_holder_whose_folder_was_taken_is_told_and_leaves_the_lock_alone(folder: RunFolder) -> None:
    lost = threading.Event()
    with FolderLock(folder, beat=0.01, on_loss=lost.set):
        folder.write_json("lock.json", {"id": "thief"})
        assert lost.wait(30.0)
    assert folder.read_json("lock.json") == {"id": "thief"}


def test_a_heartbeat_renews_the_lock(folder: RunFolder) -> None:
    with FolderLock(folder, beat=0.01):
        first = folder.read_json("lock.json")["at"]
        deadline = time.monotonic() + 30.0
        while folder.read_json("lock.json")["at"] == first:
            assert time.monotonic() < deadline, "no heartbeat"


def test_a_released_lock_is_not_written_again_by_a_heartbeat_under_way(tmp_path: Path) -> None:
    class SlowFolder(RunFolder):
        """Its heartbeat has read the lock and writes it only after the release, or half a second later."""

        def __init__(self, url: str) -> None:
            super().__init__(url)
            self.reading, self.released = threading.Event(), threading.Event()

        def read_json(self, name: str) -> Any:
            value = super().read_json(name)
            if threading.current_thread().name == "folder-lock":
                self.reading.set()
                self.released.wait(0.5)
            return value

        def write_json(self, name: str, value: Any) -> None:
            super().write_json(name, value)
            if value == {}:
                self.released.set()

    folder = SlowFolder(str(tmp_path))
    with FolderLock(folder, beat=0.01):
        assert folder.reading.wait(30.0)
    for thread in threading.enumerate():
        if thread.name == "folder-lock":
            thread.join(30.0)
    assert folder.read_json("lock.json") == {}


def test_nan_and_infinity_become_null_in_json(folder: RunFolder) -> None:
    odd = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.nan, 2)}, 3: True, "e": None}
    expected = {"a": None, "b": [None, None, 1.5], "c": {"d": [None, 2]}, "3": True, "e": None}
    folder.write_json("summary.json", odd)
    folder.append_rows("metrics.jsonl", [odd])
    for name in ("summary.json", "metrics.jsonl"):
        text = folder.read(name).decode()
        assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) == expected
    assert folder.read_json("summary.json") == expected
    assert folder.rows("metrics.jsonl") == [expected]


def test_a_file_that_is_missing_reads_as_nothing(folder: RunFolder) -> None:
    assert folder.read_json("summary.json") is None
    assert folder.rows("metrics.jsonl") == []
    with pytest.raises(FileNotFoundError):
        folder.read("config.yaml")


def test_rows_are_appended_in_order(folder: RunFolder) -> None:
    for step in range(3):
        folder.append_rows("metrics.jsonl", [{"step": step}, {"step": step, "text": "ä\n\u2028"}])
    assert [row["step"] for row in folder.rows("metrics.jsonl")] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("cut", [1, 2, 8, 14])
def test_a_last_line_cut_by_a_crash_costs_only_itself(tmp_path: Path, cut: int) -> None:
    folder = RunFolder(str(tmp_path))  # Object storage cuts no lines: a PUT is whole.
    folder.append_rows("metrics.jsonl", [{"step": 1}, {"step": 2, "x": 3}])
    folder.write("metrics.jsonl", folder.read("metrics.jsonl")[:-cut])
    assert folder.rows("metrics.jsonl")[:1] == [{"step": 1}]
    folder.append_rows("metrics.jsonl", [{"step": 3}])
    folder.append_rows("metrics.jsonl", [{"step": 4}])
    kept = [{"step": 2, "x": 3}] if cut == 1 else []
    assert folder.rows("metrics.jsonl") == [{"step": 1}, *kept, {"step": 3}, {"step": 4}]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    whole = [bytes([letter]) * 200_000 for letter in b"ab"]
    folder.write("status.json", whole[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(100):
            folder.write("status.json", whole[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert folder.read("status.json") in whole
    writer.join()
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write("status.json", b"old")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FolderError, match=r"status\.json cannot be written: No space left on device; free some space"):
        folder.write("status.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"], "no half of the new one is left"
    assert folder.read("status.json") == b"old"


@pytest.mark.parametrize("text", ["5", "[1]", '"x"', "{", "[" * 5000])
def test_a_file_of_the_run_folder_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock.json").write_text(text)
    with pytest.raises(UserError, match=r"lock\.json is damaged") as error:
        RunFolder(str(tmp_path)).read_json("lock.json")
    assert "\n" not in str(error.value)


def test_a_run_that_never_began_is_forgotten_and_what_others_put_there_stays(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.make()
    folder.write_config(run_config())
    folder.forget()
    assert not (tmp_path / "run").exists()
    folder.make()
    folder.write_config(run_config())
    (tmp_path / "run" / "notes.txt").write_text("mine")
    folder.forget()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    folder.write_config(run_config())
    (tmp_path / "run" / "journal").mkdir()
    folder.forget()
    assert folder.exists("config.yaml"), "a run that has begun is kept"


def test_a_folder_that_is_not_ours_to_write_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="file/run cannot be written: Not a directory; choose another"):
        RunFolder(str(tmp_path / "file" / "run")).make()


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    for place in ("runs/by-name", "here"):
        made = RunFolder(str(tmp_path / place))
        made.make()
        made.write_config(run_config())
    assert RunFolder.find("by-name").url == str(tmp_path / "runs" / "by-name")
    assert RunFolder.find("here").url == str(tmp_path / "here")
    assert RunFolder.find(str(tmp_path / "here")).name == "here"
    assert RunFolder.find("runs/by-name").url == str(tmp_path / "runs" / "by-name")


def test_a_run_that_is_not_there_is_an_error_that_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAL_RUNS", str(tmp_path / "runs"))
    with pytest.raises(RunNotFoundError) as error:
        RunFolder.find("nobody")
    looked = f"looked for config.yaml in {tmp_path}/runs/nobody and nobody"
    assert str(error.value) == f"there is no run nobody: {looked}"
    with pytest.raises(RunNotFoundError, match=r"looked for config\.yaml in /no/such/run$"):
        RunFolder.find("/no/such/run")
    with pytest.raises(RunNotFoundError, match=r"looked for config\.yaml in memory://no/run$"):
        RunFolder.find("memory://no/run")


def test_the_configured_folder_goes_before_the_environment_and_that_before_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DELTAL_RUNS", "/from/environment")
    assert runs_root(run_config(run={"folder": "/from/config"})) == "/from/config"
    assert runs_root(run_config()) == runs_root() == "/from/environment"
    monkeypatch.delenv("DELTAL_RUNS")
    assert runs_root() == "runs"


def test_settings_are_read_back_equal(folder: RunFolder) -> None:
    config = run_config(learner={"learning_rate": 1e-6}, chat={"prefill": "Δ <think>\n"})
    folder.write_config(config)
    assert folder.config() == config


def test_settings_that_were_replaced_are_kept(folder: RunFolder) -> None:
    configs = [run_config(run={"steps": steps}) for steps in (3, 5, 7)]
    folder.write_config(configs[0])
    for config in configs[1:]:
        folder.replace_config(config)
    assert folder.config() == configs[2]
    for number, config in ((1, configs[0]), (2, configs[1])):
        folder.write("config.yaml", folder.read(f"config.{number}.yaml"))
        assert folder.config() == config


def test_paths_lead_back_into_the_folder(folder: RunFolder) -> None:
    folder.write("config.yaml", b"x")
    assert RunFolder(folder.url).read("config.yaml") == b"x"
    assert folder.path("journal") == f"{folder.url}/journal"
    assert folder.name == "a-run"


def test_a_local_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder("runs/x").url == str(tmp_path / "runs" / "x")
