"""Verbs about models, results and this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deltal.cli.app import LOOK, Address, ConfigPath, Json, Overrides, Run, Setting, app, err, out, progress_bar
from deltal.config.file import explained, load_config


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
    responses: Annotated[int, typer.Option(help="k of avg@k, and the largest k of pass@k")] = 1,
    overrides: Setting = None,
    as_json: Json = False,
) -> None:
    """Measure a model's accuracy on held-out prompts with vLLM, without Ray."""
    from deltal.results.offline import evaluate as measure
    from deltal.results.offline import held_out_prompts, model_and_settings

    folder, settings = model_and_settings(model, config, overrides or [])
    found, note = held_out_prompts(data, settings)
    if note:
        err.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    chosen = found[: prompts or settings.evaluation.prompts]
    with progress_bar("sampling") as advance:
        row = measure(folder, chosen, settings, responses=responses, advance=advance)
    if as_json:
        out.print_json(data=row)
    else:
        low, high = row["interval_95"]
        out.print(f"accuracy {row['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}) on {row['prompts']} prompts, "
                  f"{row['overlong']} overlong, mean length {row['response_length'] or 0:.1f} tokens")  # fmt: skip
        for k, told in list(row["pass_at"].items())[1:]:
            low, high = told["interval_95"]
            out.print(f"pass@{k} {told['value']:.3f} (95% interval {low:.3f} to {high:.3f})")


@app.command(rich_help_panel=LOOK)
def variance(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL|CONFIG", help="a run (its export), a model folder, a config (its start)")
    ],
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="a .jsonl or .parquet file; default: the config's")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="chat, sampling and algorithm settings; default: the run's")
    ] = None,
    prompts: Annotated[int, typer.Option(help="prompts sampled")] = 32,
    responses: Annotated[int, typer.Option(help="responses a prompt")] = 8,
    parameters: Annotated[
        str, typer.Option(help="exact gradients of: lm_head, or a regular expression over parameter names")
    ] = "lm_head",
    folder: Annotated[str, typer.Option("--out", help="where table, CSV and PNG go")] = "variance",
    overrides: Setting = None,
    as_json: Json = False,
) -> None:
    """Measure what each aggregation would do to a model's real gradients: bias, variance, β."""
    from pathlib import Path

    from deltal.results.offline import held_out_prompts, model_and_settings, sample
    from deltal.results.variance import instrument, table, write

    where, settings = model_and_settings(model, config, overrides or [])
    found, note = held_out_prompts(data, settings)
    if note:
        err.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    chosen = found[:prompts]
    temperature = settings.rollout.temperature
    with progress_bar("sampling") as advance:
        groups = sample(where, chosen, settings, responses=responses, temperature=temperature, advance=advance)
    with progress_bar("gradients") as advance:
        facts = instrument(where, groups, settings, parameters=parameters, advance=advance)
    paths = write(facts, Path(folder))
    if as_json:
        out.print_json(data={name: value for name, value in facts.items() if name != "each"})
    else:
        out.print(table(facts))
        out.print("written: " + ", ".join(str(path) for path in paths), soft_wrap=True)


@app.command(rich_help_panel=LOOK)
def export(
    run: Run,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="new model folder")],
    step: Annotated[
        str | None, typer.Option(metavar="N|best", help="policy version; default: the newest checkpoint")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="of a LoRA run: the adapter alone instead of merged weights")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder for transformers and vLLM."""
    from deltal.folder import RunFolder
    from deltal.learner.export import export as write
    from deltal.run.fork import named_version

    source = RunFolder.find(run)
    chosen = None if step is None else named_version(source, step)
    told = [row for row in source.rows("evaluations.jsonl") if "label" in row and "accuracy" in row]
    facts = {f"held-out accuracy, {row['label']}": row["accuracy"] for row in told}
    version = write(
        source.path("checkpoints"), folder, config=source.config(), version=chosen, facts=facts, adapter=adapter
    )
    out.print(f"policy version {version} of {source.name} is in {folder}")


@app.command(rich_help_panel=LOOK)
def replay(
    run: Run, step: Annotated[int, typer.Argument(metavar="STEP", help="as in metrics.jsonl")], as_json: Json = False
) -> None:
    """Redo a recorded step from the run folder alone and compare loss and gradient norm with what was recorded."""
    from deltal.folder import RunFolder
    from deltal.results.redo import replay_step, tables

    folder = RunFolder.find(run)
    with progress_bar("training") as advance:
        facts = replay_step(folder, step, advance)
    if as_json:
        out.print_json(data=facts)
    else:
        for part in tables(facts):
            out.print(part)
    if not facts["is_equal"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def audit(run: Run, as_json: Json = False) -> None:
    """Prove from the run folder alone that no group was lost or trained twice."""
    from dataclasses import asdict

    from deltal.folder import RunFolder
    from deltal.replay.journal import Journal
    from deltal.replay.ledger import audit as prove

    folder = RunFolder.find(run)
    steps = max((int(row.get("step") or 0) for row in folder.rows("metrics.jsonl")), default=0)
    records, stale = Journal(folder.path("journal")).read(), folder.config().replay.max_staleness
    result = prove(records, max_staleness=stale, steps=steps)
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

    from deltal.plan.doctor import examine

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
