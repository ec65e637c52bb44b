"""The driver: the process of `deltal train`. It locks the run folder, starts or joins Ray, creates the Controller,
shows progress, and resumes the run when the Controller dies.

Without an address Ray is local and ends with the driver; its address stands in the run folder, so that `status`,
`scale` and `stop` work from another terminal. A submitted job runs the same code with `--address auto`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import ray

from deltal.config import RunConfig
from deltal.errors import FULL, ActorLostError, AddressError, DeadlineError, FolderError, one_line
from deltal.folder import FolderLock, RunFolder
from deltal.plan.plan import Plan
from deltal.run.controller import Controller
from deltal.run.token import ADVICE, is_refused

NAMESPACE = "deltal"
GIB = 2**30
LOST = (
    ray.exceptions.ActorDiedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)  # fmt: skip
"""How Ray tells that the Controller is gone, whatever it died of."""
FORGIVEN_SECONDS = 3600.0
"""A Controller that lived for so long has the deaths before it forgotten."""
UNREACHABLE_SECONDS = 600.0
"""Without any answer of the Controller, until the driver gives up."""
MEMORY_SECONDS = 30.0
"""Between two looks at the memory of the whole process tree."""
Status = dict[str, Any]


def drive(
    config: RunConfig, folder: RunFolder, plan: Plan, *, address: str | None, show: Callable[[Status], None]
) -> dict[str, Any]:
    """Run until done, stopped or failed; returns the summary. `show` gets the status about once a second.

    Raises RunInUseError, AddressError, and ActorLostError when the Controller died more often than allowed.
    """
    token = os.environ.get("DELTAL_TOKEN") or None
    with FolderLock(folder, beat=config.run.heartbeat_seconds, on_loss=_lost_folder), cluster(address, plan) as where:
        place = {"address": where, "namespace": NAMESPACE, "controller": actor_name(folder)}
        folder.write_json("cluster.json", place | {"auth": os.environ.get("RAY_AUTH_MODE")})
        deaths = 0
        while True:
            began = time.monotonic()
            try:
                return _live(config, folder, token, show, is_local=address is None)
            except LOST as error:
                deaths = 1 if time.monotonic() - began > FORGIVEN_SECONDS else deaths + 1
                if deaths > config.run.max_resumes:
                    raise ActorLostError(
                        f"the Controller died {deaths} times; last: {one_line(error, line=0)}"
                    ) from None
                print(f"deltal: the Controller died; resuming the run ({one_line(error, line=0)})", file=sys.stderr)  # noqa: T201


def tree_gib() -> float:
    """Memory of this process and all below it in GiB: proportional set size, in which shared memory counts once."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / GIB


def actor_name(folder: RunFolder) -> str:
    """Ray name of a run's Controller."""
    return f"controller/{folder.name}"


@contextlib.contextmanager
def cluster(address: str | None, plan: Plan) -> Iterator[str]:
    """A local Ray, or a connection to the one at `address`; yields its address."""
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address is None:
            with loopback_kept():
                # `local`, or Ray would join any cluster that runs on this machine.
                context = ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=plan.object_store_bytes,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
        else:
            require_answer(address)
            context = ray.init(address=address, **quiet)
    except AddressError:
        raise
    except Exception as error:  # Ray raises many kinds, plain Exception among them, for what is wrong with a machine
        raise AddressError(_no_ray(address, error)) from None
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()


def _no_ray(address: str | None, error: Exception) -> str:
    """Why there is no Ray, and what to do."""
    why = one_line(error, line=0)
    if address is not None and (is_refused(str(error)) or "Failed to connect" in why):
        # Something listens there, or it would not have come to this; Ray names a refused token in its log only.
        return f"the Ray cluster at {address} does not let this user in: {ADVICE}"
    if address is not None:
        return f"no Ray cluster answers at {address}: {why}"
    advice = "`deltal doctor` looks at this machine"
    if "AF_UNIX" in why:
        advice = "the folder for temporary files has too long a name: set RAY_TMPDIR=/tmp"
    elif "timed out" in why or isinstance(error, TimeoutError):
        advice = "the machine may be overloaded: try again, or start Ray by `ray start --head` and use --address"
    elif isinstance(error, OSError) and error.errno in FULL:
        advice = "the disk for temporary files is full: free some space, or set RAY_TMPDIR to a larger one"
    return f"a local Ray could not be started: {why}; {advice}"


