"""Starting real runs from tests: the `deltal` command in a process of its own, in the environment a user has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from deltal.folder import RunFolder

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.yaml")


NAMES = {
    "ObjectQueue": ("prompt", "rollout"), "ReplayActor": ("replay",), "PolicyStore": ("policy",),
    "RolloutWorker": ("rollout-0", "rollout-1"), "Verifier": ("verify-0", "verify-1"),
    "LearnerRank": ("learner-0", "learner-1"),
}  # fmt: skip
"""Class of an actor, after which Ray names its process, to the names a run gives to the first of them."""


def bare(**more: str) -> dict[str, str]:
    """What a fresh shell has, wherever the tests run: no setting of the suite's own may hide what users meet."""
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"COLUMNS": "200"} | more


def deltal(*arguments: str, timeout: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "deltal", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=bare(**environment),
        check=False,
    )


class LiveRun:
    """A `deltal train` or `deltal resume` under way. Use it as a context manager: nothing outlives it."""

    def __init__(
        self, root: Path, name: str, *overrides: str, verb: str = "train", config: str = TINY,
        begin_from: str | None = None,
    ) -> None:  # fmt: skip
        self.root, self.name = root, name
        self.folder = RunFolder(str(root / name))
        self.log = root / f"{name}.{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "deltal", verb]
        command += [config, *overrides, "--run", name] if verb == "train" else [str(root / name), *overrides]
        command += ["--from", begin_from] if begin_from else []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=bare(DELTAL_RUNS=str(root)),
                start_new_session=True,
            )

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_everything()

    def end_everything(self) -> None:
        """kill -9 of the driver and all below it."""
        tree = []
        if self.process.poll() is None:
            driver = psutil.Process(self.process.pid)
            tree = [driver, *driver.children(recursive=True)]
        for process in tree:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait(30)
        psutil.wait_procs(tree, timeout=30)

    def text(self) -> str:
        """What the command printed so far."""
        return self.log.read_text()

    def until(self, holds: Callable[[], Any], what: str, timeout: float = 180.0) -> Any:
        """Wait until `holds()` is true; fails with the log when it never is, or when the command ended before."""
        deadline = time.monotonic() + timeout
        while True:
            value = holds()
            if value:
                return value
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended with {self.process.returncode} before {what}:\n{self.text()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout:.0f} s for {what}:\n{self.text()}\n{self.summary()}")
            time.sleep(0.2)

    def until_step(self, step: int, timeout: float = 180.0) -> None:
        """Wait until so many steps are reported."""
        self.until(lambda: any(row["step"] >= step for row in self.rows()), f"step {step}", timeout)

    def end(self, timeout: float = 300.0) -> dict[str, Any]:
        """Wait for the command's end; returns the summary. Fails when the exit code is not 0."""
        code = self.process.wait(timeout)
        assert code == 0, f"exit code {code}:\n{self.text()}\n{self.actor_logs()}"
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """summary.json, empty before it exists."""
        return self.folder.read_json("summary.json") or {}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, redone ones included."""
        return self.folder.rows("metrics.jsonl")

    def pids(self) -> dict[str, int]:
        """Process ids of the run's actors by name, as an operator would find them; those that are up."""
        found: dict[str, int] = {}
        tree = psutil.Process(self.process.pid).children(recursive=True)
        for process in sorted(tree, key=lambda process: process.pid):
            title = " ".join(process.cmdline())
            kind = next((kind for kind in NAMES if title.startswith(f"ray::{kind}")), None)
            free = [name for name in NAMES.get(kind or "", ()) if name not in found]
            found |= {free[0]: process.pid} if free else {}
        return found

    def worker_is_loaded(self, name: str) -> bool:
        """Whether a RolloutWorker has weights, by the metrics Prometheus would read."""
        targets = json.loads(urllib.request.urlopen(self.summary()["address"] + "/sd", timeout=10).read())
        for target in targets:
            if target["labels"]["actor"] == name:
                text = urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=10).read().decode()
                return any(line.startswith("deltal_rollout_load_seconds_count") and not line.endswith(" 0.0")
                           for line in text.splitlines())  # fmt: skip
        return False

    def listening(self) -> list[str]:
        """Addresses on which the driver and all below it listen."""
        tree = {self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children(recursive=True))}
        found = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in tree]
        return [connection.laddr.ip.removeprefix("::ffff:") for connection in found]

    def controller_pid(self) -> int:
        """The Controller's process, which Ray names after its class and method."""
        driver = psutil.Process(self.process.pid)
        return next(p.pid for p in driver.children(recursive=True) if "Controller" in " ".join(p.cmdline()))

    def audit(self) -> dict[str, Any]:
        """`deltal audit --json`; fails when the ledger does not hold."""
        result = deltal("audit", str(self.root / self.name), "--json")
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout)  # type: ignore[no-any-return]

    def actor_logs(self) -> str:
        """Last lines of the actors' error logs, for a failing test."""
        logs = sorted(Path("/tmp/ray/session_latest/logs").glob("worker-*.err"), key=lambda p: p.stat().st_mtime)
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs[-4:])
