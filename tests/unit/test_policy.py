"""Laws of the PolicyStore, without Ray: a version is visible once, when all its shards are in."""

from __future__ import annotations

import asyncio
import gc
import weakref
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest

import deltal.policy.store
from deltal.policy.store import PolicyStore


class Reference:
    """Stands for Ray's: whoever holds it holds the shard."""

    def __init__(self, call: Future[Any]) -> None:
        self._call = call

    def future(self) -> Future[Any]:
        return self._call


class Rank:
    """Hands its shard over when told to; each call is answered in turn."""

    def __init__(self) -> None:
        self.calls: list[Future[dict[str, Any] | None]] = []
        self.references: list[weakref.ref[Reference]] = []
        self.take_weights = SimpleNamespace(remote=self._called)

    def _called(self, version: int) -> Reference:
        self.calls.append(Future())
        reference = Reference(self.calls[-1])
        self.references.append(weakref.ref(reference))
        return reference

    def answer(self, call: int) -> None:
        self.calls[call].set_result({"digest": "d", "bytes": 8})


@pytest.fixture
def registry() -> list[Any]:
    """What the store would serve."""
    return []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, registry: list[Any]) -> PolicyStore:
    monkeypatch.setattr(deltal.policy.store, "serve_metrics", lambda served, **_: registry.append(served))
    return PolicyStore(run="run", host="127.0.0.1", token=None)


async def offered(store: PolicyStore, version: int, rank: int, holder: Rank, ranks: int = 2) -> asyncio.Task[bool]:
    task = asyncio.create_task(store.offer(version, rank, ranks, holder, 5.0))
    await asyncio.sleep(0)
    return task


def test_a_version_is_visible_when_all_shards_are_in(store: PolicyStore) -> None:
    async def run() -> None:
        ranks = [Rank(), Rank()]
        tasks = [await offered(store, 3, number, rank) for number, rank in enumerate(ranks)]
        ranks[1].answer(0)
        assert await tasks[1] is False
        assert await store.newest() is None
        ranks[0].answer(0)
        assert await tasks[0] is True
        assert await store.newest() == 3

    asyncio.run(run())


def test_a_version_offered_twice_at_once_is_published_once_and_kept_once(
    store: PolicyStore, registry: list[Any]
) -> None:
    ranks = [Rank(), Rank()]

    async def run() -> None:
        first, again = await offered(store, 1, 0, ranks[0]), await offered(store, 1, 0, ranks[0])
        other = await offered(store, 1, 1, ranks[1])
        ranks[0].answer(0)
        assert await first is False
        ranks[1].answer(0)
        assert await other is True
        ranks[0].answer(1)
        assert await again is True, "visible already"
        told = generate_latest(registry[0]).decode().splitlines()
        assert [line[-4:] for line in told if line.startswith("deltal_policy_published_total")] == [" 1.0"]

    asyncio.run(run())
    gc.collect()
    assert [reference() is not None for reference in ranks[0].references] == [True, False]
