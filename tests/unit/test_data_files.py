"""Files as people have them: every one is read right, or refused in one line that says where and what to do."""

from __future__ import annotations

import bz2
import dataclasses
import datetime
import decimal
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal.config import HfData, JsonlData, ParquetData
from deltal.data.columns import written
from deltal.data.datasets import load_prompts
from deltal.data.reasoning import entry_from_json, entry_to_json
from deltal.errors import DataError
from deltal.replay.journal import decode, encode
from deltal.replay.ledger import Admitted
from deltal.types import Prompt
from tests.unit.builders import scored

ROWS = [{"prompt": "Zahl é 日", "answer": "1", "task": "gsm8k"}, {"prompt": "two?", "answer": "2", "task": "gsm8k"}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
BYTES = TEXT.encode()


def of_bytes(folder: Path, data: bytes, name: str = "rows.jsonl", **settings: Any) -> list[Prompt]:
    (folder / name).write_bytes(data)
    return load_prompts(JsonlData(path=str(folder / name), **settings))


def of_table(folder: Path, rows: list[dict[str, Any]] | pa.Table, **settings: Any) -> list[Prompt]:
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), folder / "rows.parquet")
    return load_prompts(ParquetData(path=str(folder / "rows.parquet"), **settings))


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + BYTES,
        BYTES.replace(b"\n", b"\n\xef\xbb\xbf", 1),
        BYTES.replace(b"\n", b"\r\n"),
        BYTES.rstrip(b"\n"),
        b"\n\n" + BYTES + b"  \n",
        TEXT.encode("utf-16"),
        TEXT.encode("utf-32"),
        gzip.compress(BYTES),
        bz2.compress(BYTES),
        lzma.compress(BYTES),
        gzip.compress(b"\xef\xbb\xbf" + BYTES),
    ],
    ids=["bom", "bom inside", "crlf", "no last end", "empty lines", "utf-16", "utf-32", "gz", "bz2", "xz", "gz bom"],
)
def test_the_same_rows_are_read_however_the_text_is_written_down(tmp_path: Path, data: bytes) -> None:
    assert [prompt.messages[0].content for prompt in of_bytes(tmp_path, data)] == ["Zahl é 日", "two?"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TEXT.encode("utf-8") + '{"prompt": "café"}\n'.encode("latin-1"), r":3: no text in UTF-8 \(byte 0xe9\).*iconv"),
        (b'{"prompt": "x", "answer": NaN, "task": "gsm8k"}', r":1: no JSON: NaN is not JSON"),
        (b'{"prompt": "a\\ud800b", "answer": "1", "task": "gsm8k"}', r":1: column 'prompt' holds \\ud800, half"),
        (b'{"prompt": "a", "answer": "\\udc00", "task": "gsm8k"}', r":1: column 'answer' holds \\udc00, half"),
        (b'{"prompt": "a", "answer": "1", "task": "gsm8k", "id": "\\ud801"}', r":1: column 'id' holds \\ud801"),
        (b'{"prompt": "a", "answer": "1", "task": "gsm8k", "x": [{"y\\ud801": 1}]}', r":1: column 'x' holds \\ud801"),
        (b'{"prompt": "a", "answer": "1", "task": "\\ud801"}', r":1: column 'task' holds \\ud801"),
        (b'{"prompt": "a", "prompt": "b", "answer": "1"}', r":1: no JSON: the key 'prompt' stands twice"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", r":1: .*integer of more than 4,300 digits"),
        (b'{"prompt": "a", "answer": 1e999, "task": "gsm8k"}', r":1: column 'answer' holds inf, which is no number"),
        (
            b'{"prompt": "a", "answer": "1", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
            r":1: column 'x' is nested more than",
        ),
        (
            b'{"prompt": "a", "answer": "1", "x": ' + b"[" * 90000,
            r":1: no JSON that can be read: it is nested",
        ),
        (json.dumps(ROWS).encode(), r":1: a list where a JSON object was expected.*jq"),
        (json.dumps(ROWS, indent=1).encode(), r":1: no JSON: .*this one begins '\['"),
        (b"prompt,answer\nq,1\n", r":1: no JSON: .*this one begins 'prompt,answer'"),
        (b"", r"has no rows"),
        (b"\n \n", r"has no rows"),
        (gzip.compress(BYTES, mtime=0)[:-12], r"rows\.jsonl cannot be read: "),
        (b"\x28\xb5\x2f\xfd" + b"\0" * 20, r"(is packed with zstd|cannot be read)"),
        (b"PAR1" + b"\0" * 20, r"is Parquet: data\.kind=parquet reads it"),
        (b"PK\x03\x04" + b"\0" * 20, r"is a zip archive"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        of_bytes(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_a_nul_character_is_a_character_like_others(tmp_path: Path) -> None:
    (prompt,) = of_bytes(tmp_path, b'{"prompt": "a\\u0000b", "answer": "1", "task": "gsm8k"}')
    assert prompt.messages[0].content == "a\0b"


def test_all_broken_lines_are_named_at_once_and_more_than_ten_are_counted(tmp_path: Path) -> None:
    broken = [json.dumps({"prompt": "q", "answer": [n] * n, "task": "gsm8k", "id": str(n)}) for n in (1, 2)]
    odd = [json.dumps({"prompt": f"q{n}", "answer": f"{n}", "id": "same", "task": "gsm8k"}) for n in range(30)]
    other = [f'{{"prompt": x{n}}}' for n in range(30)]
    with pytest.raises(DataError) as caught:
        of_bytes(tmp_path, "\n".join([*broken, *odd, *other]).encode())
    said = str(caught.value)
    assert "rows.jsonl:1: column 'answer' holds a list; text or a number was expected (and 1 more rows like it)" in said
    assert "rows.jsonl:4: id 'same' in column 'id' is also that of" in said
    assert said.count("rows.jsonl:") <= 12
    assert "data.on_bad_rows=skip" in said
    assert "more rows" in said


def test_rows_that_cannot_be_read_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    data = BYTES + b"{broken\n" + '{"prompt": "café"}\n'.encode("latin-1") + json.dumps(ROWS[0] | {"id": "x"}).encode()
    prompts = of_bytes(tmp_path, data, on_bad_rows="skip")
    assert [prompt.id for prompt in prompts] == ["0", "1", "x"]
    with pytest.raises(DataError, match=r"no row of jsonl data .* is left"):
        of_bytes(tmp_path, b"{broken\n[]\n", on_bad_rows="skip")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (72.0, "72"),
        (1e16, "10000000000000000"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (-2.5e20, "-250000000000000000000"),
        (3, "3"),
        (True, "true"),
        (decimal.Decimal("1.50"), "1.5"),
        (decimal.Decimal("1E+3"), "1000"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
    ],
)
def test_a_number_is_written_in_digits(tmp_path: Path, value: Any, text: str) -> None:
    assert written(value) == text
    (prompt,) = of_table(tmp_path, [{"prompt": "q", "answer": value, "task": "exact"}])
    assert prompt.answer == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_written_float_is_the_same_number_and_has_no_exponent(value: float) -> None:
    text = written(value)
    assert float(text) == value
    assert set(text) <= set("-.0123456789")


def test_narrow_floats_are_read_as_they_were_written(tmp_path: Path) -> None:
    columns = {"prompt": ["q", "r"], "answer": pa.array([0.1, 72.0], pa.float32()), "task": ["gsm8k"] * 2}
    assert [prompt.answer for prompt in of_table(tmp_path, pa.table(columns))] == ["0.1", "72"]


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 0, "level": 2.0},
}


def test_a_conversation_is_taken_as_it_is_and_columns_may_lie_inside_others(tmp_path: Path) -> None:
    settings = {"task": "gsm8k", "answer_column": "reward_model.ground_truth", "id_column": "extra_info.index"}
    for prompts in (
        of_table(tmp_path, [VERL], **settings),
        of_bytes(tmp_path, json.dumps(VERL).encode(), **settings, template="{prompt} Think!"),
    ):
        (prompt,) = prompts
        assert [(m.role, m.content) for m in prompt.messages] == [("system", "Be brief."), ("user", "2 + 2?")]
        assert (prompt.answer, prompt.id) == ("4", "0")
        assert prompt.fields["extra_info"] == {"index": 0, "level": 2.0}


def test_a_template_may_name_what_lies_inside_a_column(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2?", "answer": 4.0, "task": "gsm8k", "extra": {"level": 2.0, "hint": None}}
    (prompt,) = of_bytes(tmp_path, json.dumps(row).encode(), template="{prompt} (level {extra.level})")
    assert prompt.messages[0].content == "2 + 2? (level 2)"
    with pytest.raises(DataError, match=r"template names \{extra\.hint\}, which is empty in this row"):
        of_bytes(tmp_path, json.dumps(row).encode(), template="{prompt} {extra.hint}")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "column 'prompt' is empty"),
        ([{"role": "user", "content": " "}], "does not end with a question of the user"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "does not end with a question"),
        ([{"role": "tool", "content": "q"}], "message 0 is none of {role, content}"),
        (["q"], "message 0 is none of {role, content}"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "message 0 has no text"),
        ([{"role": "user", "content": "q", "tool_calls": [1]}], "message 0 has tool_calls beside role and content"),
    ],
)
def test_a_conversation_that_is_none_is_named(tmp_path: Path, messages: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        of_bytes(tmp_path, json.dumps({"prompt": messages, "answer": "1", "task": "exact"}).encode())


def test_missing_columns_are_named_beside_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 0: no column 'answer'; there are .*reward_model\.ground_truth"):
        of_table(tmp_path, [VERL], task="gsm8k")


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array(["q"]), pa.array(["1"]), pa.array(["2"])], names=["prompt", "answer", "answer"]
    )
    with pytest.raises(DataError, match="the column 'answer' stands twice"):
        of_table(tmp_path, table)


