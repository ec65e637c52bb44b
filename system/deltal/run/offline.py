"""Evaluation of a model folder on a data set, in this process, without Ray: `deltal eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltal.config import RunConfig
from deltal.data.chat import Chat
from deltal.rollout.engine import Sampling
from deltal.run.evaluation import mean_interval
from deltal.types import Prompt
from deltal.verify.sandbox import SandboxPool


def evaluate(
    model: str, prompts: Sequence[Prompt], config: RunConfig, *, responses: int, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """avg@k over prompts with its 95% interval. `config` gives chat, sampling and verification settings.

    `advance(done, of)` is called as responses finish. Overlong responses and prompts over the limit count as wrong.
    """
    from deltal.rollout import vllm_engine

    rollout, chat = config.rollout, Chat(model, config.chat)
    limit = config.chat.max_prompt_tokens
    engine = vllm_engine.create(model, rollout, max_model_len=limit + rollout.max_response_tokens, seed=config.run.seed)
    texts: dict[str, str | None] = {}
    lengths = []
    for i, prompt in enumerate(prompts):
        tokens = chat.encode(prompt)
        for r in range(responses if len(tokens) <= limit else 0):
            sampling = Sampling(
                temperature=config.evaluation.temperature or rollout.temperature,
                max_tokens=rollout.max_response_tokens,
                seed=(config.run.seed * 1_000_003 + i * responses + r) % 2**31 if rollout.seed_responses else None,
                stop_token_ids=chat.stop_token_ids,
            )
            engine.add(f"{i}#{r}", tokens, sampling)
    total = engine.running
    while engine.running:
        for sampled in engine.step():
            is_whole = sampled.finish == "stop" or config.verify.overlong == "verify"
            texts[sampled.key] = chat.decode(sampled.tokens) if is_whole else None
            lengths.append(len(sampled.tokens))
        advance(total - engine.running, total)
    keys = [key for key, text in texts.items() if text is not None]
    settings = config.verify
    with SandboxPool(processes=settings.processes, timeout=settings.timeout, memory_mib=settings.memory_mib) as pool:
        verdicts = pool.verify_many([(prompts[int(key.split("#")[0])], texts[key] or "") for key in keys])
    correct = np.zeros(len(prompts))
    for key, verdict in zip(keys, verdicts, strict=True):
        correct[int(key.split("#")[0])] += verdict.correct / responses
    return {
        "model": model,
        "prompts": len(prompts),
        "responses_per_prompt": responses,
        "accuracy": float(correct.mean()),
        "interval_95": mean_interval(correct.tolist()),
        "response_length": float(np.mean(lengths)) if lengths else None,
        "overlong": sum(text is None for text in texts.values()),
        "prompts_too_long": len(prompts) - total // max(responses, 1),
    }
