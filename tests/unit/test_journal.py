"""Laws of the journal: what was written is read back, segments never change, damage and second writers are seen."""

from __future__ import annotations

import resource
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal.errors import FolderError, JournalError
from deltal.replay.journal import MAGIC, Journal, decode, encode
from deltal.replay.ledger import Admitted, BatchFormed, Evicted, Issued, Opened, Record, Trained
from tests.unit.builders import gid, same, scored


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A journal folder, as a path and as an fsspec URL."""
    return str(tmp_path / "journal") if request.param == "local" else f"memory://{uuid.uuid4().hex}/journal"


def admitted(index: int) -> Admitted:
    return Admitted(scored(index))


def written(folder: str, *flushes: list[Record]) -> Journal:
    journal = Journal(folder)
    journal.open_writer(0.0)
    for records in flushes:
        journal.write(records)
    return journal


def bytes_of(folder: str) -> dict[str, bytes]:
    """Name and bytes of every file of a folder."""
    fs, path = fsspec.core.url_to_fs(folder)
    return {name.rsplit("/", 1)[-1]: fs.cat_file(name) for name in fs.ls(path, detail=False)}


EVERY_KIND: list[Record] = [
    Issued((gid(0), gid(1), gid(2, epoch=1)), 3, 1, 3, 12.25),
    Admitted(scored(0, rewards=(0.1, -2.0), lengths=(0, 5), masks=(None, (True, False, True, True, False)))),
    Admitted(scored(1, rewards=()), "prompt_too_long"),
    Evicted(gid(2, epoch=1), "deadline"),
    BatchFormed(0, (gid(0),)),
    Trained(0, True),
]


def test_every_kind_of_record_is_read_back_equal_by_another_process_s_journal(folder: str) -> None:
    written(folder, EVERY_KIND[:2], EVERY_KIND[2:])
    read = list(Journal(folder).read())
    assert same(read[0], Opened(1, 0.0))
    assert same(read[1:], EVERY_KIND)


def test_arrays_come_back_with_their_dtypes_and_read_only(folder: str) -> None:
    written(folder, [Admitted(scored(0, lengths=(3, 0)))])
    group = list(Journal(folder).read())[-1].scored.group  # type: ignore[union-attr]
    arrays = {"prompt_tokens": group.prompt_tokens}
    for place, response in enumerate(group.responses):
        arrays |= {f"{name} {place}": getattr(response, name) for name in ("tokens", "logprobs", "mask")}
    assert {name.split()[0]: array.dtype for name, array in arrays.items()} == {
        "prompt_tokens": np.int32, "tokens": np.int32, "logprobs": np.float32, "mask": np.bool_
    }  # fmt: skip
    for array in arrays.values():
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_log_probabilities_keep_every_bit() -> None:
    group = scored(0, rewards=(1.0,), lengths=(4,))
    odd = np.array([-np.inf, np.nan, -0.0, -1e-45], dtype=np.float32)
    object.__setattr__(group.group.responses[0], "logprobs", odd)
    (record,) = decode(encode([Admitted(group)]), "memory")
    assert record.scored.group.responses[0].logprobs.tobytes() == odd.tobytes()  # type: ignore[union-attr]


def test_hostile_text_is_read_back_as_it_is() -> None:
    group = scored(0, rewards=(1.0,))
    object.__setattr__(group.group.responses[0], "text", "<script>\x00\u2028 \U0001f600 </think>")
    assert same(decode(encode([Admitted(group)]), "memory"), [Admitted(group)])


def test_segments_never_change_and_stand_in_order_across_incarnations(folder: str) -> None:
    seen: dict[str, bytes] = {}
    told: list[Record] = []
    for incarnation in range(1, 4):
        journal = Journal(folder)
        told.append(journal.open_writer(float(incarnation)))
        for flush in range(2):
            told.append(admitted(10 * incarnation + flush))
            assert journal.write([told[-1]]) > 0
        now = bytes_of(folder)
        assert {name: now[name] for name in seen} == seen
        assert len(now) == len(seen) + 3
        seen = now
    assert Journal(folder).segments() == sorted(seen)
    assert same(list(Journal(folder).read()), told)
    assert [record.incarnation for record in told if isinstance(record, Opened)] == [1, 2, 3]


@settings(max_examples=60)
@given(st.data())
def test_no_flipped_bit_and_no_cut_goes_unseen(data: st.DataObject) -> None:
    whole = encode(EVERY_KIND)
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, 8 * len(whole) - 1))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
    else:
        damaged = bytearray(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(JournalError, match=r"000001-00000007\.journal"):
        decode(bytes(damaged), "run/journal/000001-00000007.journal")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_segment_is_an_error_that_names_the_file(folder: str, damage: str) -> None:
    written(folder, [admitted(0)], [admitted(1)])
    name = "000001-00000001.journal"
    whole = bytes_of(folder)[name]
    broken = {"cut": whole[:-1], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b"", "foreign": b"PK" + whole}
    fs, path = fsspec.core.url_to_fs(folder)
    fs.pipe_file(f"{path}/{name}", broken[damage])
    with pytest.raises(JournalError, match=name):
        list(Journal(folder).read())


def test_a_segment_of_another_format_is_an_error_that_names_the_file() -> None:
    import zlib

    body = b"\x91\x82\xa4type\xa7unknown\xa1a\x01"
    with pytest.raises(JournalError, match=r"old\.journal cannot be read"):
        decode(MAGIC + zlib.crc32(body).to_bytes(4, "big") + body, "old.journal")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("000001-00000001.journal", "segment 1 of incarnation 1 is missing"),
        ("000002-00000000.journal", "segment 0 of incarnation 2 is missing"),
        ("000002-00000001.journal", "segment 1 of incarnation 2 is missing"),
    ],
)
def test_a_missing_segment_in_the_middle_is_noticed(folder: str, lost: str, message: str) -> None:
    for _ in range(2):
        written(folder, [admitted(0)], [admitted(1)])
    fs, path = fsspec.core.url_to_fs(folder)
    fs.rm_file(f"{path}/{lost}")
    with pytest.raises(JournalError, match=message):
        list(Journal(folder).read())


def test_a_missing_incarnation_is_noticed(folder: str) -> None:
    for _ in range(3):
        written(folder)
    fs, path = fsspec.core.url_to_fs(folder)
    fs.rm_file(f"{path}/000002-00000000.journal")
    with pytest.raises(JournalError, match="segment 0 of incarnation 2 is missing"):
        list(Journal(folder).read())


def test_deleting_the_oldest_segments_leaves_a_readable_journal(folder: str) -> None:
    """Compaction deletes whole files from the front."""
    written(folder, [admitted(0)], [admitted(1)])
    written(folder, [admitted(2)])
    fs, path = fsspec.core.url_to_fs(folder)
    for name in ("000001-00000000.journal", "000001-00000001.journal"):
        fs.rm_file(f"{path}/{name}")
    assert same(list(Journal(folder).read()), [admitted(1), Opened(2, 0.0), admitted(2)])


def test_the_older_of_two_writers_stops_at_its_next_write(folder: str) -> None:
    older, newer = Journal(folder), Journal(folder)
    older.open_writer(0.0)
    older.write([admitted(0)])
    newer.open_writer(1.0)
    before = bytes_of(folder)
    with pytest.raises(JournalError, match="a newer ReplayBuffer writes this journal; this one stops"):
        older.write([admitted(1)])
    assert bytes_of(folder) == before
    newer.write([admitted(2)])
    assert same(list(Journal(folder).read()), [Opened(1, 0.0), admitted(0), Opened(2, 1.0), admitted(2)])


def test_a_writer_two_incarnations_behind_stops_as_well(folder: str) -> None:
    oldest = written(folder)
    written(folder)
    written(folder, [admitted(0)])
    with pytest.raises(JournalError, match="this one stops"):
        oldest.write([admitted(1)])


def test_no_segment_is_ever_written_over(folder: str) -> None:
    journal = written(folder)
    fs, path = fsspec.core.url_to_fs(folder)
    fs.pipe_file(f"{path}/000001-00000001.journal", encode([admitted(7)]))
    with pytest.raises(JournalError, match="exists already: a second ReplayBuffer writes this journal"):
        journal.write([admitted(8)])
    assert same(list(Journal(folder).read())[-1], admitted(7))


def test_leftovers_of_a_crash_are_ignored(folder: str) -> None:
    written(folder, [admitted(0)])
    fs, path = fsspec.core.url_to_fs(folder)
    for name in ("000001-00000002.journal.4711.tmp", "000009-00000000.journal.tmp", "notes.txt", ".journal"):
        fs.pipe_file(f"{path}/{name}", b"half a seg")
    assert len(Journal(folder).segments()) == 2
    assert same(list(Journal(folder).read()), [Opened(1, 0.0), admitted(0)])
    assert Journal(folder).open_writer(1.0).incarnation == 2


def test_a_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    written(str(tmp_path), [admitted(0)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000001-00000000.journal", "000001-00000001.journal"]


def test_a_write_that_the_disk_refuses_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.open_writer(0.0)
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(FolderError, match=r"00000001\.journal cannot be written: File too large; free"):
            journal.write([Issued(tuple(gid(i) for i in range(100)), 0, 0, 100, 0.0)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


def test_the_policy_version_is_that_of_the_newest_trained_batch(folder: str) -> None:
    journal = Journal(folder)
    assert journal.policy_version() == 0
    journal.open_writer(0.0)
    journal.write([Trained(0, False), Trained(1, True)])
    journal.write([Issued((gid(0),), 2, 0, 1, 0.0)])
    assert Journal(folder).policy_version() == 2


def test_groups_are_found_in_the_order_asked_for_after_reopening(folder: str) -> None:
    writer = written(folder, [admitted(0), admitted(1)], [Evicted(gid(9), "stale")], [admitted(2)])
    reopened = Journal(folder)
    for _ in reopened.read():
        pass
    for journal in (writer, reopened):
        for order in ((2, 0, 1), (1,), (0, 2)):
            assert same(journal.find([gid(i) for i in order]), [scored(i) for i in order])
        with pytest.raises(JournalError, match="no segment holds group train/0/7"):
            journal.find([gid(0), gid(7)])


def test_a_new_folder_has_no_records(folder: str) -> None:
    assert list(Journal(folder).read()) == []
    assert Journal(folder).open_writer(5.0) == Opened(1, 5.0)
