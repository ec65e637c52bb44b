"""Verbs that train: train, resume, submit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from deltal.cli.app import RUNNING, Address, ConfigPath, Json, Overrides, Run, app, err, out
from deltal.config import RunConfig
from deltal.config.file import load_config
from deltal.errors import AddressError, ConfigError, UserError

if TYPE_CHECKING:
    from deltal.plan.prompts import RunPrompts


@app.command(rich_help_panel=RUNNING)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option(help="name of the run's folder")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="validate, print actors and resources, start nothing")
    ] = False,
    begin_from: Annotated[
        str | None, typer.Option("--from", metavar="RUN[:STEP]", help="begin from the weights of another run")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="8xH100|8x80", help="with --dry-run: compare with GPUs that are not here")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Train a model: [bold]deltal train configs/demo.yaml learner.learning_rate=1e-5[/]."""
    from deltal.folder import RunFolder, runs_root
    from deltal.plan.prompts import RECORD
    from deltal.run import fork

    settings = _placed(_named(load_config(config, overrides or []), run or None, Path(config).stem))
    source = fork.find_source(begin_from) if begin_from else None
    if source is not None:
        settings = fork.planned(settings, source)
    if dry_run:
        _plan_only(settings, config, gpus, as_json)
        return
    folder = RunFolder(f"{runs_root(settings)}/{settings.run.name}")
    if folder.exists("config.yaml"):
        _refuse_if_alive(folder)
        raise UserError(
            f"{folder.url} holds a run already: `deltal resume {folder.name}`, or choose another --run name"
        )
    prompts = _check(settings, local=address is None)
    folder.make()
    if source is not None:
        settings = fork.begin(settings, source, folder)
    folder.write_config(settings)
    folder.write_json(RECORD, prompts.record)
    try:
        _drive(settings, folder, address, as_json)
    except AddressError:
        folder.forget()  # Nothing has begun: the same command may be tried again.
        raise


@app.command(rich_help_panel=RUNNING)
def resume(run: Run, overrides: Overrides = None, address: Address = None, as_json: Json = False) -> None:
    """Go on with a stopped or killed run: nothing is lost, nothing trained twice.

    Settings that do not change what is trained may change: [bold]deltal resume RUN run.steps=200 learner.ranks=2[/].
    """
    from deltal.folder import RunFolder
    from deltal.replay.journal import Journal
    from deltal.run.amend import amended

    folder = RunFolder.find(run)
    _refuse_if_alive(folder)
    before, done = folder.config(), Journal(folder.path("journal")).policy_version()
    settings = amended(before, overrides or [], done=done)
    if (folder.read_json("summary.json") or {}).get("state") == "done" and settings.run.steps <= done:
        raise UserError(f"{folder.name} is done; there is nothing to resume (run.steps=N with a larger N goes on)")
    _check(settings, local=address is None, folder=folder)
    if settings != before:
        folder.replace_config(settings)
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

    from deltal.run.token import use_token

    use_token()
    from deltal.folder import runs_root
    from deltal.run.submit import follow
    from deltal.run.submit import submit as submit_job

    settings = _placed(_named(load_config(config, overrides or []), run, Path(config).stem))
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


def _named(settings: RunConfig, run: str | None, stem: str) -> RunConfig:
    """The settings with a run name: the option's, the file's, or one made of the file's name and the time."""
    name = run or settings.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    values = settings.model_dump(mode="json")
    values["run"]["name"] = name
    try:
        return RunConfig.model_validate(values)
    except ValueError:
        raise ConfigError(f"run name {name!r}: letters, digits, dots, dashes and underscores, please") from None


def _placed(settings: RunConfig) -> RunConfig:
    """Relative paths that exist here made whole: actors and later commands run in folders of their own."""
    values = settings.model_dump(mode="json")
    data = (values["data"], values["evaluation"]["data"] or {})
    for part, is_there in ((values["model"], Path.exists), *((part, Path.is_file) for part in data)):
        if part.get("path") and is_there(path := Path(part["path"]).expanduser()):
            part["path"] = str(path.absolute())
    if (folder := values["run"]["folder"]) and "://" not in folder:
        values["run"]["folder"] = str(Path(folder).expanduser().absolute())
    return RunConfig.model_validate(values)


def _plan_only(settings: RunConfig, config: str, gpus: str | None, as_json: bool) -> None:
    """What --dry-run tells. Raises the UserError of the first input that is wrong."""
    from deltal.plan.inputs import check_inputs, hub_data
    from deltal.plan.machine import machine, named_gpus
    from deltal.plan.plan import plan
    from deltal.plan.prompts import checked_prompts

    unseen = check_inputs(settings, hub=False)
    prompts = None if hub_data(settings) else checked_prompts(settings)
    planned, available = plan(settings), named_gpus(gpus) if gpus else machine()
    problems, notes = planned.problems(available), _notes(settings, prompts) if prompts else []
    if as_json:
        told: dict[str, Any] = {"problems": problems, "not_looked_at": unseen, "notes": notes}
        if prompts:
            counts = {"train": len(prompts.train), "held_out": len(prompts.held_out), "skipped": prompts.rows_skipped}
            told |= {"prompts": counts}
        out.print_json(data={**planned.facts(), **told})
        return
    out.print(planned.table())
    for problem in problems:
        out.print(f"[red]does not fit[/] {escape(gpus or 'this machine')}: {escape(problem)}", soft_wrap=True)
    for note in notes:
        out.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    for name in unseen:
        out.print(f"not looked at, for it is not on this machine: {escape(name)}", soft_wrap=True)
    if prompts:
        out.print(
            f"prompts: {len(prompts.train)} to train on, {len(prompts.held_out)} held out; "
            f"rows left out: {prompts.rows_skipped}"
        )
    out.print(f"{config} is valid; nothing was started")


def _check(settings: RunConfig, *, local: bool, folder: Any = None) -> RunPrompts:
    """What can be known to be wrong before anything starts; says what is odd. `folder`: of a run that has begun.

    Raises a UserError.
    """
    from deltal.plan.inputs import check_inputs
    from deltal.plan.plan import check, machine
    from deltal.plan.prompts import RECORD, checked_prompts

    check_inputs(settings)
    if local:
        check(settings, machine())
    prompts = checked_prompts(settings, known=folder.read_json(RECORD) if folder else None)
    for note in _notes(settings, prompts):
        err.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    return prompts


def _notes(settings: RunConfig, prompts: RunPrompts) -> list[str]:
    """What a person should know of the data before a run starts. Raises DataError when all prompts are too long."""
    from deltal.plan.prompt_lengths import chat_notes

    return [*prompts.notes, *chat_notes(settings, prompts.train)]


def _drive(settings: RunConfig, folder: Any, address: str | None, as_json: bool) -> None:
    """Run it, show it, tell the outcome; the error's own exit code when it failed."""
    import os

    from deltal.run.token import use_token

    if address is None:
        # Before ray is imported: only this user may join the local Ray.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    else:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # What is wrong is told once, in one line.
        use_token()
    from deltal.plan.plan import plan
    from deltal.run.driver import drive
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
