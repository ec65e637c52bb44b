"""Laws of checkpoints: what is saved is what was there, training goes on meanwhile, and nothing damaged is loaded."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltal.errors import FolderError, LearnerError
from deltal.learner import checkpoint, rng
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.checksum import problem_of, sum_of
from tests.unit.builders import same_state, tiny_model

pytestmark = pytest.mark.usefixtures("process_group")

TOKENS = torch.tensor([[72, 105, 256, 3, 77, 200]])


@pytest.fixture(scope="module")
def start(model_cache: None) -> torch.nn.Module:
    return tiny_model()  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


class Learner:
    """A model with its optimizer, a new one each time as after a restart."""

    def __init__(self, start: torch.nn.Module) -> None:
        self.model: Any = copy.deepcopy(start)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(self, times: int = 1) -> Learner:
        for _ in range(times):
            self.model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def begin(self, store: Checkpoints, version: int, **extra: Any) -> None:
        store.save(version, self.model, self.optimizer, extra)

    def save(self, store: Checkpoints, version: int, **extra: Any) -> None:
        self.begin(store, version, **extra)
        store.wait()

    def load(self, store: Checkpoints, at_most: int | None = None) -> tuple[int, dict[str, Any]]:
        return store.load(self.model, self.optimizer, at_most=at_most)


def checkpointed(folder: Path, start: torch.nn.Module, versions: int) -> list[Any]:
    """Checkpoints 1 to `versions`; returns the state each holds."""
    learner, states, store = Learner(start), [], Checkpoints(str(folder), keep=9)
    for version in range(1, versions + 1):
        learner.step().save(store, version)
        states.append(learner.state())
    return states


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing begins only when the event is set, as on a very slow disk."""
    release, write = threading.Event(), checkpoint.dcp_save

    def slow(*arguments: Any, **more: Any) -> Any:
        assert release.wait(60)
        return write(*arguments, **more)

    monkeypatch.setattr(checkpoint, "dcp_save", slow)
    yield release
    release.set()


# --- what is saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_checkpoint_restores_every_bit_and_training_goes_on_equal(
    start: torch.nn.Module, folder: Path, where: str
) -> None:
    url = str(folder) if where == "local" else f"memory://{uuid.uuid4().hex}/checkpoints"
    straight = Learner(start).step(2)
    straight.save(Checkpoints(url, keep=2), 2, note="kept")
    resumed = Learner(start)
    version, extra = resumed.load(Checkpoints(url, keep=2))
    assert (version, extra["note"], extra["version"], extra["ranks"]) == (2, "kept", 2, 1)
    assert same_state(resumed.state(), straight.state())
    assert same_state(resumed.step(2).state(), straight.step(2).state())


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    start: torch.nn.Module, folder: Path, held_up: threading.Event
) -> None:
    learner, store = Learner(start).step(), Checkpoints(str(folder), keep=2)
    at_save = learner.state()
    learner.begin(store, 1)
    learner.step(3)
    assert not same_state(learner.state(), at_save)
    assert store.versions() == []
    assert store.finished() is None
    held_up.set()
    told = store.wait()
    assert told is not None
    assert told["version"] == 1
    assert told["bytes"] >= 12 * sum(parameter.numel() for parameter in learner.model.parameters())
    assert store.finished() is None, "it is told once"
    resumed = Learner(start)
    assert resumed.load(store)[0] == 1
    assert same_state(resumed.state(), at_save)


def test_the_next_checkpoint_waits_for_the_one_before(
    start: torch.nn.Module, folder: Path, held_up: threading.Event
) -> None:
    learner, store = Learner(start).step(), Checkpoints(str(folder), keep=9)
    learner.begin(store, 1)
    second = threading.Thread(target=learner.begin, args=(store, 2))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    held_up.set()
    second.join(60)
    store.wait()
    assert store.versions() == [1, 2]


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(1))]


def test_what_is_drawn_after_a_resume_is_what_would_have_been_drawn(start: torch.nn.Module, folder: Path) -> None:
    rng.seed(-5, 0)
    first = drawn()
    Learner(start).step().save(Checkpoints(str(folder), keep=1), 1)
    expected = drawn()
    rng.seed(-5, 0)
    assert drawn() == first
    rng.seed(-5, 1)
    assert drawn() != first, "ranks draw other numbers"
    Learner(start).load(Checkpoints(str(folder), keep=1))
    assert drawn() == expected


