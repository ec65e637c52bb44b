"""The learner's step against TRL's GRPOTrainer loss: `python -m tests.bench.learner` (make bench-learner).

The same model (SmolLM2-135M, float32), tokens, loss (dr_grpo) and threads, each in a process of its own, turn about:
forward, loss and backward of one batch, no optimizer step. Two spreads of response lengths: heavy-tailed (quantiles of
a log-normal, so that no draw is lucky) and all equal. Useful tokens are those the policy wrote; both sides compute all
of them, and the norm of their gradient must be the same number. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltal.config import LearnerConfig, ModelShape
from deltal.config.algorithm import AlgorithmConfig
from deltal.config.file import load_config
from deltal.learner.batch import Item, pack
from deltal.learner.model import load, prepare
from deltal.learner.step import StepSums, accumulate, grad_norm
from deltal.plan.memory import parameter_count
from deltal.types import Group, GroupId, Message, Prompt, Response, Span
from tests.bench.peak import peak_bytes, reset_peak
from tests.bench.table import FOLDER, matmul_limit, tell

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "demo.yaml")
TRL_PYTHON = ROOT / "build" / "trl-venv" / "bin" / "python"
THREADS = 2
PROMPTS, RESPONSES, PROMPT_TOKENS = 4, 4, 64
SHORTEST, LONGEST, MEDIAN, SIGMA = 32, 1024, 128, 1.0
"""Tokens of a heavy-tailed response; SIGMA is of its logarithm."""
EQUAL = 256
DELTAL, RECOMPUTING = "deltal", "deltal, recomputing"
TRL_SIDES = {
    "TRL, batch 8 (its defaults)": ("8", "recompute"),
    "TRL, batch 2, no recomputation": ("2", "keep"),
}
"""Name of a side to rows a forward, and whether activations are recomputed."""


def lengths(spread: str) -> list[int]:
    """Response lengths in the order of the responses, prompt by prompt."""
    count = PROMPTS * RESPONSES
    if spread == "equal":
        return [EQUAL] * count
    quantiles = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    told = np.clip(MEDIAN * np.exp(SIGMA * np.array(quantiles)), SHORTEST, LONGEST).astype(int)
    return [int(one) for one in np.random.default_rng(0).permutation(told)]


def write_batch(spread: str) -> Path:
    """The batch as JSON, for both sides: prompts, and each response's tokens and advantage."""
    draw = np.random.default_rng(1)
    rewards = np.tile([0.0, 1.0, 1.0, 0.0], PROMPTS * RESPONSES // 4)
    responses = [
        {
            "prompt": i // RESPONSES,
            "tokens": draw.integers(0, 49_000, length).tolist(),
            "advantage": float(reward) - 0.5,
        }
        for i, (length, reward) in enumerate(zip(lengths(spread), rewards, strict=True))
    ]
    prompts = [draw.integers(0, 49_000, PROMPT_TOKENS).tolist() for _ in range(PROMPTS)]
    path = FOLDER / f"learner-{spread}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompts": prompts, "responses": responses, "limit": LONGEST}))
    return path


def items_of(batch: dict[str, Any]) -> list[Item]:
    """The same batch as the learner gets it, with dr_grpo's coefficients."""
    answers = batch["responses"]
    told = [
        Response(
            tokens=np.array(one["tokens"], dtype=np.int32), logprobs=np.zeros(len(one["tokens"]), dtype=np.float32),
            mask=np.ones(len(one["tokens"]), dtype=np.bool_), spans=(Span(start=0, version=0),), finish="stop", text="",
        )
        for one in answers
    ]  # fmt: skip
    groups = [
        Group(
            id=GroupId(purpose="train", epoch=0, index=i), issued_version=0, worker="", seconds=0.0,
            prompt=Prompt(id=str(i), task="", messages=(Message(role="user", content=""),), answer="", fields={}),
            prompt_tokens=np.array(prompt, dtype=np.int32),
            responses=tuple(r for r, one in zip(told, answers, strict=True) if one["prompt"] == i),
        )
        for i, prompt in enumerate(batch["prompts"])
    ]  # fmt: skip
    coefficient = 1.0 / (len(told) * batch["limit"])
    return [
        Item(place=i, group=groups[one["prompt"]], response=r, advantage=one["advantage"], coefficient=coefficient)
        for i, (r, one) in enumerate(zip(told, answers, strict=True))
    ]


