"""Published weights straight from a learner rank's memory into an engine's (`learner.transport: direct`).

NCCL between GPUs, gloo otherwise. A process group of two for each pull, not one for the fleet: workers come, go and die
while a run goes on, and a collective over all of them would stop with any one of them.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deltal.errors import TransferError, one_line

Layout = list[tuple[str, str, tuple[int, ...]]]
"""Name, torch dtype without prefix, and shape of each tensor, in the order in which they are sent."""


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """What a receiver must know before the first byte."""
    return [(name, str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in tensors.items()]


def serve_once(tensors: Mapping[str, Tensor], host: str, *, seconds: float) -> tuple[str, int]:
    """Listen on `host` for one receiver and send it everything, in a thread; returns where to connect.

    `tensors`: contiguous, all on one device; they are held until sent, or until nobody came for `seconds`.
    """
    listener = socket.create_server((host, 0))
    address = listener.getsockname()[:2]
    place = (host, int(address[1]), listener.detach())
    threading.Thread(target=_send, args=(dict(tensors), place, seconds), daemon=True, name="weight-sender").start()
    return host, int(address[1])


def receive(
    wanted: Layout, address: tuple[str, int], *, device: str, own_host: str, seconds: float
) -> dict[str, Tensor]:
    """The tensors of `wanted`, on `device` (`cuda` takes NCCL, and so must the sender).

    Raises TransferError when the sender is gone or not done within `seconds`.
    """
    try:
        group = _pair(*address, None, rank=1, device=device, own_host=own_host, seconds=seconds)
        tensors = {}
        for name, dtype, shape in wanted:
            kind = getattr(torch, dtype)
            flat = torch.empty(torch.Size(shape).numel() * kind.itemsize, dtype=torch.uint8, device=device)
            group.recv([flat], 0, 0).wait()
            tensors[name] = flat.view(kind).view(shape)
        _until_moved(device)
        return tensors
    except (RuntimeError, dist.DistError) as error:
        raise TransferError(
            f"weights from {address[0]}:{address[1]} did not come over: {one_line(error, line=0)}"
        ) from error


def _send(tensors: Mapping[str, Tensor], place: tuple[str, int, int], seconds: float) -> None:
    host, port, listener = place
    device = next((one.device.type for one in tensors.values()), "cpu")
    try:
        group = _pair(host, port, listener, rank=0, device=device, own_host=host, seconds=seconds)
        for one in tensors.values():
            group.send([one.reshape(-1).view(torch.uint8)], 1, 0).wait()
        _until_moved(device)
    except (RuntimeError, dist.DistError):
        return  # The receiver died or gave up: it, or who takes its place, asks again.


def _until_moved(device: str) -> None:
    """NCCL's `wait` holds up the stream, not the thread: tensors and group must outlive the transfer."""
    if device == "cuda":
        torch.cuda.synchronize()


def _pair(host: str, port: int, listener: int | None, *, rank: int, device: str, own_host: str, seconds: float) -> Any:
    """Sender (rank 0, which listens) and receiver (rank 1)."""
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, 2, is_master=rank == 0, timeout=limit, wait_for_workers=False, master_listen_fd=listener
    )
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    backend: Any = dist.ProcessGroupGloo
    gloo = backend._Options()
    gloo._timeout, gloo._devices = limit, [backend.create_device(hostname=own_host)]
    return backend(store, rank, 2, gloo)
