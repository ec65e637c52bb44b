"""Rows of files and hubs: JSON lines, Parquet, Hugging Face `datasets`.

Each source yields the place of a row, as a message names it, and the row; where one row is broken and others can still
be read, it yields the DataError in the row's stead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltal.config import HfData, JsonlData, ParquetData
from deltal.data.lines import numbered_lines
from deltal.data.locate import locate
from deltal.errors import DataError, one_line

Row = dict[str, Any]
Placed = tuple[str, Row | DataError]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def jsonl_rows(config: JsonlData) -> Iterator[Placed]:
    """One row a line at `FILE:LINE`, empty lines skipped. Raises DataError for a file that cannot be read."""
    file = locate(config.path)
    for number, line in numbered_lines(file):
        line = line.removeprefix(BYTE_ORDER_MARK)  # Files put one behind the other have it in the middle, too.
        if line.strip():
            yield f"{file}:{number}", _json_object(line)


def parquet_rows(config: ParquetData) -> Iterator[Placed]:
    """One row a record, counted from 0. Raises DataError for a file that cannot be read or is no Parquet."""
    import fsspec
    import pyarrow.parquet

    file = locate(config.path)
    number = 0
    try:
        with fsspec.open(file, "rb") as opened:
            for records in pyarrow.parquet.ParquetFile(opened).iter_batches():
                for row in _records(records, file):
                    yield f"{file}, row {number}", row
                    number += 1
    except (OSError, ImportError, ValueError) as error:  # pyarrow's errors are OSError and ValueError
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error


def hf_rows(config: HfData) -> Iterator[Placed]:
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
    place, number = f"data set {config.name} ({config.split})", 0
    for records in loaded.with_format("arrow").iter(1000):
        for row in _records(records, place):
            yield f"{place}, row {number}", row
            number += 1


def _records(records: Any, place: str) -> Iterator[Row]:
    """Rows of an Arrow table. Narrow floats are read as they were written: 0.1 as float32 is no 0.10000000149."""
    import numpy as np
    import pyarrow.types

    names = records.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{place}: the column {twice!r} stands twice")
    narrow = {
        field.name: np.float32 if pyarrow.types.is_float32(field.type) else np.float16
        for field in records.schema
        if pyarrow.types.is_float32(field.type) or pyarrow.types.is_float16(field.type)
    }
    for row in records.to_pylist():
        for name, kind in narrow.items():
            if row[name] is not None:
                row[name] = float(str(kind(row[name])))
        yield row


def _json_object(line: bytes) -> Row | DataError:
    try:
        row = json.loads(line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_refuse_repetition)
    except UnicodeDecodeError as error:
        return DataError(
            f"no text in UTF-8 (byte 0x{line[error.start]:02x}): write the file as UTF-8, for example with "
            "`iconv -f latin1 -t utf-8`"
        )
    except RecursionError:
        return DataError("no JSON that can be read: it is nested too deep")
    except ValueError as error:
        if "integer string conversion" in str(error):
            return DataError("no JSON that can be read: it holds an integer of more than 4,300 digits")
        return DataError(
            f"no JSON: {one_line(error)}; one JSON object a line is wanted, this one begins {_start(line)}"
        )
    if isinstance(row, list):
        return DataError("a list where a JSON object was expected; of a file that is one list: jq -c '.[]' makes lines")
    if not isinstance(row, dict):
        return DataError(f"a {type(row).__name__} where a JSON object was expected")
    return row


def _start(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 20 else text[:20] + "…")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> Row:
    """The object; readers disagree on which of two equal keys counts."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return row