def test_hub_data_is_read_as_parquet_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    settings = {"task": "gsm8k", "answer_column": "reward_model.ground_truth"}
    parquet = of_table(tmp_path, [VERL], **settings)
    assert load_prompts(HfData(name=str(tmp_path), **settings)) == parquet


WHOLE: Callable[..., Any] = st.integers(-(2**200), 2**200)


@given(st.lists(WHOLE, max_size=4))
def test_whole_numbers_of_any_size_pass_through_the_journal(numbers: list[int]) -> None:
    entry = {"metadata": {"numbers": numbers, "pair": (1, 2**70)}}
    group = scored(0)
    prompt = dataclasses.replace(group.group.prompt, fields={"entry": entry_to_json(entry)})
    kept = dataclasses.replace(group, group=dataclasses.replace(group.group, prompt=prompt))
    (record,) = decode(encode([Admitted(kept, None)]), "here")
    assert isinstance(record, Admitted)
    assert entry_from_json(record.scored.group.prompt.fields["entry"]) == entry


def test_a_field_beyond_64_bits_becomes_its_text(tmp_path: Path) -> None:
    (prompt,) = of_bytes(tmp_path, b'{"prompt": "q", "answer": 1, "task": "gsm8k", "seed": [9223372036854775808, 7]}')
    assert prompt.fields == {"seed": ["9223372036854775808", 7]}
