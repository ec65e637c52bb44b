"""`letters`: the response holds one of the named letters. A task that a model of random weights answers now and then,
so that a test's rewards differ within a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltal.errors import DataError
from deltal.verify.tasks.answers import Finding, shortened


def letters(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    """The first of the letters of `answer` that occurs in the text, whatever its case."""
    if not any(character.isalpha() for character in answer):
        raise DataError(f"the answer {shortened(answer)} of a letters prompt holds no letter")
    found = next((character for character in text.lower() if character.isalpha() and character in answer.lower()), None)
    return Finding(found is not None, found, "equal" if found else "no answer")
