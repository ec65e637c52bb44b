"""The whole job on the tiny model: one real run, looked at from all sides (and scaled and scraped while it goes on)."""

import itertools
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from deltal.config.algorithm import AutoAlpha
from deltal.learner.export import export
from deltal.learner.model import prepare
from deltal.monitor.metrics import metric_names
from deltal.replay.journal import Journal
from deltal.replay.ledger import Admitted, BatchFormed
from tests.launch import TINY, LiveRun, deltal

STEPS = 40
LONG_PROMPT = "Write one of the letters a, e, i. " * 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A finished run and what was seen while it ran."""
    root = tmp_path_factory.mktemp("runs")
    data = root / "data.jsonl"
    letters = ["aei", "bdt", "osn"]
    rows = [
        {"id": f"q{i}", "prompt": f"{i}: write one of {letters[i % 3]}.", "answer": letters[i % 3], "task": "letters"}
        for i in range(200)
    ]
    rows[5]["prompt"] = LONG_PROMPT
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (
        f"run.steps={STEPS}", "data.kind=jsonl", f"data.path={data}", "learner.checkpoint_every=1",
        "learner.keep_checkpoints=100", "rollout.num_cpus=0.25", "replay.max_ahead=1",
        # Entropy trains every response, so that each has a sketch for β.
        "algorithm.aggregation.alpha=auto", "algorithm.entropy_coefficient=1e-4",
    )  # fmt: skip
    config = root / "job.yaml"
    lines = Path(TINY).read_text().splitlines()
    config.write_text("\n".join("data: {}" if line.startswith("data:") else line for line in lines))
    seen: dict[str, Any] = {}
    with LiveRun(root, "job", *overrides, config=str(config)) as run:
        # Paused before it trains: the tiny model would be done before a second terminal has joined.
        run.until(lambda: run.summary().get("state") == "evaluating", "the evaluation")
        seen["pause"] = deltal("pause", str(root / "job"))
        run.until(lambda: run.summary().get("state") == "training", "training to begin")
        seen["status"] = deltal("status", str(root / "job"), "--json")
        seen["too many"] = deltal("scale", str(root / "job"), "rollout=99")
        seen["pending"] = run.until(lambda: run.summary()["pending"].get("rollout"), "workers without a place", 15.0)
        seen["with pending"] = deltal("status", str(root / "job"))
        seen["scale"] = deltal("scale", str(root / "job"), "rollout=2", "verify=2")
        address = run.summary()["address"]
        seen["page"] = _get(address + "/")
        seen["targets"] = run.until(lambda: _with_all_roles(json.loads(_get(address + "/sd"))), "all scrape targets")
        run.until(lambda: run.worker_is_loaded("rollout-1"), "the second worker to load its weights")
        seen["scraped"] = {
            target["labels"]["actor"]: _get(f"http://{target['targets'][0]}/metrics") for target in seen["targets"]
        }
        seen["listening"] = run.listening()
        seen["second"] = deltal("train", str(config), *overrides, "--run", "job", DELTAL_RUNS=str(root))
        seen["unpause"] = deltal("unpause", str(root / "job"))
        run.until_step(3)
        deltal("pause", str(root / "job"))
        seen["later"] = [_get(f"http://{target['targets'][0]}/metrics") for target in seen["targets"]]
        seen["scale_down"] = deltal("scale", str(root / "job"), "rollout=1")
        deltal("unpause", str(root / "job"))
        seen["summary"] = run.end()
        seen["rows"], seen["audit"], seen["text"] = run.rows(), run.audit(), run.text()
        seen["folder"], seen["root"] = run.folder, root
        yield seen


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def _with_all_roles(targets: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    actors = {target["labels"]["actor"] for target in targets}
    wanted = {"controller", "prompt", "rollout", "replay", "policy", "learner-0", "rollout-0", "rollout-1", "verify-0"}
    return targets if wanted == actors - {"verify-1"} else None


def test_the_run_is_done_and_says_so(job: dict[str, Any]):
    summary = job["summary"]
    assert summary["state"] == "done"
    assert summary["steps"] == summary["policy_version"] == STEPS
    assert 0 <= summary["accuracy_before"] <= 1
    assert 0 <= summary["accuracy_after"] <= 1
    assert len(summary["gain_interval_95"]) == 2
    assert summary["tokens_per_second"]["rollout"] > 0
    assert summary["tokens_per_second"]["learner"] > 0
    assert 0.5 < summary["peak_memory_gib"] < 10
    assert {"starting", "evaluation_before", "training", "evaluation_after", "exporting"} <= set(summary["seconds"])
    assert "before" in job["text"]


def test_every_step_has_its_row_with_finite_figures(job: dict[str, Any]):
    rows = job["rows"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert np.isfinite([row["loss"], row["grad_norm"], row["entropy"], row["reward"]]).all()
        assert row["staleness_max"] <= 2
        assert row["groups"] == 4
        assert not row["skipped"]
        if row["logprob_difference_max"] is not None:
            assert row["logprob_difference_max"] < 1e-3, "engine and learner agree where the version is the same"


def test_alpha_is_taken_from_the_batches_before_and_only_when_certain(job: dict[str, Any]):
    auto, rows = AutoAlpha(), [row["variance"] for row in job["rows"]]
    assert rows[0]["alpha"] == auto.fallback
    for before, after in itertools.pairwise(rows):
        half_width = before["beta_half_width"]
        certain = half_width is not None and half_width <= auto.certain_within
        beta = min(max(before["beta_smoothed"], auto.low), auto.high) if certain else auto.fallback
        assert after["alpha"] == pytest.approx(beta)
    assert any(row["beta"] is not None for row in rows)


def test_the_ledger_balances_and_is_proved_from_the_folder_alone(job: dict[str, Any]):
    counts = job["audit"]["counts"]
    assert counts["consumed"] == 4 * STEPS
    assert counts["issued"] == counts["consumed"] + counts["filtered"] + counts["evicted"] + counts["in_flight"]
    assert job["audit"]["violations"] == []
    assert job["summary"]["ledger"] == counts


def test_a_prompt_over_the_limit_is_counted_and_skipped(job: dict[str, Any]):
    assert job["summary"]["prompts_skipped"] == job["audit"]["reasons"].get("filtered:prompt_too_long", 0) == 1


def test_weights_change_in_the_workers_and_are_those_of_the_learner(job: dict[str, Any], tmp_path: Path):
    """Every sampled token's log-probability equals a transformers forward of the checkpoint its span names."""
    config = job["folder"].config()
    admitted = [r.scored.group for r in Journal(job["folder"].path("journal")).read() if isinstance(r, Admitted)]
    checked: dict[int, float] = {}
    models = {0: _logits(prepare(config.model))}
    for version in range(1, 7):
        export(job["folder"].path("checkpoints"), str(tmp_path / str(version)), config=config, version=version)
        models[version] = _logits(str(tmp_path / str(version)))
    for group in admitted:
        for response in group.responses:
            row = np.concatenate([group.prompt_tokens, response.tokens])
            for i, span in enumerate(response.spans):
                if span.version not in models:
                    continue
                end = response.spans[i + 1].start if i + 1 < len(response.spans) else len(response.tokens)
                logprobs = models[span.version](row)[len(group.prompt_tokens) - 1 :]
                expected = logprobs[np.arange(span.start, end), response.tokens[span.start : end]]
                worst = float(np.abs(expected - response.logprobs[span.start : end]).max())
                checked[span.version] = max(checked.get(span.version, 0.0), worst)
    assert len(checked) >= 3, f"tokens of several versions were sampled: {sorted(checked)}"
    assert max(checked.values()) < 1e-4, checked
    some = np.arange(40)
    assert np.abs(models[0](some) - models[6](some)).max() > 1e-3, "training changed the weights"


