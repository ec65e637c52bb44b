"""The user's Ray token. Clusters ask for one unless told otherwise, and Ray sends it only in the mode `token`."""

from __future__ import annotations

import os
from pathlib import Path

ADVICE = (
    "the cluster asks for a token that is not here or not its own: put what `ray get-auth-token` prints on its head "
    "into ~/.ray/auth_token, or set RAY_AUTH_TOKEN"
)


def use_token() -> None:
    """Have Ray send the user's token where there is one; a cluster that asks for none does not mind.

    Call it before ray is imported, which reads the mode once. A RAY_AUTH_MODE of the user's own stays.
    """
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or file.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def is_refused(text: str) -> bool:
    """Whether an error of Ray's says that the token is missing or wrong."""
    return any(word in text for word in ("InvalidAuthToken", "Unauthorized", "authentication token", "Authentication"))
