"""Laws of the ReplayBuffer's actor, without Ray: calls that meet in one turn of its loop, and a disk that refuses."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltal.config import ReplayConfig
from deltal.errors import FolderError
from deltal.replay.actor import ReplayActor
from deltal.replay.journal import Journal
from deltal.replay.ledger import audit
from tests.unit.builders import gid, scored


def opened(folder: Path) -> ReplayActor:
    return ReplayActor(
        run="r", journal=str(folder / "journal"), settings=ReplayConfig(prompts_per_batch=2), batches=4, responses=2,
        max_length=64, host="127.0.0.1", token=None,
    )  # fmt: skip


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow above 100 bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_group_that_comes_twice_in_one_turn_is_admitted_once(tmp_path: Path) -> None:
    async def meet() -> list[bool]:
        actor = opened(tmp_path)
        await actor.issue([gid(0), gid(1)], (0, 2))
        found = await asyncio.gather(
            actor.admit([scored(0)]), actor.admit([scored(0), scored(1)]), actor.admit([scored(1)])
        )
        return [receipt.duplicate for receipts in found for receipt in receipts]

    assert asyncio.run(meet()) == [False, True, False, True]
    assert audit(Journal(str(tmp_path / "journal")).read(), max_staleness=4).violations == ()


def test_an_eviction_and_an_admission_in_one_turn_leave_one_fate(tmp_path: Path) -> None:
    async def meet() -> tuple[list[object], dict[str, int]]:
        actor = opened(tmp_path)
        await actor.issue([gid(0), gid(1)], (0, 2))
        first = await asyncio.gather(actor.evict([gid(0)], "deadline"), actor.admit([scored(0)]))
        second = await asyncio.gather(actor.admit([scored(1)]), actor.evict([gid(1)], "deadline"))
        return [first[0], first[1][0].fate, second[0][0].fate, second[1]], (await actor.state())["counts"]

    told, counts = asyncio.run(meet())
    assert told == [[gid(0)], "evicted", None, []]
    assert (counts["evicted"], counts["in_flight"]) == (1, 1)
    assert audit(Journal(str(tmp_path / "journal")).read(), max_staleness=4).violations == ()


def test_after_a_record_that_the_disk_refused_every_call_says_so(tmp_path: Path, small_files: None) -> None:
    async def fill() -> None:
        actor = opened(tmp_path)
        with pytest.raises(FolderError, match="File too large; free some space"):
            await actor.issue([gid(i) for i in range(50)], (0, 50))
        for call in (actor.issue([gid(99)], (0, 100)), actor.admit([scored(0)]), actor.sample(0, 1.0), actor.state()):
            with pytest.raises(FolderError, match="File too large"):
                await call

    asyncio.run(fill())
