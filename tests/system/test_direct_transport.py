"""`learner.transport: direct`: weights go from rank to worker and past the object store."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from tests.launch import LiveRun


def test_workers_sample_with_the_weights_of_both_ranks_fetched_from_them(tmp_path: Path):
    with LiveRun(
        tmp_path, "direct", "learner.transport=direct", "learner.ranks=2", "learner.num_cpus=0.25",
        "rollout.num_cpus=0.25", "run.steps=5", "evaluation.data=null",
    ) as run:  # fmt: skip
        summary = run.end()
        rows = run.rows()
        exported = AutoModelForCausalLM.from_pretrained(run.folder.path("export"))
    assert exported.num_parameters() > 0, "one of the two ranks writes the export by itself"
    assert (summary["state"], summary["policy_version"], summary["restarts"]) == ("done", 5, {})
    agreed = [row["logprob_difference_max"] for row in rows if row["logprob_difference_max"] is not None]
    assert agreed, "some tokens were sampled with the learner's own version"
    assert max(agreed) < 1e-3, "engine and learner agree, so the weights that came are the learner's"
    assert max(row["version"] - row["staleness_max"] for row in rows) > 0, "newer versions than the first were loaded"
