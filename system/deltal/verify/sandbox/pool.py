"""Starts and watches the processes that touch hostile text; the only file of the package that starts any for it.

`SandboxPool` keeps verifying processes (`worker.py`). The life of one: `starting -> idle -> given -> judging -> idle`;
a process over its time or dead is ended with everything it started, its item gets a verdict, and another takes its
place. `run_program` runs one program in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from deltal.errors import DataError, DeadlineError, ResourceError
from deltal.types import Prompt, Verdict
from deltal.verify.sandbox.isolation import bubblewrap
from deltal.verify.sandbox.messages import Call, FrameReader, to_frame, verdict_of

Outcome = Literal["passed", "failed", "timeout", "no sandbox"]
Isolation = Literal["bwrap", "namespaces", "none"]

START_SECONDS = 120.0
"""A process that has not started, or not imported what a task needs, by then has failed."""
TRIES = 3
"""How often an item is given to a process before the death of each counts as its own; likewise failed starts."""

PACKAGE_ROOT = Path(__file__).parents[3]
ISOLATION_SCRIPT = Path(__file__).with_name("isolation.py")


# --- starting a process --------------------------------------------------------------------------


@functools.cache
def isolation_kind() -> Isolation:
    """How processes can be isolated on this machine: by bubblewrap, by own namespaces, or not at all."""
    kinds: tuple[Isolation, ...] = ("bwrap", "namespaces") if shutil.which("bwrap") else ("namespaces",)
    for kind in kinds:
        if _run_isolated(kind, ["pass"], timeout=START_SECONDS, memory_mib=1024) == "passed":
            return kind
    return "none"


def run_program(parts: Sequence[str], *, timeout: float, memory_mib: int) -> Outcome:
    """Execute `parts`, one after the other in one module, in an isolated process of its own.

    `passed`: all parts ran to their end; `failed`: one raised, or the process ended before; `timeout`: `timeout`
    seconds were over; `no sandbox`: nothing was run, because this machine offers no isolation.
    """
    kind = isolation_kind()
    if kind == "none":
        return "no sandbox"
    return _run_isolated(kind, parts, timeout=timeout, memory_mib=memory_mib)


def _run_isolated(kind: Isolation, parts: Sequence[str], *, timeout: float, memory_mib: int) -> Outcome:
    secret = secrets.token_hex(16)
    own = "wrapped" if kind == "bwrap" else "namespaces"
    arguments = [sys.executable, "-I", str(ISOLATION_SCRIPT), own, str(memory_mib), str(os.getpid())]
    wrapper = bubblewrap() if kind == "bwrap" else []
    process = _start([*wrapper, *arguments], stderr=subprocess.DEVNULL)
    try:
        return _outcome(process, secret, json.dumps([secret, *parts]).encode(), time.monotonic() + timeout)
    finally:
        _end(process)


def _outcome(process: subprocess.Popen[bytes], secret: str, program: bytes, deadline: float) -> Outcome:
    """What comes of a program: only the secret, and nothing more, means that it ran to its end."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(program)
        process.stdin.close()
    printed = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        # Not communicate(): a program may print without end, and all of it would be kept.
        while len(printed) <= len(secret):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return "timeout"
            received = os.read(process.stdout.fileno(), 64)
            if not received:
                break
            printed += received
    return "passed" if printed == secret.encode() else "failed"


def _start(command: list[str], *, stderr: int) -> subprocess.Popen[bytes]:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(PACKAGE_ROOT),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "HOME": "/tmp",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        cwd="/",
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# --- the pool ------------------------------------------------------------------------------------


class _Worker:
    """One verifying process as its pool sees it."""

    def __init__(self, timeout: float, memory_mib: int) -> None:
        kind = isolation_kind()
        arguments = [
            sys.executable,
            "-P",
            "-m",
            "deltal.verify.sandbox.worker",
            kind,
            str(memory_mib),
            str(os.getpid()),
        ]
        wrapper = bubblewrap() if kind == "bwrap" else []
        self.process = _start([*wrapper, *arguments, str(timeout)], stderr=subprocess.PIPE)
        self.state: Literal["starting", "idle", "given", "judging"] = "starting"
        self.deadline = time.monotonic() + START_SECONDS
        self.item: int | None = None
        self.token = ""
        self._reader = FrameReader()

    def give(self, item: int, request: Mapping[str, Any]) -> bool:
        """Hand an item over; False when the process is gone."""
        self.token = secrets.token_hex(8)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(to_frame({**request, "token": self.token}))
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        self.state, self.item, self.deadline = "given", item, time.monotonic() + START_SECONDS
        return True

    def messages(self) -> list[dict[str, Any]] | None:
        """What it wrote, read without waiting once the pipe is readable; None when it is gone or talks nonsense."""
        assert self.process.stdout is not None
        received = os.read(self.process.stdout.fileno(), 1 << 16)
        if not received:
            return None
        try:
            return self._reader.feed(received)
        except ValueError:
            return None


