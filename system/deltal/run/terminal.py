"""What `deltal train` shows while a run goes on, and at its end: a live display on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from deltal.folder import RunFolder, runs_root
from deltal.results.rows import stalled
from deltal.run.progress import before_after_table, render

Status = dict[str, Any]


@contextlib.contextmanager
def display(out: Console, folder: RunFolder, *, silent: bool) -> Iterator[Callable[[Status], None]]:
    """A function that shows a status: live on a terminal, a line for each step and message elsewhere."""
    if silent:
        yield lambda status: None
    elif out.is_terminal:
        with Live(console=out, refresh_per_second=2, transient=False) as live:
            yield lambda status: live.update(render(status, folder.rows("metrics.jsonl")))
    else:
        told: dict[str, Any] = {}
        yield lambda status: _tell(out, status, told)


def tell_outcome(out: Console, err: Console, folder: RunFolder, summary: dict[str, Any]) -> None:
    """The table before and after, where things are, and what to type next; one line when the run failed."""
    state, name = summary["state"], _typed(folder)
    if state == "failed":
        err.print(f"[bold red]deltal:[/] {escape(summary['error'])}", soft_wrap=True)
        return
    out.print(before_after_table(summary))
    told = stalled(folder.rows("metrics.jsonl"))
    if told:
        out.print(f"[yellow]note[/]     {escape(told)}", soft_wrap=True)
    if state == "stopped":
        out.print(f"stopped at step {summary['steps']}; go on with: deltal resume {name}")
        return
    out.print(f"report   {folder.path('report.html')}", soft_wrap=True)
    if folder.exists("export/config.json"):
        out.print(f"model    {folder.path('export')}", soft_wrap=True)
        out.print(f"next     deltal eval {name}   deltal audit {name}   deltal export {name} DIR", soft_wrap=True)
    else:
        out.print(f"next     deltal audit {name}   deltal export {name} DIR", soft_wrap=True)


def _typed(folder: RunFolder) -> str:
    """How to name the run in the next command: by its name where that is found, else by its path."""
    is_found = RunFolder(f"{runs_root()}/{folder.name}").url == folder.url
    return folder.name if is_found else shlex.quote(folder.url)


def _tell(out: Console, status: Status, told: dict[str, Any]) -> None:
    line = f"{status['state']}: {status['message']}" if status["message"] else status["state"]
    if line != told.get("line"):
        out.print(escape(line), soft_wrap=True)
    if status["step"] != told.get("step") and status["reward"] is not None:
        speed = status["tokens_per_second"]
        out.print(
            f"step {status['step']}/{status['steps']}  reward {status['reward']:.3f}  "
            f"accuracy {status['accuracy']:.3f}  length {status['response_length']:.1f}  "
            f"rollout {speed['rollout'] or 0:.0f} tok/s  "
            f"learner {speed['learner'] or 0:.0f} tok/s  staleness {status['staleness']['max']}",
            soft_wrap=True,
            highlight=False,
        )
    told |= {"line": line, "step": status["step"]}
