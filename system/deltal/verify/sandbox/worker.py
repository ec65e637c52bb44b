"""One verifying process: `python -m deltal.verify.sandbox.worker ISOLATION MEMORY_MIB PARENT TIMEOUT`, by a pool.

It confines itself before it imports anything large, then answers requests until its pipe is closed. A task that
evaluates the response's text is judged in a fork of its own, so that nothing it patches reaches the next item.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from deltal.verify.sandbox import isolation
from deltal.verify.sandbox.messages import read_frame, write_frame


def main() -> None:
    """Confine, say ready, serve; ends with the pool's end of the pipe."""
    kind, memory, parent, timeout = sys.argv[1:5]
    isolation.confine(
        memory_mib=int(memory),
        namespaces=kind == "namespaces",
        parent=int(parent) if kind != "bwrap" else None,
    )
    from deltal.verify.registry import set_limits

    set_limits(timeout=float(timeout), memory_mib=int(memory))
    requests, replies = os.dup(0), os.dup(1)
    write_frame(replies, {"ready": True})
    silence = os.open(os.devnull, os.O_RDWR)
    # Nothing a verifier prints may stand between the messages.
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    while (request := read_frame(requests)) is not None:
        serve(request, replies, alone=kind != "none")


def serve(request: dict[str, Any], replies: int, *, alone: bool) -> None:
    """Judge one item and write its verdict. `alone`: no process but ours lives in this PID namespace."""
    from deltal.errors import DataError
    from deltal.verify.registry import find

    token = request["token"]
    try:
        verifier = find(request["task"])
    except DataError as error:
        write_frame(replies, {"error": str(error), "token": token})
        return
    verifier.prepare()
    write_frame(replies, {"begin": True, "token": token})
    if not verifier.evaluates_text:
        write_frame(replies, {**judged(request), "token": token})
        return
    code = isolation.fork_and_wait()
    if code is None:
        write_frame(replies, {**judged(request), "token": token})
        os._exit(0)
    if alone:
        isolation.end_other_processes()
    if code != 0:
        os._exit(1)


def judged(request: dict[str, Any]) -> dict[str, Any]:
    """The verdict as a message; a prompt that lacks what its task needs is an `error`."""
    from deltal.errors import DataError
    from deltal.verify.registry import judge

    if request["text"] is None:
        return _checked(request)
    try:
        verdict = judge(request["task"], request["answer"], request["fields"], request["text"])
    except DataError as error:
        return {"error": str(error)}
    return {
        "reward": verdict.reward,
        "correct": verdict.correct,
        "parsed": verdict.parsed,
        "reason": verdict.reason,
        "seconds": verdict.seconds,
    }


def _checked(request: dict[str, Any]) -> dict[str, Any]:
    """Whether a prompt can be judged, in the form of a verdict; whatever its gold answer provokes, it cannot be."""
    from deltal.errors import DataError
    from deltal.verify.registry import check_gold

    reason = ""
    try:
        check_gold(request["task"], request["answer"], request["fields"])
    except DataError as error:
        reason = str(error)
    except Exception as error:
        reason = f"the answer of a {request['task']} prompt cannot be read: {type(error).__name__}"
    return {"reward": 0.0, "correct": not reason, "parsed": None, "reason": reason, "seconds": 0.0}


if __name__ == "__main__":
    main()
