"""TRL's side of the learner bench, run by TRL's own venv: `-m tests.bench.learner_trl MODEL BATCH.json ROWS RECOMPUTE`.

Imports nothing of deltal. GRPOTrainer's own `compute_loss` on the inputs its `_prepare_inputs` would hand to it: padded
to the longest of the whole generation batch, shuffled, cut into `ROWS` a forward, gradients accumulated.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.bench.peak import peak_bytes, reset_peak

THREADS = 2


def trainer_of(folder: str, responses: int, rows: int, limit: int, *, recompute: bool) -> GRPOTrainer:
    """As a user sets it up for fp32 on CPU without vLLM; the loss is the one deltal calls dr_grpo."""
    settings = GRPOConfig(
        output_dir="build/trl", report_to="none", use_cpu=True, bf16=False, beta=0.0, loss_type="dr_grpo",
        per_device_train_batch_size=rows, gradient_accumulation_steps=responses // rows, num_generations=4,
        max_completion_length=limit, temperature=1.0, gradient_checkpointing=recompute,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "none"}] * responses),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.model.train()
    # What its training loop would set before the first step.
    trainer.current_gradient_accumulation_steps = responses // rows
    if recompute:
        trainer.model.gradient_checkpointing_enable(settings.gradient_checkpointing_kwargs)
    return trainer


def generation_batch(batch: dict[str, Any], pad: int) -> dict[str, torch.Tensor]:
    """All responses in one padded batch, as `_generate_and_score_completions` makes it: prompts left, answers right."""
    prompts = [batch["prompts"][one["prompt"]] for one in batch["responses"]]
    answers = [one["tokens"] for one in batch["responses"]]
    wide, long = max(map(len, prompts)), max(map(len, answers))
    return {
        "prompt_ids": torch.tensor([[pad] * (wide - len(one)) + one for one in prompts]),
        "prompt_mask": torch.tensor([[0] * (wide - len(one)) + [1] * len(one) for one in prompts]),
        "completion_ids": torch.tensor([one + [pad] * (long - len(one)) for one in answers]),
        "completion_mask": torch.tensor([[1] * len(one) + [0] * (long - len(one)) for one in answers]),
        "advantages": torch.tensor([one["advantage"] for one in batch["responses"]]),
    }


def forward_backward(trainer: GRPOTrainer, inputs: dict[str, torch.Tensor], rows: int) -> None:
    """Every response once, `rows` at a time."""
    for start in range(0, len(inputs["advantages"]), rows):
        part = {name: tensor[start : start + rows] for name, tensor in inputs.items()}
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, part))


def main() -> None:
    """Print seconds, peak and gradient norm of one batch as JSON."""
    folder, path, rows, recompute = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "recompute"
    torch.set_num_threads(THREADS)
    batch = json.loads(Path(path).read_text())
    trainer = trainer_of(folder, len(batch["responses"]), rows, batch["limit"], recompute=recompute)
    inputs = generation_batch(batch, 0)
    order = torch.randperm(len(batch["responses"]), generator=torch.Generator().manual_seed(0))
    inputs = {name: tensor[order] for name, tensor in inputs.items()}
    warm_up = {name: tensor[:1, :32] if tensor.dim() > 1 else tensor[:1] for name, tensor in inputs.items()}
    forward_backward(trainer, warm_up, 1)
    trainer.model.zero_grad(set_to_none=True)
    reset_peak()
    started = time.perf_counter()
    forward_backward(trainer, inputs, rows)
    seconds = time.perf_counter() - started
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    print(json.dumps({
        "seconds": seconds, "peak_bytes": peak_bytes(), "gradient_norm": float(norm),
        "forwarded": inputs["prompt_ids"].numel() + inputs["completion_ids"].numel(),
        "versions": f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