class SandboxPool:
    """Verifying processes that judge items in parallel, each item within its time, none lost, order kept.

    For one caller at a time (others wait). Processes start with the first item and are kept between calls.
    """

    def __init__(self, *, processes: int, timeout: float, memory_mib: int) -> None:
        """`processes`: how many judge at once; `timeout`: seconds a verdict may take; `memory_mib`: MiB of each."""
        self._most, self._timeout, self._memory_mib = processes, timeout, memory_mib
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        # A death signal is tied to the thread that starts a process: this one lives as long as the pool.
        self._launcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deltal-sandbox")

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. The pool cannot be used afterwards."""
        with self._lock:
            for worker in list(self._workers):
                self._remove(worker)
            self._launcher.shutdown()

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict for each (prompt, text of the response), in their order.

        An item over its time gets reward 0 and reason `timeout`, one that ends its process `crash`. Raises DataError
        for an unknown task or a prompt that lacks what its task needs, ResourceError when no process can be started,
        DeadlineError when one does not come up in 120 s.
        """
        return self._settled(Call(items))

    def check_many(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """For each prompt why no response to it could be judged, or None. Raises as `verify_many`, but no DataError."""
        verdicts = self._settled(Call([(prompt, None) for prompt in prompts]))
        odd = {
            "timeout": f"reading the answer takes more than {self._timeout:g} s",
            "crash": "the answer ends its reader",
        }
        return [None if verdict.correct else odd.get(verdict.reason, verdict.reason) for verdict in verdicts]

    def _settled(self, call: Call) -> list[Verdict]:
        with self._lock:
            try:
                while call.unfinished:
                    self._hand_out(call)
                    self._wait_for_news(call)
            except BaseException:
                # Their answers would be taken for the next call's.
                for worker in [worker for worker in self._workers if worker.item is not None]:
                    self._remove(worker)
                raise
            return [verdict for verdict in call.verdicts if verdict is not None]

    def _hand_out(self, call: Call) -> None:
        while len(self._workers) < min(self._most, call.unfinished):
            self._workers.append(self._launcher.submit(_Worker, self._timeout, self._memory_mib).result())
        for worker in [worker for worker in self._workers if worker.state == "idle"]:
            if call.waiting and not worker.give(call.waiting[0], call.request(call.waiting[0])):
                self._remove(worker)
            elif call.waiting:
                call.waiting.popleft()

    def _wait_for_news(self, call: Call) -> None:
        active = [worker for worker in self._workers if worker.state != "idle"]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            patience = min((worker.deadline for worker in active), default=0.0) - time.monotonic()
            for key, _ in selector.select(max(0.0, patience)):
                self._listen(key.data, call)
        now = time.monotonic()
        for worker in [worker for worker in active if worker in self._workers and worker.state != "idle"]:
            if now >= worker.deadline:
                self._give_up(worker, call, "timeout")

    def _listen(self, worker: _Worker, call: Call) -> None:
        messages = worker.messages()
        for message in messages or []:
            if worker.state == "starting" and message.get("ready"):
                worker.state, worker.deadline = "idle", float("inf")
                self._failed_starts = 0
            elif message.get("token") != worker.token or worker.item is None:
                messages = None  # not from our code: whoever wrote this is not to be believed again
                break
            elif message.get("begin"):
                worker.state, worker.deadline = "judging", time.monotonic() + self._timeout
            elif "error" in message:
                raise DataError(f"prompt {call.items[worker.item][0].id!r}: {message['error']}")
            else:
                call.finish(worker.item, verdict_of(message))
                worker.state, worker.item, worker.deadline = "idle", None, float("inf")
        if messages is None:
            self._give_up(worker, call, "crash")

    def _give_up(self, worker: _Worker, call: Call, reason: str) -> None:
        """End a process that died or is over its time, and settle its item."""
        if worker.state == "starting":
            if reason == "timeout":
                raise DeadlineError(f"a verifying process did not start in {START_SECONDS:.0f} s")
            last_words = self._bury(worker)
            self._failed_starts += 1
            if self._failed_starts >= TRIES:
                raise ResourceError(f"a verifying process cannot start: {last_words}")
            return
        item, begun = worker.item, worker.state == "judging"
        self._remove(worker)
        if item is None:
            return
        if begun or call.tries[item] + 1 >= TRIES:
            call.finish(item, Verdict(reward=0.0, correct=False, parsed=None, reason=reason, seconds=self._timeout))
        else:
            call.tries[item] += 1
            call.waiting.appendleft(item)

    def _bury(self, worker: _Worker) -> str:
        """Take away a process that died while starting; the last line of its errors."""
        process = worker.process
        assert process.stderr is not None
        process.wait()
        lines = process.stderr.read().decode(errors="replace").strip().splitlines()
        self._remove(worker)
        return lines[-1] if lines else f"exit code {process.returncode}"

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end(worker.process)