@contextlib.contextmanager
def loopback_kept() -> Iterator[None]:
    """Make a local Ray listen on loopback only, and be reached there.

    Ray does so for a node address of 127.0.0.1, but replaces that address by the machine's first; there is no setting
    for it. Where a later Ray has no such function any more, its own token authentication remains.
    """
    from ray._private import node, services

    places = [module for module in (node, services) if hasattr(module, "resolve_ip_for_localhost")]
    kept = [(module, module.resolve_ip_for_localhost) for module in places]
    for module in places:
        module.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        for module, original in kept:
            module.resolve_ip_for_localhost = original


def require_answer(address: str) -> None:
    """Raises AddressError when nothing listens at `host:port`: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto`: Ray looks the address up.
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError as error:
        raise AddressError(f"no Ray cluster answers at {address}: {error.strerror or error}") from None


def _live(
    config: RunConfig, folder: RunFolder, token: str | None, show: Callable[[Status], None], *, is_local: bool
) -> dict[str, Any]:
    """One life of the Controller. Raises ActorDiedError when it dies, DeadlineError when it cannot be reached."""
    peak, looked, reached = 0.0, 0.0, time.monotonic()
    controller = _create(config, folder, token)
    finished = controller.run.remote()
    with _stop_on_signal(controller):
        while True:
            done, _ = ray.wait([finished], timeout=1.0)
            if time.monotonic() - reached > UNREACHABLE_SECONDS:
                raise DeadlineError(
                    f"the Controller could not be reached for {UNREACHABLE_SECONDS:.0f} s; when its node is back, or "
                    f"gone for good, `deltal resume {folder.name}` goes on"
                )
            # Walking the page tables of large processes costs them time, so it is done rarely.
            if is_local and (done or time.monotonic() - looked > MEMORY_SECONDS):
                peak, looked = max(peak, tree_gib()), time.monotonic()
            if done:
                try:
                    summary: dict[str, Any] = ray.get(finished)
                except ray.exceptions.ActorUnavailableError:
                    # A network that is away for a moment, or a node on its way out: the next answer will tell.
                    time.sleep(1.0)
                    finished = controller.run.remote()
                    continue
                if is_local:
                    summary["peak_memory_gib"] = peak
                    with contextlib.suppress(FolderError):
                        folder.write_json("summary.json", summary)
                return summary
            with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                show(ray.get(controller.status.remote(), timeout=5.0))
                reached = time.monotonic()


def _create(config: RunConfig, folder: RunFolder, token: str | None) -> Any:
    """The named Controller; a dead one's name is free within seconds."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            actor = ray.remote(Controller).options(name=actor_name(folder), num_cpus=0, max_concurrency=1000)
            return actor.remote(config, folder.url, token)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise DeadlineError(f"waited 60 s for the name {actor_name(folder)}: {error}") from None
            time.sleep(0.5)


@contextlib.contextmanager
def _stop_on_signal(controller: Any) -> Iterator[None]:
    """Ctrl-C (or a job's SIGTERM) stops the run in order; a second one leaves at once."""
    seen = 0

    def handle(number: int, _: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            print("deltal: leaving at once; `deltal resume` goes on from the last checkpoint", file=sys.stderr)  # noqa: T201
            sys.stderr.flush()
            # Ray's processes end with this one.
            os._exit(130)
        print("deltal: stopping after this step; once more to leave at once", file=sys.stderr)  # noqa: T201
        controller.stop.remote()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _lost_folder() -> None:
    print("deltal: another process took the run folder; this one leaves", file=sys.stderr)  # noqa: T201
    os._exit(3)
