"""Reaching a living run from another terminal: its Controller, by the address in its run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from deltal.errors import AddressError, DeadlineError, RunNotFoundError, one_line
from deltal.folder import RunFolder, lock_is_alive
from deltal.run.token import ADVICE, is_refused, use_token

RPC_SECONDS = 30.0


def is_alive(folder: RunFolder) -> bool:
    """Whether a process drives the run now."""
    return lock_is_alive(folder.read_json("lock.json"), folder.config().run.heartbeat_seconds)


@contextlib.contextmanager
def controller(folder: RunFolder) -> Iterator[Any]:
    """The Controller's handle. Raises RunNotFoundError when the run is not alive or cannot be reached from here."""
    state = (folder.read_json("summary.json") or {}).get("state", "never started")
    place = folder.read_json("cluster.json")
    if not is_alive(folder) or not place:
        raise RunNotFoundError(
            f"{folder.name} is not running (last state: {state}); `deltal resume {folder.name}` makes it go on"
        )
    # Ray reads this once, when it is first imported: the run's cluster asks for the user's token or it does not.
    if place.get("auth"):
        os.environ.setdefault("RAY_AUTH_MODE", place["auth"])
    use_token()
    import ray

    from deltal.run.driver import loopback_kept, require_answer

    try:
        require_answer(place["address"])
        with loopback_kept():
            ray.init(address=place["address"], namespace=place["namespace"], log_to_driver=False, logging_level="ERROR")
        yield ray.get_actor(place["controller"])
    except (AddressError, ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
        why = ADVICE if is_refused(str(error)) else one_line(error, line=0)
        raise RunNotFoundError(
            f"{folder.name} runs on the Ray cluster at {place['address']}, which does not answer from here: {why}"
        ) from None
    finally:
        ray.shutdown()


def call(folder: RunFolder, method: str, *arguments: Any) -> Any:
    """Call one method of a living run's Controller. Raises RunNotFoundError, DeadlineError, and what it raised."""
    with controller(folder) as handle:
        import ray

        from deltal.queues.object_queue import get_by

        try:
            answer = getattr(handle, method).remote(*arguments)
            return get_by(answer, seconds=RPC_SECONDS, what=f"{folder.name}'s Controller")
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.ActorDiedError:
            raise DeadlineError(f"{folder.name}'s Controller just died; its driver resumes it") from None