def test_an_optimizer_that_has_not_stepped_yet_is_as_new_afterwards(start: torch.nn.Module, folder: Path) -> None:
    learner, store = Learner(start), Checkpoints(str(folder), keep=1)
    learner.save(store, 1)
    assert not learner.optimizer.state, "saving changes nothing"
    resumed = Learner(start)
    assert resumed.load(store)[0] == 1
    assert same_state(resumed.step().state(), Learner(start).step().state())


def test_a_checkpoint_s_mark_is_written_last_and_knows_every_file(start: torch.nn.Module, folder: Path) -> None:
    checkpointed(folder, start, 1)
    files = sorted((folder / "00000001").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert files[-1].name == "complete.json"
    mark = json.loads(files[-1].read_text())
    assert mark["version"] == 1
    assert mark["files"] == {file.name: sum_of(file.read_bytes()) for file in files[:-1]}
    assert {".metadata", "__0_0.distcp", "random.pt"} == mark["files"].keys()


# --- what is loaded ----------------------------------------------------------------------------------


def test_without_a_checkpoint_nothing_is_touched(start: torch.nn.Module, folder: Path) -> None:
    learner = Learner(start)
    assert learner.load(Checkpoints(str(folder), keep=2)) == (0, {})
    assert same_state(learner.state(), Learner(start).state())


def test_the_newest_that_is_not_too_new_is_loaded(start: torch.nn.Module, folder: Path) -> None:
    states = checkpointed(folder, start, 3)
    for at_most, version in ((None, 3), (9, 3), (2, 2), (0, 0)):
        learner = Learner(start)
        assert learner.load(Checkpoints(str(folder), keep=9), at_most)[0] == version
        assert same_state(learner.state(), states[version - 1] if version else Learner(start).state())


def test_a_half_written_checkpoint_is_never_picked(start: torch.nn.Module, folder: Path) -> None:
    states = checkpointed(folder, start, 2)
    (folder / "00000002" / "complete.json").unlink()
    (folder / "00000003").mkdir()
    (folder / "notes").mkdir()
    store, learner = Checkpoints(str(folder), keep=2), Learner(start)
    assert store.versions() == [1]
    assert learner.load(store)[0] == 1
    assert same_state(learner.state(), states[0])


def test_a_checkpoint_cut_off_before_is_written_anew(start: torch.nn.Module, folder: Path) -> None:
    (folder / "00000001").mkdir(parents=True)
    (folder / "00000001" / "__7_0.distcp").write_bytes(b"of another number of ranks")
    states = checkpointed(folder, start, 1)
    learner = Learner(start)
    assert learner.load(Checkpoints(str(folder), keep=2))[0] == 1
    assert same_state(learner.state(), states[0])
    assert not (folder / "00000001" / "__7_0.distcp").exists()


def damage(folder: Path, how: str) -> None:
    shard = folder / "__0_0.distcp"
    match how:
        case "shard cut":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        case "shard empty":
            shard.write_bytes(b"")
        case "shard gone":
            shard.unlink()
        case "shard has one other bit":
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 16
            shard.write_bytes(data)
        case "metadata cut":
            (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])
        case "metadata gone":
            (folder / ".metadata").unlink()
        case "random gone":
            (folder / "random.pt").unlink()
        case "mark empty":
            (folder / "complete.json").write_bytes(b"")
        case "mark cut":
            (folder / "complete.json").write_bytes((folder / "complete.json").read_bytes()[:-9])


