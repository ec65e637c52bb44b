"""What the unit tests share: an unhurried hypothesis, a cache of their own for made models, one process group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

# Machines are slow at times, and a first call may load a library: no deadline per example.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DELTAL_CACHE in a temporary folder, so that models made by tests are made by this session's code.

    Tiny models run on one thread: more would only wait for each other.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A world of one process; ended with the module, since an engine in this process makes one of its own."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
