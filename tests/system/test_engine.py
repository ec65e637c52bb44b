"""Real vLLM in this process samples what transformers says of the same weights, before and after updates."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from deltal.config import RandomModel, RolloutConfig
from deltal.errors import ModelError
from deltal.learner.model import load, prepare
from deltal.rollout import vllm_engine
from deltal.rollout.engine import Sampled, Sampling
from deltal.types import TensorBytes

GREEDY = Sampling(temperature=0.0, max_tokens=16, seed=None, stop_token_ids=())
PROMPT = np.arange(60, 100, dtype=np.int32)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load(prepare(RandomModel())).eval()


@pytest.fixture(scope="module")
def engine(model: torch.nn.Module) -> Iterator[vllm_engine.VllmEngine]:
    created = vllm_engine.create(prepare(RandomModel()), RolloutConfig(max_sequences=16), max_model_len=256, seed=1)
    created.load(0, [shard_of(model)])
    yield created
    # vLLM made process groups in this process; later tests make theirs.
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def shard_of(model: torch.nn.Module) -> dict[str, Any]:
    """All weights as a published shard."""
    return {
        name: TensorBytes(
            data=p.detach().clone().contiguous().view(-1).view(torch.uint8).numpy(),
            dtype="float32",
            shape=tuple(p.shape),
        )
        for name, p in model.named_parameters()
    }


def disturb(model: torch.nn.Module, seed: int) -> None:
    """Change every weight, the embedding (and with it the tied head) included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def finish(engine: vllm_engine.VllmEngine) -> dict[str, Sampled]:
    done = {}
    while engine.running:
        done |= {sampled.key: sampled for sampled in engine.step()}
    return done


def greedy(model: torch.nn.Module, count: int) -> list[int]:
    """Plain transformers, one forward a token."""
    tokens = torch.as_tensor(PROMPT.astype(np.int64))[None]
    with torch.no_grad():
        for _ in range(count):
            following = model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()
            tokens = torch.cat([tokens, following[None, None]], dim=1)
    return tokens[0, len(PROMPT) :].tolist()


def logprobs(model: torch.nn.Module, prompt: np.ndarray, tokens: np.ndarray, temperature: float) -> np.ndarray:
    row = torch.as_tensor(np.concatenate([prompt, tokens]).astype(np.int64))[None]
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=row, use_cache=False).logits[0] / temperature, dim=-1)
    return scores[len(prompt) - 1 : -1].gather(1, row[0, len(prompt) :, None])[:, 0].numpy()


def test_greedy_tokens_equal_transformers_before_and_after_every_update(engine: Any, model: torch.nn.Module):
    outputs = []
    for version in range(3):
        if version:
            disturb(model, version)
        engine.load(version, [shard_of(model)])
        engine.add("greedy", PROMPT, GREEDY)
        sampled = finish(engine)["greedy"]
        assert sampled.tokens.tolist() == greedy(model, 16)
        assert [span.version for span in sampled.spans] == [version]
        outputs.append(sampled.tokens.tolist())
    assert outputs[0] != outputs[1] != outputs[2], "the update changed what is written"


def test_requests_survive_an_update_and_each_token_is_of_the_version_its_span_names(
    engine: Any, model: torch.nn.Module
):
    sampling = Sampling(temperature=0.8, max_tokens=24, seed=7, stop_token_ids=())
    weights = {10: {name: p.detach().clone() for name, p in model.named_parameters()}}
    engine.load(10, [shard_of(model)])
    for i in range(8):
        engine.add(f"r{i}", PROMPT[: 20 + i], sampling)
    done: dict[str, Sampled] = {}
    for _ in range(9):
        done |= {sampled.key: sampled for sampled in engine.step()}
    disturb(model, 11)
    weights[11] = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.load(11, [shard_of(model)])
    done |= finish(engine)
    assert len(done) == 8
    for version, state in weights.items():
        model.load_state_dict(state, strict=False)
        for i in range(8):
            sampled = done[f"r{i}"]
            assert len(sampled.tokens) == 24
            first, second = sampled.spans
            assert (first.version, second.version) == (10, 11)
            own = slice(0, second.start) if version == 10 else slice(second.start, None)
            expected = logprobs(model, PROMPT[: 20 + i], sampled.tokens, 0.8)
            assert np.abs(expected - sampled.logprobs)[own].max() < 1e-4


def test_a_seeded_response_is_the_same_whoever_samples_with_it(engine: Any):
    sampling = Sampling(temperature=1.0, max_tokens=12, seed=3, stop_token_ids=())
    engine.add("alone", PROMPT, sampling)
    alone = finish(engine)["alone"]
    engine.add("again", PROMPT, sampling)
    for i in range(5):
        engine.add(f"other{i}", PROMPT[i:], Sampling(temperature=1.0, max_tokens=12, seed=90 + i, stop_token_ids=()))
    assert finish(engine)["again"].tokens.tolist() == alone.tokens.tolist()


def test_a_stop_token_ends_a_response_and_is_part_of_it(engine: Any, model: torch.nn.Module):
    first = greedy(model, 3)
    stop = (
        next(token for i, token in enumerate(first) if token not in first[:i] and i > 0)
        if len(set(first)) > 1
        else first[0]
    )
    sampling = Sampling(temperature=0.0, max_tokens=16, seed=None, stop_token_ids=(stop,))
    engine.load(20, [shard_of(model)])
    engine.add("stops", PROMPT, sampling)
    sampled = finish(engine)["stops"]
    assert sampled.finish == "stop"
    assert sampled.tokens[-1] == stop


def test_an_aborted_request_returns_nothing(engine: Any):
    engine.add("gone", PROMPT, GREEDY)
    engine.step()
    engine.abort(["gone"])
    assert engine.running == 0
    assert finish(engine) == {}


def test_a_model_that_vllm_cannot_run_is_the_users_mistake_in_one_line(engine: Any):
    with pytest.raises(ModelError, match=r"max_model_len \(70000\) is greater than the derived") as caught:
        vllm_engine.create(prepare(RandomModel()), RolloutConfig(max_sequences=2), max_model_len=70000, seed=1)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
