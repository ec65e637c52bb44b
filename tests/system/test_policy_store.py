"""The PolicyStore in a real Ray: each version is seen whole, and old ones leave the object store."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import node_stats

from deltal.config.file import load_config
from deltal.plan.machine import GIB
from deltal.plan.memory import KEPT_VERSIONS
from deltal.plan.plan import plan
from deltal.policy.store import PolicyStore
from deltal.run.driver import loopback_kept
from deltal.types import TensorBytes
from tests.launch import TINY

RANKS = 2
SHARD = 2**20
"""Bytes of one rank's shard: above the size that Ray keeps out of the object store."""
PUBLISHES = 200
WEIGHTS = 2**29
"""Bytes of a version as large as SmolLM2's in float32."""
PLANNED = dataclasses.replace(plan(load_config(TINY)), object_store_gib={"weights": KEPT_VERSIONS * WEIGHTS / GIB})


class Rank:
    """A learner rank that only publishes; holds its last shard, as LearnerRank does."""

    def __init__(self, rank: int, store: Any, ranks: int = RANKS, size: int = SHARD) -> None:
        self._rank, self._store, self._ranks, self._size = rank, store, ranks, size
        self._shares: dict[int, Any] = {}

    def take_weights(self, version: int) -> dict[str, Any] | None:
        return self._shares.get(version)

    def publish(self, version: int) -> bool:
        data = np.full(self._size, version % 251, dtype=np.uint8)
        tensor = TensorBytes(data=data, dtype="uint8", shape=(self._size,))
        self._shares = {version: {"tensors": {"w": tensor}, "digest": f"{version}/{self._rank}", "bytes": self._size}}
        me = ray.get_runtime_context().current_actor
        return bool(ray.get(self._store.offer.remote(version, self._rank, self._ranks, me, 30.0), timeout=60))


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A Ray with an object store of the planned size."""
    with loopback_kept():
        ray.init(address="local", num_cpus=1, object_store_memory=PLANNED.object_store_bytes, include_dashboard=False,
                 log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.1")  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def store(own_ray: None) -> Iterator[Any]:
    """A PolicyStore that ends with its test, and what it holds with it."""
    made = ray.remote(PolicyStore).options(num_cpus=0, max_concurrency=100)
    actor = made.remote(run="r", host="127.0.0.1", token=None)
    yield actor
    ray.kill(actor)


def store_stats() -> Any:
    """What Ray tells of the object store."""
    (node,) = ray.nodes()
    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats


def settled_bytes(at_most: int) -> int:
    """Of the object store, once it is down to `at_most`, or after 10 s: Ray frees what it let go once a second."""
    deadline = time.monotonic() + 10.0
    while (used := int(store_stats().object_store_bytes_used)) > at_most and time.monotonic() < deadline:
        time.sleep(0.1)
    return used


def test_object_store_use_stays_flat_over_two_hundred_publishes(store: Any):
    ranks = [ray.remote(Rank).options(num_cpus=0, max_concurrency=4).remote(rank, store) for rank in range(RANKS)]
    one_version = RANKS * SHARD
    for version in range(1, PUBLISHES + 1):
        ray.get([rank.publish.remote(version) for rank in ranks], timeout=60)
        # A worker takes each version, as it loads them; it holds it until the next one is here.
        seen = ray.get(store.wait_newer.remote(version - 1, 30.0), timeout=60)
        assert (seen.version, len(seen.shards)) == (version, RANKS)
        for (reference,) in seen.shards:
            shard = ray.get(reference, timeout=30)
            assert int(shard["tensors"]["w"].data[0]) == version % 251
        del shard, reference
        if version % 50 == 0:
            limit = int(1.1 * one_version)
            assert one_version <= settled_bytes(limit) <= limit, f"after {version} publishes only the newest is left"
    assert ray.get(store.newest.remote(), timeout=30) == PUBLISHES


def test_published_weights_are_never_written_to_disk(store: Any):
    rank = ray.remote(Rank).options(num_cpus=0, max_concurrency=4).remote(0, store, 1, WEIGHTS)
    for version in range(1, 9):
        ray.get(rank.publish.remote(version), timeout=60)
        seen = ray.get(store.wait_newer.remote(version - 1, 30.0), timeout=60)
        shard = ray.get(seen.shards[0][0], timeout=30)
        assert int(shard["tensors"]["w"].data[-1]) == version
    assert store_stats().spilled_bytes_total == 0
