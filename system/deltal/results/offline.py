"""Rollouts of a model folder on a data set, in this process, without Ray: `deltal eval` and `deltal variance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltal.config import DataConfig, JsonlData, ParquetData, RunConfig, SplitOff
from deltal.config.data import DataColumns
from deltal.config.file import load_config, resolve
from deltal.data.chat import Chat
from deltal.errors import RunNotFoundError, UserError
from deltal.folder import RunFolder
from deltal.plan.model_folder import check_model_folder
from deltal.plan.prompts import checked_prompts, checked_set
from deltal.results.statistics import mean_interval, pass_at
from deltal.rollout.engine import Sampling
from deltal.types import Group, GroupId, Prompt, Response, ScoredGroup, Span
from deltal.verify.judge import judge
from deltal.verify.sandbox.pool import SandboxPool


def sample(
    model: str, prompts: Sequence[Prompt], config: RunConfig, *, responses: int, temperature: float,
    advance: Callable[[int, int], None],
) -> list[ScoredGroup]:  # fmt: skip
    """`responses` verified responses to each prompt, in the prompts' order; none to one that is over the limit.

    `config` gives chat, sampling and verification settings. `advance(done, of)` is called as responses finish.
    """
    from deltal.rollout import vllm_engine

    rollout, chat, limit = config.rollout, Chat(model, config.chat), config.chat.max_prompt_tokens
    engine = vllm_engine.create(model, rollout, max_model_len=limit + rollout.max_response_tokens, seed=config.run.seed)
    encoded = [chat.encode(prompt) for prompt in prompts]
    for i, tokens in enumerate(encoded):
        for r in range(responses if len(tokens) <= limit else 0):
            sampling = Sampling(
                temperature=temperature,
                max_tokens=rollout.max_response_tokens,
                seed=(config.run.seed * 1_000_003 + i * responses + r) % 2**31 if rollout.seed_responses else None,
                stop_token_ids=chat.stop_token_ids,
            )
            engine.add(f"{i}#{r}", tokens, sampling)
    total, finished = engine.running, {}
    while engine.running:
        for sampled in engine.step():
            finished[sampled.key] = Response(
                tokens=sampled.tokens, logprobs=sampled.logprobs, mask=np.ones(len(sampled.tokens), dtype=np.bool_),
                spans=sampled.spans or (Span(start=0, version=0),), finish=sampled.finish,
                text=chat.decode(sampled.tokens),
            )  # fmt: skip
        advance(total - engine.running, total)
    groups = [
        Group(
            id=GroupId(purpose="eval", epoch=0, index=i), prompt=prompt, issued_version=0, worker="", seconds=0.0,
            prompt_tokens=tokens,
            responses=tuple(finished[f"{i}#{r}"] for r in range(responses) if f"{i}#{r}" in finished),
        )
        for i, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True))
    ]  # fmt: skip
    settings = config.verify
    with SandboxPool(processes=settings.processes, timeout=settings.timeout, memory_mib=settings.memory_mib) as pool:
        limit = rollout.max_response_tokens
        return [ScoredGroup(group=g, verdicts=tuple(judge(pool, g, settings, limit=limit))) for g in groups]


def evaluate(
    model: str, prompts: Sequence[Prompt], config: RunConfig, *, responses: int, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """avg@k over prompts with its 95% interval. Overlong responses and prompts over the limit count as wrong."""
    temperature = config.evaluation.temperature
    if temperature is None:
        temperature = config.rollout.temperature
    scored = sample(model, prompts, config, responses=responses, temperature=temperature, advance=advance)
    right = [sum(verdict.correct for verdict in one.verdicts) for one in scored]
    correct = [count / responses for count in right]
    written = [response for one in scored for response in one.group.responses]
    return {
        "model": model,
        "prompts": len(prompts),
        "responses_per_prompt": responses,
        "accuracy": float(np.mean(correct)),
        "interval_95": mean_interval(correct),
        "pass_at": pass_at([(len(one.verdicts), count) for one, count in zip(scored, right, strict=True)]),
        "response_length": float(np.mean([r.length for r in written])) if written else None,
        "overlong": sum(response.finish == "length" for response in written),
        "prompts_too_long": sum(not one.group.responses for one in scored),
    }


def model_and_settings(model: str, config: str | None, overrides: Sequence[str] = ()) -> tuple[str, RunConfig]:
    """The model folder and the settings to sample it with; `model` may be a config, whose start model is meant.

    `overrides`: `key.sub=value` each, over the settings. Raises UserError, ModelError, ConfigError.
    """
    if model.endswith((".yaml", ".yml")):
        from deltal.learner.model import prepare

        settings = load_config(model, overrides)
        return prepare(settings.model), settings
    try:
        folder = RunFolder.find(model)
    except RunNotFoundError:
        if config is None:
            raise UserError(
                f"{model} is no run; to evaluate a model name its settings: --config configs/demo.yaml"
            ) from None
        check_model_folder(model)
        return model, load_config(config, overrides)
    if not folder.exists("export/config.json"):
        raise UserError(f"{folder.name} has no export yet: `deltal export {folder.name} DIR`, then evaluate DIR")
    if config is not None:
        return folder.path("export"), load_config(config, overrides)
    return folder.path("export"), resolve(folder.config().model_dump(mode="json"), overrides, where=folder.name)


def data_source(data: str | None, settings: RunConfig) -> tuple[DataConfig, str]:
    """A file of the user's with the columns of the settings' own held-out data, or that data itself; and the section
    of the settings that it is read by. Raises UserError.
    """
    held_out, base, section = settings.evaluation.data, settings.data, "data"
    if held_out is not None and not isinstance(held_out, SplitOff):
        base, section = held_out, "evaluation.data"
        if data is None:
            return base, section
    if data is None:
        raise UserError("the settings name no evaluation data; give a .jsonl or .parquet file")
    shared = {name: getattr(base, name) for name in DataColumns.model_fields if name != "limit"}
    return (ParquetData if data.endswith(".parquet") else JsonlData)(path=data, **shared), section


def held_out_prompts(data: str | None, settings: RunConfig) -> tuple[list[Prompt], str | None]:
    """The prompts to measure on, and what a person should know of them. Raises UserError."""
    if data is None and isinstance(settings.evaluation.data, SplitOff):
        both = checked_prompts(settings)
        prompts, left_out = both.held_out, both.rows_skipped
    else:
        found = checked_set(*data_source(data, settings), settings.verify)
        prompts, left_out = found.prompts, found.problems.count
    return prompts, f"rows left out, because they cannot be read or judged: {left_out}" if left_out else None
