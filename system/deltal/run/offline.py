"""Evaluation of a model folder on a data set, in this process, without Ray: `deltal eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltal.config import DataConfig, JsonlData, ParquetData, RunConfig
from deltal.config_file import load_config
from deltal.data.chat import Chat
from deltal.errors import RunNotFoundError, UserError
from deltal.rollout.engine import Sampling
from deltal.run.evaluation import mean_interval
from deltal.run.folder import RunFolder
from deltal.run.model_folder import check_model_folder
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
    limit, temperature = config.chat.max_prompt_tokens, config.evaluation.temperature
    if temperature is None:
        temperature = rollout.temperature
    engine = vllm_engine.create(model, rollout, max_model_len=limit + rollout.max_response_tokens, seed=config.run.seed)
    texts: dict[str, str | None] = {}
    lengths = []
    for i, prompt in enumerate(prompts):
        tokens = chat.encode(prompt)
        for r in range(responses if len(tokens) <= limit else 0):
            sampling = Sampling(
                temperature=temperature,
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


def model_and_settings(model: str, config: str | None) -> tuple[str, RunConfig]:
    """The model folder and the settings to evaluate it with. Raises UserError, ModelError, ConfigError."""
    try:
        folder = RunFolder.find(model)
    except RunNotFoundError:
        if config is None:
            raise UserError(
                f"{model} is no run; to evaluate a model name its settings: --config configs/demo.yaml"
            ) from None
        check_model_folder(model)
        return model, load_config(config)
    if not folder.exists("export/config.json"):
        raise UserError(f"{folder.name} has no export yet: `deltal export {folder.name} DIR`, then evaluate DIR")
    return folder.path("export"), load_config(config) if config else folder.config()


def data_source(data: str | None, settings: RunConfig) -> DataConfig:
    """The held-out data: a file with the columns of the settings' own data, or that itself. Raises UserError."""
    if data is None:
        if settings.evaluation.data is None:
            raise UserError("the settings name no evaluation data; give a .jsonl or .parquet file")
        return settings.evaluation.data
    base = settings.evaluation.data or settings.data
    shared = {name: getattr(base, name) for name in ("template", "task", "prompt_column", "answer_column", "id_column")}
    return ParquetData(path=data, **shared) if data.endswith(".parquet") else JsonlData(path=data, **shared)
