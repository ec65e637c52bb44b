"""What this machine has: memory, shared memory, CPUs, GPUs, as a process in this container may use them."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

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
