"""The command line: one thin function a verb. Exit codes: 0 done, 1 the answer is no, 2 your mistake, 3 our fault."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltal.config import RunConfig
from deltal.config_file import explained, load_config
from deltal.errors import ConfigError, DeltalError, UserError

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
Json = Annotated[bool, typer.Option("--json", help="print facts as JSON")]
Address = Annotated[
    str | None, typer.Option(help="of a Ray cluster; without it a local Ray starts and ends with the run")
]
RUNNING, RESULT, LOOK = "Train and resume", "Watch and steer", "Results and checks"


def main() -> None:
    """Entry point: errors of deltal become one line and their exit code."""
    try:
        app(standalone_mode=False)
    except typer._click.exceptions.ClickException as error:
        error.show()
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except DeltalError as error:
        err.print(f"[bold red]deltal:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)


@app.command(rich_help_panel=RUNNING)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option(help="name of the run's folder")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="validate, print actors and resources, start nothing")
    ] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Train a model: [bold]deltal train configs/demo.yaml learner.learning_rate=1e-5[/]."""
    from deltal.run.folder import RunFolder, runs_root
    from deltal.run.plan import plan

    settings = _named(load_config(config, overrides or []), run or None, Path(config).stem)
    if dry_run:
        planned = plan(settings)
        out.print(planned.table())
        out.print(f"{config} is valid; nothing was started")
        return
    folder = RunFolder(f"{runs_root(settings)}/{settings.run.name}")
    if folder.exists("config.yaml"):
        _refuse_if_alive(folder)
        raise UserError(
            f"{folder.url} holds a run already: `deltal resume {folder.name}`, or choose another --run name"
        )
    _check(settings, local=address is None)
    folder.make()
    folder.write_config(settings)
    _drive(settings, folder, address, as_json)


@app.command(rich_help_panel=RUNNING)
def resume(run: Run, address: Address = None, as_json: Json = False) -> None:
    """Go on with a stopped or killed run: nothing is lost, nothing trained twice."""
    from deltal.run.folder import RunFolder

    folder = RunFolder.find(run)
    _refuse_if_alive(folder)
    if (folder.read_json("summary.json") or {}).get("state") == "done":
        raise UserError(f"{folder.name} is done; there is nothing to resume")
    settings = folder.config()
    _check(settings, local=address is None)
    _drive(settings, folder, address, as_json)


@app.command(rich_help_panel=RUNNING)
def submit(
    config: ConfigPath,
    address: Annotated[str, typer.Option(help="the cluster's dashboard, e.g. http://127.0.0.1:8265")],
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option(help="name of the run's folder")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="show the job's log and wait for its end")] = False,
    as_json: Json = False,
) -> None:
    """Submit a run as a Ray job, so that it outlives this terminal."""
    import os

    from deltal.run.folder import runs_root
    from deltal.run.submit import follow
    from deltal.run.submit import submit as submit_job

    settings = _named(load_config(config, overrides or []), run, Path(config).stem)
    root = runs_root(settings)
    environment = {"DELTAL_RUNS": root if "://" in root else str(Path(root).absolute())}
    environment |= {name: os.environ[name] for name in ("DELTAL_DATA", "DELTAL_TOKEN") if name in os.environ}
    name = str(settings.run.name)
    client, job = submit_job(settings, address=address, run=name, environment=environment)
    if as_json:
        out.print_json(data={"job": job, "run": name, "address": address})
    else:
        out.print(f"job {job} trains run {name}; `deltal status {name}` where the run folder is, "
                  f"`ray job logs {job} --address {address}` anywhere")  # fmt: skip
    if wait:
        state = follow(client, job, lambda text: out.print(text, markup=False, highlight=False, end=""))
        if state != "SUCCEEDED":
            raise typer.Exit(1)


@app.command(rich_help_panel=RESULT)
def status(run: Run, as_json: Json = False) -> None:
    """What a run does now, or how it ended."""
    from deltal.run.attach import is_alive
    from deltal.run.folder import RunFolder
    from deltal.run.progress import render

    folder = RunFolder.find(run)
    summary = folder.read_json("summary.json") or {"name": folder.name, "state": "starting"}
    alive = is_alive(folder)
    if not alive and summary["state"] not in ("done", "stopped", "failed"):
        summary["state"] = "killed"
    summary["alive"] = alive
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
    from deltal.run.attach import call
    from deltal.run.folder import RunFolder

    wanted: dict[str, int] = {}
    for text in counts:
        role, _, number = text.partition("=")
        if role not in ("rollout", "verify") or not number.isdigit():
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
    from deltal.run.attach import call, is_alive
    from deltal.run.folder import RunFolder

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


@app.command(rich_help_panel=LOOK, name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="a run (its export), a model folder or hub name")],
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="a .jsonl or .parquet file; default: the config's")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="chat, sampling and verification settings; default: the run's")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="most prompts used")] = None,
    responses: Annotated[int, typer.Option(help="k of avg@k")] = 1,
    as_json: Json = False,
) -> None:
    """Measure a model's accuracy on held-out prompts with vLLM, without Ray."""
    from deltal.data.datasets import load_prompts
    from deltal.run.offline import data_source, model_and_settings
    from deltal.run.offline import evaluate as measure

    folder, settings = model_and_settings(model, config)
    source = data_source(data, settings)
    chosen = load_prompts(source)[: prompts or settings.evaluation.prompts]
    with _quiet_progress("sampling") as advance:
        row = measure(folder, chosen, settings, responses=responses, advance=advance)
    if as_json:
        out.print_json(data=row)
    else:
        low, high = row["interval_95"]
        out.print(f"accuracy {row['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}) on {row['prompts']} prompts, "
                  f"{row['overlong']} overlong, mean length {row['response_length'] or 0:.1f} tokens")  # fmt: skip


