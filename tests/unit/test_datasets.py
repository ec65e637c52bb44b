"""Data sets to prompts: every source, every way a file can be broken, and generated tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deltal.config import GeneratedData, HfData, JsonlData, ParquetData, ReasoningGymData
from deltal.data.datasets import load_prompts
from deltal.data.locate import SAMPLES
from deltal.data.reasoning import entry_from_json, entry_to_json
from deltal.errors import DataError

ROW = {"id": "a/1", "prompt": "What is 2 + 2?", "answer": 4, "task": "gsm8k", "level": 3, "tags": ["x", None]}


def written(folder: Path, *rows: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(file)


def test_a_row_becomes_a_prompt_and_its_other_columns_fields(tmp_path: Path) -> None:
    (prompt,) = load_prompts(JsonlData(path=written(tmp_path, ROW)))
    assert (prompt.id, prompt.task, prompt.answer) == ("a/1", "gsm8k", "4")
    assert [(message.role, message.content) for message in prompt.messages] == [("user", "What is 2 + 2?")]
    assert prompt.fields == {"level": 3, "tags": ["x", None]}


def test_template_and_columns_are_settings(tmp_path: Path) -> None:
    row = {"question": "1+1", "gold": "2", "hint": "small"}
    config = JsonlData(
        path=written(tmp_path, row, row),
        task="math",
        prompt_column="question",
        answer_column="gold",
        id_column=None,
        template="{question} ({hint}) {{box it}}",
        limit=1,
    )
    (prompt,) = load_prompts(config)
    assert prompt.messages[0].content == "1+1 (small) {box it}"
    assert (prompt.id, prompt.task) == ("0", "math")
    assert prompt.fields["prompt"] == "1+1"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([ROW, "{broken"], {}, r"rows\.jsonl:2: no JSON"),
        ([ROW, "", "[1]"], {}, r"rows\.jsonl:3: a list where a JSON object"),
        (['{"prompt": NaN}'], {}, r"rows\.jsonl:1: no JSON: NaN"),
        (["[" * 100_000], {}, r"rows\.jsonl:1: no JSON"),
        ([{"prompt": "q"}], {}, r"rows\.jsonl:1: no column 'answer'; there are prompt"),
        ([ROW, {**ROW, "id": "b", "answer": " "}], {}, r"rows\.jsonl:2: column 'answer' is empty"),
        ([{**ROW, "answer": ["4"]}], {}, r"rows\.jsonl:1: column 'answer' holds a list"),
        ([{"prompt": "q", "answer": "1"}], {}, r"rows\.jsonl:1: no column 'task', and data\.task is not set"),
        ([ROW, ROW], {}, r"rows\.jsonl:2: id 'a/1' in column 'id' is also that of .*rows\.jsonl:1"),
        ([ROW], {"template": "{prompt} {hint}"}, r"rows\.jsonl:1: template names \{hint\}, which is no column"),
        ([ROW], {"template": "{prompt.__class__}"}, r"template names \{prompt.__class__\}"),
        ([ROW], {"template": "{tags[0]}"}, r"template names \{tags\[0\]\}"),
        ([ROW], {"template": "{prompt"}, r"cannot be filled"),
        ([], {}, r"has no rows"),
    ],
)
def test_broken_data_is_named(tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(JsonlData(path=written(tmp_path, *rows), **settings))


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no text in UTF-8 \(byte 0xff\)"):
        load_prompts(JsonlData(path=str(file)))


def test_a_bare_name_is_looked_up_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTAL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert len(load_prompts(JsonlData(path="gsm8k_test.jsonl"))) == 32
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "gsm8k_test.jsonl").write_text(json.dumps(ROW))
    monkeypatch.setenv("DELTAL_DATA", str(larger))
    assert len(load_prompts(JsonlData(path="gsm8k_test.jsonl"))) == 1
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(json.dumps({**ROW, "id": name}) for name in "ab"))
    assert len(load_prompts(JsonlData(path="gsm8k_test.jsonl"))) == 2
    assert len(load_prompts(JsonlData(path=(larger / "gsm8k_test.jsonl").as_uri()))) == 1


def test_a_missing_file_names_the_places_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAL_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_prompts(JsonlData(path="nowhere.jsonl"))
    assert all(str(place) in str(caught.value) for place in ("nowhere.jsonl", tmp_path, SAMPLES))
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(JsonlData(path=f"file://{tmp_path}/nowhere.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(JsonlData(path="nosuchprotocol://bucket/rows.jsonl"))


def test_every_sample_file_loads() -> None:
    rows = {file.name: len(load_prompts(JsonlData(path=file.name))) for file in SAMPLES.glob("*.jsonl")}
    assert rows == {
        "gsm8k_train.jsonl": 64,
        "gsm8k_test.jsonl": 32,
        "countdown_train.jsonl": 64,
        "countdown_test.jsonl": 32,
        "math_train.jsonl": 32,
        "math500_test.jsonl": 16,
    }


def test_parquet_and_hf_folders_give_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": str(i), "prompt": f"q{i}", "answer": i, "task": "gsm8k", "nums": [i, 1]} for i in range(3)]
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    parquet = load_prompts(ParquetData(path=str(file)))
    assert [prompt.fields for prompt in parquet] == [{"nums": [i, 1]} for i in range(3)]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert load_prompts(HfData(name=str(tmp_path))) == parquet
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(ParquetData(path=str(tmp_path / "broken.parquet")))


def test_reasoning_gym_items_carry_what_scoring_needs() -> None:
    import reasoning_gym

    config = ReasoningGymData(name="chain_sum", size=3, seed=7, parameters={"max_terms": 2})
    prompts = load_prompts(config)
    assert prompts == load_prompts(config)
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for prompt in prompts:
        assert prompt.task == "reasoning_gym"
        fields = json.loads(json.dumps(dict(prompt.fields)))
        assert score(prompt.answer, entry_from_json(fields["entry"])) == 1.0
    with pytest.raises(DataError, match="the nearest is 'chain_sum'"):
        load_prompts(ReasoningGymData(name="chain_summ"))
    with pytest.raises(DataError, match="refuses its parameters"):
        load_prompts(ReasoningGymData(name="chain_sum", parameters={"no_such": 1}))


def test_tuples_survive_json() -> None:
    entry = {"grid": ((1, 2), [3, (4,)]), "name": "x", "none": None}
    assert entry_from_json(json.loads(json.dumps(entry_to_json(entry)))) == entry


@pytest.mark.parametrize("name", ["largest", "countdown_two"])
@pytest.mark.parametrize("seeds", [(0, 0), (1, 2)])
def test_generated_train_and_test_never_share_a_question(name: Any, seeds: tuple[int, int]) -> None:
    splits = [
        load_prompts(GeneratedData(name=name, size=400, seed=seed, split=split, high=30))
        for split, seed in zip(("train", "test"), seeds, strict=True)
    ]

    def asked(prompts: list[Any]) -> set[Any]:
        return {
            (tuple(sorted(p.fields.get("nums") or p.fields["numbers"])), p.fields.get("target", p.answer))
            for p in prompts
        }

    assert not asked(splits[0]) & asked(splits[1])
    for prompts in splits:
        assert len({prompt.messages[0].content for prompt in prompts}) == len(prompts)


def test_generated_prompts_are_deterministic_by_seed() -> None:
    first = load_prompts(GeneratedData(size=20, seed=3))
    assert first == load_prompts(GeneratedData(size=20, seed=3))
    assert first != load_prompts(GeneratedData(size=20, seed=4))
    assert len(load_prompts(GeneratedData(size=20, seed=-1))) == 20
    assert first[0].fields["numbers"]
    assert first[0].answer == str(max(first[0].fields["numbers"]))
    listed = ", ".join(map(str, first[0].fields["numbers"]))
    assert first[0].messages[0].content == f"Which number is the largest: {listed}? Answer with just the number."


def test_a_small_space_gives_all_its_questions() -> None:
    both = [
        prompt.messages[0].content
        for split in ("train", "test")
        for prompt in load_prompts(GeneratedData(size=10_000, high=5, numbers=2, split=split))  # type: ignore[arg-type]
    ]
    assert len(both) == len(set(both)) == 6 * 5
    with pytest.raises(DataError, match="no 5 different numbers out of 0…3"):
        load_prompts(GeneratedData(numbers=5, high=3))


def test_countdown_two_answers_are_right() -> None:
    for prompt in load_prompts(GeneratedData(name="countdown_two", size=2000)):
        left, right = prompt.answer.split(" = ")
        a, operation, b = left.split()
        assert sorted([int(a), int(b)]) == sorted(prompt.fields["nums"])
        exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[operation]
        assert exact == int(right) == prompt.fields["target"] > 0
        assert prompt.task == "countdown"


def test_importing_data_loads_nothing_heavy() -> None:
    program = (
        "import sys, deltal, deltal.data.datasets, deltal.data.cursor, deltal.data.chat, deltal.verify; "
        "heavy = {'torch', 'ray', 'vllm', 'sympy', 'reasoning_gym', 'datasets', 'transformers', 'pyarrow'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
