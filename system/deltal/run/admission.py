"""Admission: how many groups to issue now. Pure; the Controller asks, the ReplayBuffer's slots are the limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def open_slots(replay: Mapping[str, Any], *, newest_version: int | None, is_open: bool) -> int:
    """Groups that may be issued now.

    `replay` is the ReplayBuffer's state, `newest_version` the PolicyStore's, None before its first. After a restart
    nothing is issued before the learner has redone its recorded batches up to the newest published version: until
    then no worker could sample what is issued.
    """
    if not is_open or newest_version is None or newest_version < replay["policy_version"]:
        return 0
    return int(replay["open_slots"])
