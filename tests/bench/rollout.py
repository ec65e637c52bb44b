"""Rollout of a run against plain vLLM: `python -m tests.bench.rollout` (make bench-rollout), 5 minutes on 2 cores.

Both sample the same prompts of configs/demo.yaml with the same settings and weights, one after the other in the same
minutes: vLLM alone, a deltal run whose learning rate is next to nothing, vLLM alone again. A run's rollout seconds are
what its learner waited for a batch: queues, verification, replay buffer and journal included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deltal.config.file import load_config
from deltal.data.chat import Chat
from deltal.data.cursor import PromptCursor
from deltal.data.datasets import load_prompts

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
BATCHES = 4
"""The first is warm-up in both."""


def alone() -> None:
    """Plain vLLM in this process; prints tokens and seconds of each batch as JSON."""
    from deltal.learner.model import prepare
    from deltal.rollout.vllm_engine import environment

    config = load_config(CONFIG)
    rollout = config.rollout
    os.environ.update(environment(rollout))
    model = prepare(config.model)
    from vllm import LLM, SamplingParams

    chat, prompts = Chat(model, config.chat), load_prompts(config.data)
    limit = config.chat.max_prompt_tokens + rollout.max_response_tokens
    engine = LLM(
        model, dtype=rollout.dtype, max_model_len=limit, max_num_seqs=rollout.max_sequences, enforce_eager=True,
        block_size=32, max_num_batched_tokens=rollout.max_sequences * limit, seed=0,
    )  # fmt: skip
    cursor = PromptCursor(len(prompts), config.run.seed)
    told = []
    for _ in range(BATCHES):
        rows = [cursor.row(cursor.next()) for _ in range(config.replay.prompts_per_batch)]
        tokens = [{"prompt_token_ids": chat.encode(prompts[row]).tolist()} for row in rows]
        sampling = SamplingParams(
            n=rollout.responses_per_prompt, temperature=rollout.temperature, logprobs=0, detokenize=False,
            max_tokens=rollout.max_response_tokens, stop_token_ids=list(chat.stop_token_ids),
        )  # fmt: skip
        started = time.perf_counter()
        outputs = engine.generate(tokens, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        told.append((sum(len(one.token_ids) for output in outputs for one in output.outputs), seconds))
    print(json.dumps(told))


def _alone() -> list[list[float]]:
    command = [sys.executable, "-m", "tests.bench.rollout", "alone"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    measured: list[list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured[1:]


def _run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as root:
        command = [
            sys.executable, "-m", "deltal", "train", CONFIG, f"run.steps={BATCHES}", "learner.learning_rate=1e-12",
            "evaluation.data=null", "run.export=false", f"run.folder={root}", "--run", "bench", "--json",
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, check=True, timeout=900)
        rows = [json.loads(line) for line in (Path(root) / "bench" / "metrics.jsonl").read_text().splitlines()]
    return rows[1:]


def main() -> None:
    """Measure and tell."""
    from tests.bench.table import tell

    before, run, after = _alone(), _run(), _alone()
    rates = {
        "vLLM alone, before": [tokens / seconds for tokens, seconds in before],
        "deltal, while a batch is awaited": [row["tokens"] / row["seconds"]["wait"] for row in run],
        "deltal, engine busy": [row["rollout_tokens_per_second"] for row in run],
        "vLLM alone, after": [tokens / seconds for tokens, seconds in after],
    }
    mean = {name: sum(values) / len(values) for name, values in rates.items()}
    alone_rate = (mean["vLLM alone, before"] + mean["vLLM alone, after"]) / 2
    rows = [
        {"what": name, "tokens/s": mean[name], "least": min(values), "most": max(values)}
        for name, values in rates.items()
    ]
    tell("rollout", rows, {
        "engine busy / vLLM alone": mean["deltal, engine busy"] / alone_rate,
        "awaited / vLLM alone": mean["deltal, while a batch is awaited"] / alone_rate,
    })  # fmt: skip


if __name__ == "__main__":
    alone() if sys.argv[1:] == ["alone"] else main()
