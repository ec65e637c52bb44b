"""What can be known to be wrong with a run before anything starts: chat template, model folder, data, tasks."""

from __future__ import annotations

from pathlib import Path

from deltal.config import RunConfig
from deltal.data.chat import check_template
from deltal.data.datasets import load_prompts
from deltal.plan.model_inputs import check_model
from deltal.verify.registry import find


def check_inputs(settings: RunConfig, *, hub: bool = True) -> list[str]:
    """Raises the UserError of the first input that is wrong.

    Returns what was not looked at: names of hub models, and without `hub` names of hub data sets.
    """
    unseen: list[str] = []
    check_template(settings.chat)
    unseen += check_model(settings, hub=hub)
    for data in (settings.data, settings.evaluation.data):
        if data is not None and data.kind == "hf" and not hub and not Path(data.name).exists():
            unseen.append(f"data set {data.name}")
        elif data is not None:
            for task in {prompt.task for prompt in load_prompts(data)}:
                find(task)
    return unseen
