"""Rows of files and hubs: JSON lines, Parquet, Hugging Face `datasets`. Each yields one mapping a row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltal.config import HfData, JsonlData, ParquetData
from deltal.data.locate import locate
from deltal.errors import DataError, one_line

Row = dict[str, Any]


def jsonl_rows(config: JsonlData) -> Iterator[Row]:
    """One row a line, empty lines skipped. Raises DataError `FILE:LINE: …` for a line that is no JSON object."""
    import fsspec

    place = locate(config.path)
    try:
        with fsspec.open(place, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_object(line, f"{place}:{number}")
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{place} cannot be read: {one_line(error)}") from error


def parquet_rows(config: ParquetData) -> Iterator[Row]:
    """One row a record. Raises DataError for a file that cannot be read or is no Parquet."""
    import fsspec
    import pyarrow.parquet

    place = locate(config.path)
    try:
        with fsspec.open(place, "rb") as file:
            for records in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from records.to_pylist()
    except (OSError, ImportError, ValueError) as error:  # pyarrow's errors are OSError and ValueError
        raise DataError(f"{place} cannot be read: {one_line(error)}") from error


def hf_rows(config: HfData) -> Iterator[Row]:
    """One row a record of a hub data set, a folder of data files, or a folder written by `save_to_disk`.

    Raises DataError when `datasets` cannot load it.
    """
    import datasets

    folder = Path(config.name)
    try:
        if (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(config.name)
        elif (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(config.name)[config.split]
        else:
            loaded = datasets.load_dataset(config.name, config.subset, split=config.split)
    except Exception as error:  # datasets raises its own, requests', OSError and ValueError alike
        raise DataError(f"data set {config.name!r} ({config.split}) cannot be loaded: {one_line(error)}") from error
    for row in loaded:
        yield dict(row)


def _json_object(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: no JSON: {one_line(error)}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a {type(row).__name__} where a JSON object was expected")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
