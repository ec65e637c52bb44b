"""What this machine has: memory, shared memory, CPUs, GPUs, as a process in this container may use them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from deltal.errors import UserError

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Resources that a plan is compared with. Read by `machine()`, or made by hand for another machine."""

    ram_gib: float
    """Total memory, the container's limit where there is one."""
    shm_free_gib: float
    """Free space of /dev/shm, where Ray keeps its object store."""
    cpus: float
    """CPUs this process may use; a container's quota may make it a fraction."""
    gpus: int
    gpu_gib: float | None = None
    """Memory of one GPU; None when it is not known, as nobody asks a driver here."""


GPU_GIB = {
    "l4": 24, "a10": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "v100": 32, "a40": 48, "l40s": 48,
    "a100-40": 40, "a100": 80, "h100": 80, "h200": 141, "b200": 180,
}  # fmt: skip
"""Memory of one GPU by its name."""


def named_gpus(text: str) -> Machine:
    """A machine of which only the GPUs are known: `8xH100`, `H100`, or `2x48` for two of 48 GiB. Raises UserError."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9.-]+)", text.strip().lower().replace(" ", ""))
    count, name = (int(found[1] or 1), found[2]) if found else (0, "")
    gib = GPU_GIB.get(name, 0.0)
    with contextlib.suppress(ValueError):
        gib = float(name)
    if count < 1 or not 0.0 < gib < float("inf"):
        raise UserError(f"--gpus {text!r}: say how many of which, like 8xH100 ({', '.join(GPU_GIB)}), or of so many "
                        "GiB, like 8x80")  # fmt: skip
    endless = float("inf")
    return Machine(ram_gib=endless, shm_free_gib=endless, cpus=endless, gpus=count, gpu_gib=gib)


def machine() -> Machine:
    """Reads this machine. Without /dev/shm (not Linux) half the memory stands for it, as Ray would use /tmp."""
    ram = min(float(psutil.virtual_memory().total), _limit("memory.max"))
    shared = float(shutil.disk_usage(SHARED_MEMORY).free) if SHARED_MEMORY.is_dir() else ram / 2
    return Machine(ram_gib=ram / GIB, shm_free_gib=shared / GIB, cpus=_cpus(), gpus=len(gpu_devices()))


def gpu_devices() -> list[Path]:
    """The NVIDIA devices this container was given; no driver library is loaded to look."""
    return sorted(found for found in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", found.name))


def _cpus() -> float:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CONTROL_GROUP / "cpu.max").read_text().split()
        return min(float(allowed), float(quota) / float(period))
    except (OSError, ValueError):  # no such file, or "max"
        return float(allowed)


def _limit(name: str) -> float:
    """A limit of the container in bytes; infinite when there is none."""
    try:
        return float((CONTROL_GROUP / name).read_text())
    except (OSError, ValueError):
        return float("inf")
