"""Builders shared by the tests: groups, scored groups and settings with only what a law is about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltal.config import RunConfig
from deltal.types import Group, GroupId, Message, Prompt, Response, ScoredGroup, Span, Verdict


def gid(index: int, *, epoch: int = 0, purpose: Any = "train") -> GroupId:
    return GroupId(purpose=purpose, epoch=epoch, index=index)


def prompt(index: int = 0) -> Prompt:
    question = Message(role="user", content=f"question {index}")
    return Prompt(id=f"q{index}", task="largest", messages=(question,), answer=str(index), fields={"nums": [index, 2]})


def response(
    length: int, *, version: int = 0, finish: Any = "stop", seed: int = 0, mask: Sequence[bool] | None = None
) -> Response:
    """Tokens and log-probabilities by `seed`; all tokens written by the policy unless `mask` says otherwise."""
    draw = np.random.default_rng([seed, length])
    return Response(
        tokens=draw.integers(0, 256, length, dtype=np.int32),
        logprobs=-draw.random(length, dtype=np.float32),
        mask=np.ones(length, dtype=np.bool_) if mask is None else np.array(mask, dtype=np.bool_),
        spans=(Span(start=0, version=version),),
        finish=finish,
        text=f"response of {length} tokens",
    )


def verdict(reward: float = 1.0) -> Verdict:
    reason = "equal" if reward > 0 else "different"
    return Verdict(reward=reward, correct=reward > 0, parsed="7", reason=reason, seconds=0.1)


def scored(
    id: GroupId | int,
    *,
    rewards: Sequence[float] = (0.0, 1.0),
    lengths: Sequence[int] | None = None,
    version: int = 0,
    issued: int | None = None,
    prompt_length: int = 4,
    finishes: Sequence[str] | None = None,
    masks: Sequence[Sequence[bool] | None] | None = None,
) -> ScoredGroup:
    """A scored group: one response a reward; all its tokens sampled under `version`; no reward: prompt too long."""
    id = gid(id) if isinstance(id, int) else id
    count = len(rewards)
    responses = tuple(
        response(length, version=version, finish=finish, seed=1000 * id.index + place, mask=mask)
        for place, (length, finish, mask) in enumerate(
            zip(lengths or [3] * count, finishes or ["stop"] * count, masks or [None] * count, strict=True)
        )
    )
    group = Group(
        id=id,
        prompt=prompt(id.index),
        issued_version=version if issued is None else issued,
        prompt_tokens=np.random.default_rng(id.index).integers(0, 256, prompt_length, dtype=np.int32),
        responses=responses,
        worker="rollout-0",
        seconds=1.5,
    )
    return ScoredGroup(group=group, verdicts=tuple(verdict(reward) for reward in rewards))


def run_config(**rooms: Any) -> RunConfig:
    """Settings of a run of a random model on generated data; `rooms` replaces whole rooms."""
    return RunConfig.model_validate({"model": {"kind": "random"}, "data": {"kind": "generated"}} | rooms)


def numbered(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The same groups with log-probabilities -1, -2, …: each token of the batch can be told by its own."""
    count = 0
    told = []
    for group in groups:
        responses = []
        for answer in group.group.responses:
            numbers = -np.arange(count + 1, count + 1 + len(answer.tokens), dtype=np.float32)
            responses.append(dataclasses.replace(answer, logprobs=numbers))
            count += len(answer.tokens)
        told.append(dataclasses.replace(group, group=dataclasses.replace(group.group, responses=tuple(responses))))
    return told


def tiny_model(architecture: Any = "qwen2", *, tied: bool = True) -> Any:
    """A random model with weights large enough that every token it attends to matters. Needs `model_cache`."""
    import torch

    from deltal.config import ModelShape, RandomModel
    from deltal.learner.model import load, prepare

    model = load(prepare(RandomModel(shape=ModelShape(architecture=architecture, tied_embeddings=tied))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def same(one: Any, other: Any) -> bool:
    """Deep equality of carriers and records: arrays by dtype, shape and bytes, all else by type and value."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if hasattr(one, "__struct_fields__"):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def same_state(one: Any, other: Any) -> bool:
    """`same`, with tensors, which are compared by dtype and every bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_state(a, b) for a, b in zip(one, other, strict=True))
    return same(one, other)


def family_folder(folder: Path, family: str, *, vocab_size: int = 512, **settings: Any) -> str:
    """A model folder of a family of transformers: tiny, with random weights that matter and the byte tokenizer.

    Needs `model_cache`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from deltal.config import RandomModel
    from deltal.data.tokenizer import copy_tokenizer
    from deltal.learner.model import prepare

    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "vocab_size": vocab_size,
        "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | settings), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and norms begin at 0 and 1, where a mistake in them would not show.
                parameter.mul_(4.0).add_(torch.randn_like(parameter) * 0.02)
    model.generation_config.eos_token_id = 256
    model.save_pretrained(folder)
    copy_tokenizer(prepare(RandomModel()), folder)
    return str(folder)
