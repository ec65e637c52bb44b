"""A run on a file as people have it: broken rows, some rows held out, a resume, and a file that changes under it."""

import json
from pathlib import Path

from deltal.replay.journal import Journal
from deltal.replay.ledger import Admitted
from tests.launch import TINY, LiveRun, deltal


def trained(run: LiveRun) -> set[str]:
    """Questions of all groups in the journal, which holds those of training and no others."""
    records = [record for record in Journal(run.folder.path("journal")).read() if isinstance(record, Admitted)]
    return {record.scored.group.prompt.messages[0].content for record in records}


def test_a_run_leaves_broken_rows_out_never_trains_what_it_holds_out_and_goes_on_with_the_same_rows(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}: write one of aei.", "answer": "aei", "task": "letters"} for i in range(14)]
    broken = ["{", json.dumps(rows[0] | {"prompt": "7?", "answer": "7"}), json.dumps(rows[0] | {"answer": "\ud800"})]
    lines = [json.dumps(row) for row in rows]
    data.write_text("\n".join([*lines[:4], *broken, *lines[4:]]))
    of_data = (f"data={{kind: jsonl, path: {data}, on_bad_rows: skip}}", "evaluation.data={split_off: 4}")
    with LiveRun(tmp_path, "run", *of_data, "run.steps=5", "run.export=false") as run:
        summary = run.end()
        assert (summary["state"], summary["rows_skipped"]) == ("done", 3)
        assert "data.jsonl:5: no JSON" in run.text()
        assert "data.jsonl:6: the answer '7' of a letters prompt holds no letter" in run.text()
        assert run.folder.rows("evaluations.jsonl")[0]["prompts"] == 4
        questions = trained(run)
        assert len(questions) == 10, "five batches of four walk twice through the ten rows that are left"
    with LiveRun(tmp_path, "run", "run.steps=8", verb="resume") as again:
        assert (again.end()["policy_version"], again.summary()["rows_skipped"]) == (8, 3)
        assert trained(again) == questions
    data.write_text(data.read_text().replace("13: write", "14: write"))
    refused = deltal("resume", str(tmp_path / "run"), "run.steps=9")
    assert refused.returncode == 2
    assert "is not what this run began with" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_run_that_got_only_prompts_too_long_names_the_setting(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}" * 300, "answer": "a", "task": "letters"}) for i in range(8)))
    result = deltal(
        "train", TINY, f"data={{kind: jsonl, path: {data}}}", "evaluation.data=null", "replay.max_refill=1",
        "--run", "long", DELTAL_RUNS=str(tmp_path), timeout=300.0,
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    assert "longer than chat.max_prompt_tokens before batch 0" in result.stderr
    assert "easy" not in result.stderr