def deltal_side(folder: str, path: str, recompute: bool) -> None:
    """In this process; prints seconds, peak, gradient norm and the matmul limit as JSON."""
    torch.set_num_threads(THREADS)
    settings, algorithm = LearnerConfig(), AlgorithmConfig.model_validate({"importance": {"kind": "none"}})
    model: Any = load(folder)
    if recompute:
        model.gradient_checkpointing_enable()

    def forward_backward(items: Sequence[Item]) -> int:
        (micros,) = pack(items, budget=settings.micro_batch_tokens, ranks=1)
        accumulate(
            model, micros, [None] * len(micros), algorithm, temperature=1.0, version=0, sums=StepSums(),
            chunk=settings.logit_chunk_tokens,
        )  # fmt: skip
        return sum(len(micro.tokens) for micro in micros)

    items = items_of(json.loads(Path(path).read_text()))
    forward_backward(sorted(items, key=lambda item: item.response.length)[:1])
    model.zero_grad(set_to_none=True)
    reset_peak()
    started = time.perf_counter()
    forwarded = forward_backward(items)
    told = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes(), "forwarded": forwarded}
    told["gradient_norm"] = grad_norm(model.parameters())
    print(json.dumps(told | {"limit": matmul_limit(3.0)}))


def run(side: str, folder: str, path: Path) -> dict[str, Any]:
    """One side's pass in a process of its own."""
    if side in TRL_SIDES:
        command = [str(TRL_PYTHON), "-m", "tests.bench.learner_trl", folder, str(path), *TRL_SIDES[side]]
    else:
        how = "recompute" if side == RECOMPUTING else "keep"
        command = [sys.executable, "-m", "tests.bench.learner", folder, str(path), how]
    settings = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **settings}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{path.stem}, {side}: {told['seconds']:.1f} s", file=sys.stderr)
    return told


def needed_flops(shape: ModelShape, batch: dict[str, Any]) -> float:
    """Least FLOPs of forward and backward: each prompt once, each response once, logits of response tokens only.

    6 a weight and token, and 12 · width of all heads · context a token and layer for attention.
    """
    head = shape.vocab_size * shape.hidden_size
    trunk = parameter_count(shape) - head
    total = 0.0
    attention = 12.0 * shape.layers * shape.heads * shape.head_dim
    for prompt in batch["prompts"]:
        total += 6.0 * trunk * len(prompt) + attention * len(prompt) ** 2 / 2
    for one in batch["responses"]:
        length, before = len(one["tokens"]), len(batch["prompts"][one["prompt"]])
        total += 6.0 * (trunk + head) * length + attention * (length * before + length**2 / 2)
    return total


def main() -> None:
    """Measure and tell."""
    model = load_config(CONFIG).model
    assert model.shape is not None
    folder, rows, ratios = prepare(model), [], {}
    for spread in ("heavy", "equal"):
        path = write_batch(spread)
        batch = json.loads(path.read_text())
        useful = sum(len(one["tokens"]) for one in batch["responses"])
        told: dict[str, list[dict[str, Any]]] = {}
        for side in (DELTAL, *TRL_SIDES, RECOMPUTING, DELTAL):
            told.setdefault(side, []).append(run(side, folder, path))
        limit = float(np.mean([one["limit"] for one in told[DELTAL]]))
        rate = {side: useful / float(np.mean([one["seconds"] for one in passes])) for side, passes in told.items()}
        peak = {side: max(one["peak_bytes"] for one in passes) / 2**30 for side, passes in told.items()}
        least = needed_flops(model.shape, batch) / useful
        for side, passes in told.items():
            rows.append({
                "lengths": spread,
                "side": side,
                "useful tokens/s": rate[side],
                "forwarded a useful": passes[0]["forwarded"] / useful,
                "peak GiB": peak[side],
                "of the matmul limit": least * rate[side] / limit,
                "gradient norm": passes[0]["gradient_norm"],
            })  # fmt: skip
        for side in TRL_SIDES:
            ratios[f"{spread}: tokens/s, deltal / {side}"] = rate[DELTAL] / rate[side]
            ratios[f"{spread}: peak, deltal / {side}"] = peak[DELTAL] / peak[side]
    tell("learner", rows, ratios)


if __name__ == "__main__":
    deltal_side(sys.argv[1], sys.argv[2], sys.argv[3] == "recompute") if len(sys.argv) > 1 else main()
