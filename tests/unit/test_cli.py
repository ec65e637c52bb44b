"""Bad input gets one clear line and exit code 2, starts nothing and loses nothing. Each through the real command."""

import json
from pathlib import Path

import pytest

from deltal.config.file import load_config
from deltal.folder import RunFolder
from deltal.plan.prompts import prompts_of_run
from tests.launch import TINY, deltal


def refused(*arguments: str, **environment: str) -> str:
    """The one line a user's mistake gets."""
    result = deltal(*arguments, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learner.learing_rate=1", "did you mean learner.learning_rate"),
        ("rolout.workers=1", "did you mean rollout"),
        ("rollout.workers=many", "rollout.workers"),
        ("replay.max_ahead=9", "max_staleness"),
        ("rollout", "must look like"),
        ("algorithm.aggregation.kind=grop", "grpo"),
        ("data.kind=jsonl", "data"),
        ("data.task=largset", "the nearest is 'largest'"),
        ("chat.template={% if %}", "chat.template, line 1"),
        ("chat.template=chatlm", "chat.template = 'chatlm'"),
        ("rollout.temperature=3", "rollout.temperature"),
        ("chat.template={{ messages[9].content.x }}", "chat template fails on prompt"),
        ("rollout.max_response_tokens=70000", "tokens, but the model takes 4096"),
    ],
)
def test_a_wrong_setting_is_named(override: str, says: str, tmp_path: Path):
    for planned in ((), ("--dry-run",)):
        assert says in refused("train", TINY, override, *planned, DELTAL_RUNS=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_file_is_named_with_the_places_looked_at(tmp_path: Path):
    line = refused(
        "train", _config(tmp_path, "data: {kind: jsonl, path: no-such-file.jsonl}"), DELTAL_RUNS=str(tmp_path / "runs")
    )
    assert "no-such-file.jsonl" in line
    assert not (tmp_path / "runs").exists()


def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    good = json.dumps({"prompt": "1 + 1?", "answer": "2", "task": "gsm8k"})
    data.write_text(f"{good}\n{good}\n{{broken\n")
    line = refused("train", _config(tmp_path, f"data: {{kind: jsonl, path: {data}}}"), DELTAL_RUNS=str(tmp_path))
    assert f"{data}:3" in line


def test_rows_that_cannot_be_judged_stop_every_verb_before_anything_starts(tmp_path: Path):
    rows = [{"prompt": f"q{n}", "answer": "N/A" if n % 2 else "4", "task": "gsm8k"} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    runs, data = tmp_path / "runs", f"data={{kind: jsonl, path: {tmp_path / 'data.jsonl'}}}"
    for more in ((), ("--dry-run",)):
        line = refused("train", TINY, data, *more, DELTAL_RUNS=str(runs))
        assert all(f"data.jsonl:{place}: the answer 'N/A' of a gsm8k prompt" in line for place in (2,))
        assert "and 3 more rows like it" in line
        assert "data.on_bad_rows=skip" in line
    assert "data.jsonl:2" in refused("variance", TINY, str(tmp_path / "data.jsonl"), DELTAL_RUNS=str(runs))
    assert not runs.exists()
    told = deltal("train", TINY, data, "data.on_bad_rows=skip", "evaluation.data={split_off: 1}", "--dry-run", "--json")
    facts = json.loads(told.stdout)
    assert facts["prompts"] == {"train": 3, "held_out": 1, "skipped": 4}
    assert "4 rows are left out" in facts["notes"][0]


def test_a_resume_on_other_data_is_refused(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "q", "answer": "4", "task": "gsm8k"}))
    config = load_config(_config(tmp_path, f"data: {{kind: jsonl, path: {data}}}"))
    folder = RunFolder(str(tmp_path / "run"))
    folder.make()
    folder.write_config(config)
    prompts_of_run(config, folder)
    data.write_text(json.dumps({"prompt": "other", "answer": "4", "task": "gsm8k"}))
    assert "is not what this run began with" in refused("resume", "run", DELTAL_RUNS=str(tmp_path))