@app.command(rich_help_panel=LOOK)
def export(
    run: Run,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="new model folder")],
    step: Annotated[int | None, typer.Option(help="policy version; default: the newest checkpoint")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder for transformers and vLLM."""
    from deltal.learner.export import export as write
    from deltal.run.folder import RunFolder

    source = RunFolder.find(run)
    facts = {f"held-out accuracy, {row['label']}": row["accuracy"] for row in source.rows("evaluations.jsonl")}
    version = write(source.path("checkpoints"), folder, config=source.config(), version=step, facts=facts)
    out.print(f"policy version {version} of {source.name} is in {folder}")


@app.command(rich_help_panel=LOOK)
def audit(run: Run, as_json: Json = False) -> None:
    """Prove from the run folder alone that no group was lost or trained twice."""
    from dataclasses import asdict

    from deltal.replay.journal import Journal
    from deltal.replay.ledger import audit as prove
    from deltal.run.folder import RunFolder

    folder = RunFolder.find(run)
    result = prove(Journal(folder.path("journal")).read(), max_staleness=folder.config().replay.max_staleness)
    if as_json:
        out.print_json(data=asdict(result))
    else:
        counts = result.counts
        out.print(f"{folder.name}: {result.batches} batches, policy version {result.policy_version}, "
                  f"{result.skipped} skipped, staleness at most {result.staleness_max}")  # fmt: skip
        out.print("issued {issued} = consumed {consumed} + filtered {filtered} + evicted {evicted} "
                  "+ in flight {in_flight}".format(**counts))  # fmt: skip
        for violation in result.violations:
            err.print(f"[red]✗[/] {escape(violation)}")
        out.print("[red]the ledger does not hold[/]" if result.violations else "[green]the ledger holds[/]")
    if result.violations:
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def doctor(address: Address = None, as_json: Json = False) -> None:
    """Check this machine and say what to do."""
    from dataclasses import asdict

    from deltal.run.doctor import examine

    findings = examine(address)
    if as_json:
        out.print_json(data=[asdict(finding) for finding in findings])
    else:
        table = Table(show_header=False, box=None)
        for finding in findings:
            mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]–[/]"}[finding.ok]
            table.add_row(mark, escape(finding.name), escape(finding.found), escape(finding.advice))
        out.print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def config(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the full resolved configuration, with a line on each setting."""
    settings = load_config(config, overrides or [])
    if as_json:
        out.print_json(data=settings.model_dump(mode="json"))
        return
    for key, value, meaning in explained(settings):
        out.print(
            f"[bold]{escape(key)}[/] = {escape(json.dumps(value, ensure_ascii=False, default=str))}", soft_wrap=True
        )
        out.print(f"    [dim]{escape(meaning)}[/]", soft_wrap=True)


# --- shared by verbs ------------------------------------------------------------------------------


def _named(settings: RunConfig, run: str | None, stem: str) -> RunConfig:
    """The settings with a run name: the option's, the file's, or one made of the file's name and the time."""
    name = run or settings.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    values = settings.model_dump(mode="json")
    values["run"]["name"] = name
    try:
        return RunConfig.model_validate(values)
    except ValueError:
        raise ConfigError(f"run name {name!r}: letters, digits, dots, dashes and underscores, please") from None


def _check(settings: RunConfig, *, local: bool) -> None:
    """What can be known to be wrong before anything starts. Raises a UserError."""
    from deltal.data.datasets import load_prompts
    from deltal.run.model_folder import check_model_folder
    from deltal.run.plan import check, machine

    if settings.model.kind == "hf":
        check_model_folder(settings.model.path)
    load_prompts(settings.data)
    if settings.evaluation.data is not None:
        load_prompts(settings.evaluation.data)
    if local:
        check(settings, machine())


def _drive(settings: RunConfig, folder: Any, address: str | None, as_json: bool) -> None:
    """Run it, show it, tell the outcome; the error's own exit code when it failed."""
    import os

    if address is None:
        os.environ.setdefault(
            "RAY_AUTH_MODE", "token"
        )  # Before ray is imported: only this user may join the local Ray.
    from deltal.run.driver import drive
    from deltal.run.plan import plan
    from deltal.run.terminal import display, tell_outcome

    with display(out, folder, silent=as_json) as show:
        summary = drive(settings, folder, plan(settings), address=address, show=show)
    if as_json:
        out.print_json(data=summary)
    else:
        tell_outcome(out, err, folder, summary)
    if summary["state"] == "failed":
        raise typer.Exit(summary["exit_code"])


def _refuse_if_alive(folder: Any) -> None:
    from deltal.errors import RunInUseError
    from deltal.run.attach import is_alive

    if is_alive(folder):
        held = folder.read_json("lock.json")
        raise RunInUseError(
            f"{folder.name} is in use by process {held['pid']} on {held['host']}: `deltal stop {folder.name}` first, "
            "or choose another --run name"
        )


def _pause(run: str, paused: bool) -> None:
    from deltal.run.attach import call
    from deltal.run.folder import RunFolder

    folder = RunFolder.find(run)
    call(folder, "pause", paused)
    out.print(f"{folder.name} is {'paused' if paused else 'training again'}")


@contextlib.contextmanager
def _quiet_progress(what: str) -> Iterator[Any]:
    """A progress bar on stderr, so that --json stays clean."""
    from rich.progress import Progress

    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
