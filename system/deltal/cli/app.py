"""The command line's ground: the typer app, its consoles, and the arguments several verbs share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="deltal",
    help="Reinforcement learning with verifiable rewards on Ray, with ΔL-normalized updates.",
    epilog="A run: `deltal train configs/demo.yaml`. Beside it: `deltal status RUN`, `deltal scale RUN rollout=2`.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
out, err = Console(), Console(stderr=True)

Run = Annotated[str, typer.Argument(metavar="RUN", help="name of a run, or path of its folder")]
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, e.g. configs/demo.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.sub=value]…", help="values that replace the file's")
]
Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replaces a value of the settings; repeatable")
]
Json = Annotated[bool, typer.Option("--json", help="print facts as JSON")]
Address = Annotated[
    str | None, typer.Option(help="of a Ray cluster; without it a local Ray starts and ends with the run")
]
RUNNING, RESULT, LOOK = "Train and resume", "Watch and steer", "Results and checks"


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """A progress bar on stderr, so that --json stays clean."""
    from rich.progress import Progress

    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