def test_a_model_folder_without_weights_or_tokenizer_is_named(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = _config(tmp_path, "data: {kind: generated}", model=f"{{kind: hf, path: {folder}}}")
    assert "safetensors" in refused("train", config, DELTAL_RUNS=str(tmp_path))
    (folder / "model.safetensors").write_bytes(b"")
    assert "tokenizer" in refused("train", config, DELTAL_RUNS=str(tmp_path))


def test_too_little_memory_is_said_before_anything_starts(tmp_path: Path):
    line = refused("train", TINY, "rollout.kv_cache_gib=100000", DELTAL_RUNS=str(tmp_path))
    assert "memory" in line
    assert "lower" in line


def test_too_few_cpus_are_said_before_anything_starts(tmp_path: Path):
    assert "CPUs" in refused("train", TINY, "rollout.num_cpus=4000", DELTAL_RUNS=str(tmp_path))


def test_an_address_without_ray_is_named(tmp_path: Path):
    line = refused("train", TINY, "--run", "r", "--address", "127.0.0.1:1", DELTAL_RUNS=str(tmp_path))
    assert "127.0.0.1:1" in line
    assert list(tmp_path.iterdir()) == [], "the same command may be tried again"
    assert "127.0.0.1:1" in refused("submit", TINY, "--address", "http://127.0.0.1:1", DELTAL_RUNS=str(tmp_path))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    line = refused("train", TINY, "--run", "r", DELTAL_RUNS=str(tmp_path / "file"))
    assert f"{tmp_path}/file/r cannot be written: Not a directory" in line


def test_a_ray_that_cannot_be_started_here_is_told_with_what_to_do(tmp_path: Path):
    deep = tmp_path / ("a" * 90)
    deep.mkdir()
    line = refused("train", TINY, "--run", "r", DELTAL_RUNS=str(tmp_path / "runs"), RAY_TMPDIR=str(deep))
    assert "a local Ray could not be started" in line
    assert "set RAY_TMPDIR" in line


@pytest.mark.parametrize("verb", ["status", "stop", "resume", "audit", "pause"])
def test_a_run_that_does_not_exist_is_named(verb: str, tmp_path: Path):
    assert "there is no run nowhere" in refused(verb, "nowhere", DELTAL_RUNS=str(tmp_path))


def test_a_run_to_replay_or_to_begin_from_that_does_not_exist_is_named(tmp_path: Path):
    assert "there is no run nowhere" in refused("replay", "nowhere", "1", DELTAL_RUNS=str(tmp_path))
    assert "there is no run nowhere" in refused("train", TINY, "--from", "nowhere:3", DELTAL_RUNS=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_what_decides_the_training_names_the_key_and_changes_nothing(tmp_path: Path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.make()
    folder.write_config(load_config(TINY))
    for override, key in (("rollout.temperature=0.5", "rollout.temperature"), ("model.seed=9", "model.seed")):
        assert f"{key} = " in refused("resume", "run", override, DELTAL_RUNS=str(tmp_path))
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert folder.config() == load_config(TINY)


def test_scaling_a_run_that_does_not_exist_is_refused(tmp_path: Path):
    assert "there is no run nowhere" in refused("scale", "nowhere", "rollout=2", DELTAL_RUNS=str(tmp_path))
    assert "must look like" in refused("scale", "nowhere", "rollouts=2", DELTAL_RUNS=str(tmp_path))


def test_an_unknown_verb_or_option_is_the_users_mistake():
    assert deltal("trian", TINY).returncode == 2
    assert deltal("train", TINY, "--no-such-option").returncode == 2


@pytest.mark.parametrize("path", sorted(str(p) for p in Path(TINY).parent.glob("*.yaml")))
def test_every_configuration_plans_without_a_hub(path: str):
    result = deltal("train", path, "--dry-run", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert "parameters" in result.stdout
    assert "learner" in result.stdout
    facts = json.loads(deltal("train", path, "--dry-run", "--json", HF_HUB_OFFLINE="1").stdout)
    assert {"rollout", "learner", "verify"} <= {actor["role"] for actor in facts["actors"]}
    assert (facts["not_looked_at"] == ["model Qwen/Qwen2.5-3B"]) is ("3b" in path)


def test_config_explains_every_setting():
    result = deltal("config", TINY)
    assert result.returncode == 0
    for key in ("learner.learning_rate", "replay.max_staleness", "algorithm.aggregation.alpha", "data.name"):
        assert key in result.stdout
    assert json.loads(deltal("config", TINY, "--json").stdout)["learner"]["ranks"] == 1


def test_doctor_says_what_it_found_in_words_and_json():
    found = json.loads(deltal("doctor", "--json").stdout)
    assert {"Python", "torch", "Ray"} <= {finding["name"] for finding in found}


def _config(folder: Path, data: str, model: str = "{kind: random}") -> str:
    path = folder / "config.yaml"
    path.write_text(f"model: {model}\n{data}\n")
    return str(path)