def _logits(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(row: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.as_tensor(row.astype(np.int64))[None]).logits[0]
        return torch.log_softmax(logits, dim=-1).numpy()

    return logprobs


def test_the_export_loads_in_plain_transformers_with_its_tokenizer(job: dict[str, Any]):
    from transformers import AutoTokenizer

    folder = job["folder"].path("export")
    _logits(folder)(np.arange(10))
    assert AutoTokenizer.from_pretrained(folder).decode([72, 105])
    assert "delta_l" in (Path(folder) / "README.md").read_text()


def test_workers_are_added_and_removed_while_the_learner_goes_on(job: dict[str, Any]):
    for command in ("scale", "scale_down", "pause", "unpause"):
        assert job[command].returncode == 0, job[command].stdout + job[command].stderr
    workers = {r.scored.group.worker for r in Journal(job["folder"].path("journal")).read() if isinstance(r, Admitted)}
    assert "rollout-1" in workers, "the added worker sampled groups"
    assert job["summary"]["restarts"] == {}


def test_prometheus_finds_and_scrapes_every_actor(job: dict[str, Any]):
    known = metric_names()
    for actor, text in job["scraped"].items():
        families = {family.name: family for family in text_string_to_metric_families(text)}
        own = {sample.name for family in families.values() for sample in family.samples}
        assert any(name.startswith("deltal_") for name in own), actor
        assert {name for name in own if name.startswith("deltal_")} <= known, actor
        for family in families.values():
            for sample in family.samples:
                assert sample.labels.get("run") == "job", (actor, sample)
    tokens = [
        line for line in job["scraped"]["rollout-0"].splitlines() if line.startswith("deltal_rollout_tokens_total{")
    ]
    assert float(tokens[0].rsplit(" ", 1)[1]) > 0


def test_every_metric_is_there_once_a_run_trains(job: dict[str, Any]):
    """A counter by labels appears with the first label that occurs: a calm run filters, evicts and restarts nothing."""
    there = {line.split("{")[0] for text in job["later"] for line in text.splitlines() if not line.startswith("#")}
    calm = {"deltal_replay_evicted_total", "deltal_controller_restarts_total", "deltal_controller_evaluation_accuracy"}
    histograms = {name for name in metric_names() if name.endswith(("_bucket", "_sum", "_count"))}
    missing = metric_names() - there - calm - histograms
    # What a batch could not tell has no number: β without spread of lengths, a difference without equal versions.
    assert missing <= {
        "deltal_learner_beta", "deltal_learner_beta_half_width", "deltal_learner_logprob_difference_max",
        "deltal_replay_filtered_total",
    }  # fmt: skip


def test_workers_without_a_place_are_told_and_hold_nobody_up(job: dict[str, Any]):
    assert job["too many"].returncode == 0
    told = job["pending"]
    assert told["count"] > 50
    assert told["needs"] == {"CPU": 0.25}
    assert told["free"]["CPU"] < 0.25
    assert "rollout wait for CPU 0.250 each" in job["with pending"].stdout


def test_status_tells_a_living_run(job: dict[str, Any]):
    told = json.loads(job["status"].stdout)
    assert told["alive"]
    assert told["name"] == "job"


def test_a_run_folder_in_use_is_refused(job: dict[str, Any]):
    assert job["second"].returncode == 2
    assert "in use" in job["second"].stderr


def test_the_report_holds_its_plots_and_nothing_unescaped(job: dict[str, Any]):
    report = (Path(job["folder"].path("report.html"))).read_text()
    assert report.count("<svg") >= 6
    assert "<script src" not in report
    assert "rollout.max_response_tokens</th><td>24" in report, "its settings are in it"


def test_each_group_of_a_batch_record_was_admitted_before_it(job: dict[str, Any]):
    admitted = set()
    for record in Journal(job["folder"].path("journal")).read():
        if isinstance(record, Admitted):
            admitted.add(record.scored.group.id)
        elif isinstance(record, BatchFormed):
            assert set(record.ids) <= admitted


def test_the_trained_model_can_be_evaluated_and_exported_later(job: dict[str, Any], tmp_path: Path):
    measured = deltal(
        "eval", str(job["root"] / "job"), "--prompts", "8", "--responses", "2", "--json",
        "--set", "rollout.max_response_tokens=3",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    row = json.loads(measured.stdout)
    assert row["prompts"] == 8
    assert 0 <= row["accuracy"] == row["pass_at"]["1"]["value"] <= row["pass_at"]["2"]["value"] <= 1
    assert row["response_length"] <= 3
    exported = deltal("export", str(job["root"] / "job"), str(tmp_path / "model"), "--step", "2")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "model" / "config.json").exists()


def test_a_local_run_listens_on_loopback_only(job: dict[str, Any]):
    assert len(job["listening"]) > 10
    assert {address for address in job["listening"] if not address.startswith("127.") and address != "::1"} == set()
