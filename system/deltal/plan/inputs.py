"""What can be known to be wrong with a run before anything starts: chat template and model folder.

Of the data `plan/prompts.py` speaks.
"""

from __future__ import annotations

from pathlib import Path

from deltal.config import HfData, RunConfig
from deltal.data.chat import check_template
from deltal.plan.model_inputs import check_model


def check_inputs(settings: RunConfig, *, hub: bool = True) -> list[str]:
    """Raises the UserError of the first input that is wrong. The rows of data are looked at by `checked_prompts`.

    Returns what was not looked at: names of hub models, and without `hub` names of hub data sets.
    """
    check_template(settings.chat)
    unseen = check_model(settings, hub=hub)
    return unseen if hub else unseen + [f"data set {name}" for name in hub_data(settings)]


def hub_data(settings: RunConfig) -> list[str]:
    """Names of data sets that are not on this machine, as far as can be told without asking the hub."""
    sources = (settings.data, settings.evaluation.data)
    return [data.name for data in sources if isinstance(data, HfData) and not Path(data.name).exists()]
