"""What a process does to itself before it touches hostile text: limits, namespaces, no way to write.

    sandbox.py --starts--> A: own session, dies with its parent
                           └─ B: first process of a PID namespace; no network, read-only files, no capabilities
                              └─ C: the hostile program (`run` below) or a verdict that evaluates text (`worker.py`)

Whatever C does to itself (daemonise, clear its death signal), killing A ends B, and with B its whole namespace.
This file is also run as a script, so it imports the standard library alone. Linux only; elsewhere nothing is isolated.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID_NODEV, MS_REC, MS_PRIVATE = 0x2 | 0x4, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
CAPABILITIES_V3 = 0x20080522
LAST_CAPABILITY = 63

FILE_BYTES = 64 * 2**20
"""Largest file, and size of the private temporary folder."""
OPEN_FILES = 256
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
INNER_ID = 1000
"""User and group inside: not 0, which only a process with privileges could map once more for a program inside."""

_is_sandboxed = False


def is_sandboxed() -> bool:
    """Whether this process confined itself: the only place where text of a model may be evaluated."""
    return _is_sandboxed


def confine(*, memory_mib: int, namespaces: bool, parent: int | None) -> None:
    """Confine this process for good. With `namespaces` it goes on as a child of the caller's process.

    `memory_mib`: address space in MiB. `parent`: pid that started us, to notice that it died before we could ask for a
    death signal; None when a wrapper stands between. Raises OSError when a namespace or mount is refused.
    """
    global _is_sandboxed
    die_with_parent(parent)
    if namespaces:
        _enter_namespaces()
    limit = memory_mib * 2**20
    for kind, most in (
        (resource.RLIMIT_AS, limit),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))
    _drop_capabilities()
    # Its memory is closed to the processes it starts, so that a verdict cannot be forged by writing into it.
    _prctl(PR_SET_DUMPABLE, 0)
    _is_sandboxed = True


def die_with_parent(parent: int | None) -> None:
    """SIGKILL for this process when the thread that started it ends; at once if `parent` is already gone."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def fork_and_wait() -> int | None:
    """Fork. In the child: None, and it dies with this process. Here: the child's exit code once it has ended."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        # In a new PID namespace the parent is invisible (0), so it cannot be compared.
        die_with_parent(None if os.getpid() == 1 else parent)
        return None
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def end_other_processes() -> None:
    """SIGKILL to every other process of this PID namespace. Only to be called inside one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def bubblewrap() -> list[str]:
    """Command before the interpreter: bubblewrap with read-only files, no network and its own process ids."""
    hidden = [path for path in TEMPORARY if Path(path).is_dir() and not needed_under(path)]
    covers = [word for path in hidden for word in ("--tmpfs", path)]
    command = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    return [*command, *covers, "--unshare-all", "--die-with-parent", "--"]


def needed_under(folder: str) -> bool:
    """Whether covering `folder` would hide the interpreter or a library from this process."""
    needed = [sys.prefix, sys.base_prefix, sys.executable, __file__, *sys.path]
    return any(Path(place).is_relative_to(folder) for place in needed if place)


def _enter_namespaces() -> None:
    """User, mount, PID, network, IPC and host name of its own; goes on in a child that is the first process inside."""
    user, group = os.getuid(), os.getgid()
    _check(
        _libc().unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS),
        "unshare",
    )
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{INNER_ID} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{INNER_ID} {group} 1")
    code = fork_and_wait()
    if code is not None:
        os._exit(code if code >= 0 else 128 - code)
    _check(_mount("none", "/", None, MS_REC | MS_PRIVATE, None), "making mounts private")
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(
        _libc().syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes)),
        "making files read-only",
    )
    # The old /proc shows processes outside, though they cannot be touched: some containers allow no new one.
    _mount("proc", "/proc", "proc", MS_NOSUID_NODEV, None)
    own = next(
        (folder for folder in TEMPORARY if Path(folder).is_dir() and not needed_under(folder)),
        None,
    )
    if own is not None and _mount("tmpfs", own, "tmpfs", MS_NOSUID_NODEV, f"size={FILE_BYTES}") == 0:
        os.environ["TMPDIR"] = os.environ["HOME"] = own
        os.chdir(own)


def _drop_capabilities() -> None:
    """For good: neither this process nor anything it executes can mount, trace or gain a privilege."""
    for capability in range(LAST_CAPABILITY + 1):
        _libc().prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused without privilege, and then not needed
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    header, nothing = struct.pack("Ii", CAPABILITIES_V3, 0), bytes(24)
    _check(_libc().capset(header, nothing), "dropping capabilities")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, value, 0, 0, 0), f"prctl {option}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> int:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    result: int = _libc().mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    return result


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def run_program() -> NoReturn:
    """Script: read `[secret, part, …]` as JSON from stdin, execute the parts in one module, then print the secret.

    The parent believes only the secret: a program that exits early, with whatever code, has not passed.
    """
    answer = os.dup(1)
    secret, *parts = json.loads(sys.stdin.buffer.read())
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    code = fork_and_wait()
    if code is not None:
        os._exit(0 if code == 0 else 1)
    # A module of its own: dataclasses and pickle look their module up by name.
    module = sys.modules["program"] = types.ModuleType("program")
    for part in parts:
        exec(compile(part, "<program>", "exec"), module.__dict__)
    os.write(answer, secret.encode())
    os._exit(0)


def main() -> None:
    """`isolation.py (namespaces|wrapped) MEMORY_MIB PARENT`, as `sandbox.py` calls it."""
    kind, memory, parent = sys.argv[1:4]
    try:
        confine(
            memory_mib=int(memory),
            namespaces=kind == "namespaces",
            parent=int(parent) if kind == "namespaces" else None,
        )
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(3)
    run_program()


if __name__ == "__main__":
    main()
