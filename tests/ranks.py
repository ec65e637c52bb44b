"""K processes that meet as the ranks of one gloo group: for tests and benches of what ranks do together, no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def together(part: Callable[..., Any], ranks: int, *arguments: Any, folder: Path, seconds: float = 240.0) -> list[Any]:
    """What `part(rank, *arguments)` returns on each of the ranks, in their order, a thread each.

    `folder`: where they meet and leave what they found. When one fails the others are ended and its error is raised,
    as torch.multiprocessing's ProcessRaisedException, or ProcessExitedException when a signal ended it. Raises
    AssertionError when they are not through after `seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meet").unlink(missing_ok=True)
    processes = multiprocessing.spawn(_rank, (ranks, part, str(folder), arguments), nprocs=ranks, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1.0):
            assert time.monotonic() < deadline, f"{ranks} rank(s) of {part.__name__} took over {seconds:.0f} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, part: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meet", ranks), rank=rank, world_size=ranks)
    torch.save(part(rank, *arguments), f"{folder}/found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