DAMAGES = {
    "shard cut": r"__0_0\.distcp has \d+ bytes of \d+",
    "shard empty": r"__0_0\.distcp has 0 bytes of \d+",
    "shard gone": r"__0_0\.distcp is missing",
    "shard has one other bit": r"__0_0\.distcp was changed after it was written \(checksum\)",
    "metadata cut": r"\.metadata has 100 bytes of \d+",
    "metadata gone": r"\.metadata is missing",
    "random gone": r"random\.pt is missing",
    "mark empty": r"complete\.json cannot be read",
    "mark cut": r"complete\.json cannot be read",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    start: torch.nn.Module, folder: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    states = checkpointed(folder, start, 2)
    damage(folder / "00000002", how)
    learner = Learner(start)
    assert learner.load(Checkpoints(str(folder), keep=2))[0] == 1
    assert same_state(learner.state(), states[0])
    said = [line for line in capfd.readouterr().err.splitlines() if "passed over" in line]
    assert len(said) == 1
    assert said[0].startswith(f"deltal: checkpoint {folder}/00000002 is damaged and passed over: ")
    with pytest.raises(LearnerError, match=f"00000002 is damaged: {DAMAGES[how]}"):
        Checkpoints(str(folder), keep=1).load_weights(2, copy.deepcopy(start))


@given(st.binary(max_size=200), st.data())
def test_any_change_of_a_file_is_noticed(written: bytes, data: st.DataObject) -> None:
    fs, path = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    fs.pipe_file(path, written)
    assert problem_of(fs, path, sum_of(written)) is None
    changed = data.draw(
        st.one_of(st.binary(max_size=200), st.integers(0, max(8 * len(written) - 1, 0)).map(lambda i: flip(written, i)))
    )
    fs.pipe_file(path, changed)
    assert (problem_of(fs, path, sum_of(written)) is None) == (changed == written)
    fs.rm(path)
    assert problem_of(fs, path, sum_of(written)) == f"{path[1:]} is missing"


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_run_goes_on_from_weights_that_are_of_no_checkpoint(start: torch.nn.Module, folder: Path) -> None:
    checkpointed(folder, start, 1)
    damage(folder / "00000001", "shard cut")
    with pytest.raises(LearnerError, match=r"no checkpoint in .* can be read; move it away"):
        Learner(start).load(Checkpoints(str(folder), keep=2))


# --- what stays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_checkpoints_stay(start: torch.nn.Module, folder: Path, keep: int) -> None:
    learner, store = Learner(start), Checkpoints(str(folder), keep=keep)
    for version in (1, 3, 10):
        learner.save(store, version)
    assert store.versions() == [1, 3, 10][-keep:]
    assert sorted(path.name for path in folder.iterdir()) == [f"{v:08d}" for v in (1, 3, 10)[-keep:]]


def test_the_best_checkpoint_stays_until_it_is_no_longer_the_best(start: torch.nn.Module, folder: Path) -> None:
    learner, store = Learner(start), Checkpoints(str(folder), keep=1)
    for version, best, there in ((1, [], [1]), (2, [1], [1, 2]), (3, [1], [1, 3]), (4, [3], [3, 4]), (5, [], [5])):
        store.save(version, learner.model, learner.optimizer, {}, keep=best)
        store.wait()
        assert store.versions() == there


def test_what_a_crash_left_half_written_goes_when_a_later_one_is_complete(start: torch.nn.Module, folder: Path) -> None:
    for version in (2, 4):
        (folder / f"{version:08d}").mkdir(parents=True)
    Learner(start).save(Checkpoints(str(folder), keep=1), 3)
    assert sorted(path.name for path in folder.iterdir()) == ["00000003", "00000004"]


def test_a_damaged_newer_checkpoint_never_pushes_out_one_that_can_be_read(start: torch.nn.Module, folder: Path) -> None:
    checkpointed(folder, start, 4)
    for version in (2, 4):
        shutil.rmtree(folder / f"{version:08d}")
    damage(folder / "00000003", "shard cut")
    learner, store = Learner(start), Checkpoints(str(folder), keep=1)
    assert learner.load(store)[0] == 1
    learner.save(store, 2)
    again = Learner(start)
    assert again.load(store)[0] == 2
    assert same_state(again.state(), learner.state())


def test_a_checkpoint_that_cannot_be_written_is_an_error_in_one_line_and_loses_nothing(
    start: torch.nn.Module, folder: Path
) -> None:
    states = checkpointed(folder, start, 1)
    learner, store = Learner(start).step(2), Checkpoints(str(folder), keep=1)
    before = learner.state()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As if the disk were full: no file may grow beyond 100 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        learner.begin(store, 2)
        with pytest.raises(FolderError, match=f"{folder}/00000002 cannot be written: .*; free some") as error:
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert same_state(learner.state(), before)
    assert not (folder / "00000002").exists(), "a full disk needs the space"
    again = Learner(start)
    assert again.load(Checkpoints(str(folder), keep=1))[0] == 1
    assert same_state(again.state(), states[0])
    learner.save(store, 2)
    assert store.versions() == [2], "with space again it goes on"
