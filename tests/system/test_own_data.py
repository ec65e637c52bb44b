"""A run whose own data give it nothing to train on."""

import json
from pathlib import Path

import pytest

from tests.launch import TINY, deltal


@pytest.mark.slow
def test_a_run_that_gets_only_prompts_too_long_names_the_setting(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    # One that fits: when none does, the run does not start.
    rows = [{"prompt": f"{i}" * (300 if i else 1), "answer": "a", "task": "letters"} for i in range(60)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    result = deltal(
        "train", TINY, f"data={{kind: jsonl, path: {data}}}", "evaluation.data=null", "replay.max_refill=1",
        "--run", "long", DELTAL_RUNS=str(tmp_path), timeout=300.0,
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    assert "longer than chat.max_prompt_tokens before batch 0" in result.stderr
    assert "easy" not in result.stderr
