"""Verbs beside a run: status, scale, stop, pause, unpause."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from deltal.cli.app import RESULT, Json, Run, app, out
from deltal.errors import DeltalError, UserError


@app.command(rich_help_panel=RESULT)
def status(run: Run, as_json: Json = False) -> None:
    """What a run does now, or how it ended."""
    from deltal.folder import RunFolder
    from deltal.replay.journal import Journal
    from deltal.run.attach import is_alive
    from deltal.run.progress import render

    folder = RunFolder.find(run)
    summary = folder.read_json("summary.json") or {"name": folder.name, "state": "starting"}
    alive = is_alive(folder)
    if not alive and summary["state"] not in ("done", "stopped", "failed"):
        summary["state"] = "killed"
    summary["alive"] = alive
    if not alive:
        # The summary is as old as the run's last look; what was trained stands in the journal.
        done = Journal(folder.path("journal")).policy_version()
        if summary.get("policy_version") != done:
            summary["ledger"] = None
        # Nobody works for it, and its page is gone.
        summary |= {"workers": None, "pending": None, "queues": None, "address": None, "message": None}
        summary |= {"seconds_left": None, "step": done, "steps": done, "policy_version": done}
    if as_json:
        out.print_json(data=summary)
    else:
        shown = summary | {"step": summary.get("policy_version"), "steps": summary.get("steps_planned")}
        out.print(render(shown, folder.rows("metrics.jsonl")))


@app.command(rich_help_panel=RESULT)
def scale(
    run: Run, counts: Annotated[list[str], typer.Argument(metavar="rollout=N verify=N")], as_json: Json = False
) -> None:
    """Add or remove RolloutWorkers and Verifiers while the learner goes on."""
    from deltal.folder import RunFolder
    from deltal.run.attach import call

    wanted: dict[str, int] = {}
    for text in counts:
        role, _, number = text.partition("=")
        if role not in ("rollout", "verify") or not (number.isascii() and number.isdecimal()):
            raise UserError(f"{text!r} must look like rollout=2 or verify=1")
        wanted[role] = int(number)
    folder = RunFolder.find(run)
    have = call(folder, "scale", wanted)
    if as_json:
        out.print_json(data=have)
    else:
        out.print(f"{folder.name}: " + ", ".join(f"{role} = {count}" for role, count in have.items()))


@app.command(rich_help_panel=RESULT)
def stop(
    run: Run, seconds: Annotated[float, typer.Option(help="how long to wait for the run to leave")] = 600.0
) -> None:
    """Finish the step under way, checkpoint and leave."""
    from deltal.folder import RunFolder
    from deltal.run.attach import call, is_alive

    folder = RunFolder.find(run)
    call(folder, "stop")
    deadline = time.monotonic() + seconds
    while is_alive(folder):
        if time.monotonic() > deadline:
            raise DeltalError(f"{folder.name} did not leave within {seconds:.0f} s; it is still finishing its step")
        time.sleep(0.2)
    out.print(f"{folder.name} is stopped; `deltal resume {folder.name}` makes it go on")


@app.command(rich_help_panel=RESULT)
def pause(run: Run) -> None:
    """Issue no new groups; what is in flight goes on."""
    _pause(run, True)


@app.command(rich_help_panel=RESULT)
def unpause(run: Run) -> None:
    """Issue groups again."""
    _pause(run, False)


def _pause(run: str, paused: bool) -> None:
    from deltal.folder import RunFolder
    from deltal.run.attach import call

    folder = RunFolder.find(run)
    call(folder, "pause", paused)
    out.print(f"{folder.name} is {'paused' if paused else 'training again'}")
