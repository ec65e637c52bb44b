"""Where a data file is: the one order in which a path of a config is looked up."""

from __future__ import annotations

import os
from pathlib import Path

from deltal.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
"""Small files that come with the package: enough for a demo and the tests."""


def locate(path: str) -> str:
    """The path or fsspec URL to open for `path` as written in a config.

    Looked up in this order: an absolute path or one that exists from the working directory, an fsspec URL, the
    folder DELTAL_DATA, the bundled samples. Raises DataError that names every place when there is no such file.
    A URL is not opened here: whoever reads it reports what is missing.
    """
    if "://" in path:
        return path
    given = Path(path).expanduser()
    places = [given]
    if not given.is_absolute():
        larger = os.environ.get("DELTAL_DATA")
        places += [Path(larger) / path] if larger else []
        places.append(SAMPLES / path)
    for place in places:
        if place.is_file():
            return str(place)
    looked = ", ".join(str(place) for place in places)
    hint = "" if given.is_absolute() or os.environ.get("DELTAL_DATA") else " (DELTAL_DATA is not set)"
    raise DataError(f"no data file {path!r}; looked at: {looked}{hint}")
