"""Forks: a new run that begins from another run's weights, with settings, optimizer and journal of its own."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from deltal.config import HfModel, RunConfig
from deltal.errors import UserError
from deltal.folder import RunFolder
from deltal.results.statistics import best_of

START = "start"
"""Folder in the new run's that holds the weights it begins from."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a fork begins from."""

    folder: RunFolder
    version: int | None
    """Of the checkpoint; None: the run's export, its checkpoints are gone."""

    def __str__(self) -> str:
        return f"{self.folder.name}:{'export' if self.version is None else self.version}"


def find_source(text: str) -> Source:
    """The source named `RUN`, `RUN:STEP` or `RUN:best`; without a step the newest checkpoint, else the export.

    Raises RunNotFoundError, and UserError that names the checkpoints there are.
    """
    from deltal.learner.checkpoint import Checkpoints

    matched = re.fullmatch(r"(.+?)(?::(\d+|best))?", text)
    run, step = matched.groups() if matched else (text, None)
    folder = RunFolder.find(run)
    versions = Checkpoints(folder.path("checkpoints"), keep=1).versions()
    if step is not None:
        version = named_version(folder, step)
        if version not in versions:
            have = ", ".join(str(known) for known in versions) or "none"
            raise UserError(f"{folder.name} has no checkpoint {version}; there are: {have}")
        return Source(folder=folder, version=version)
    if not versions and not folder.exists("export/config.json"):
        raise UserError(f"{folder.name} has neither a checkpoint nor an export to begin from")
    return Source(folder=folder, version=versions[-1] if versions else None)


def named_version(folder: RunFolder, step: str) -> int:
    """The policy version that a number, or `best`, names. Raises UserError for other words, and when none is best."""
    if step.isascii() and step.isdecimal():
        return int(step)
    if step != "best":
        raise UserError(f"{step!r} is no step: a number, or `best`")
    best = best_of(folder.rows("evaluations.jsonl"))
    if best is None:
        raise UserError(f"{folder.name} has no best checkpoint: none was evaluated (evaluation.data, evaluation.every)")
    return int(best["version"])


def planned(settings: RunConfig, source: Source) -> RunConfig:
    """`settings` with the source's model, as far as it is known before its weights are at hand."""
    return _with(settings, source, source.folder.config().model.model_dump(mode="json"))


def begin(settings: RunConfig, source: Source, target: RunFolder) -> RunConfig:
    """Put the source's weights into `target` as a model folder; returns the new run's settings.

    Raises UserError when `target` is no local folder, LearnerError when the checkpoint is damaged.
    """
    from deltal.learner.export import export

    if not target.is_local:
        raise UserError(f"a fork begins from files that all nodes read: {target.url} must be a local or shared folder")
    start = target.path(START)
    if source.version is None:
        shutil.copytree(source.folder.path("export"), Path(start), dirs_exist_ok=True)
    else:
        export(source.folder.path("checkpoints"), start, config=source.folder.config(), version=source.version)
    return _with(settings, source, HfModel(path=start).model_dump(mode="json"))


def _with(settings: RunConfig, source: Source, model: dict[str, object]) -> RunConfig:
    values = settings.model_dump(mode="json")
    values["model"] = model
    values["run"]["forked_from"] = str(source)
    return RunConfig.model_validate(values)
