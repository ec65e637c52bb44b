"""Laws of the learner's instrument and of exact gradients, on a real model: what they say is what autograd says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltal.algorithm import AGGREGATIONS, advantages, token_coefficients
from deltal.algorithm.alpha import AlphaEstimate
from deltal.algorithm.sketch import gram
from deltal.algorithm.variance import would_have_done
from deltal.config import RunConfig
from deltal.errors import UserError
from deltal.learner.batch import assemble, mini_batches
from deltal.learner.gradients import measure
from deltal.learner.instrument import Instrument
from deltal.learner.step import train_batch
from deltal.results.variance import instrument as study
from deltal.results.variance import table, write
from deltal.types import Batch, ScoredGroup
from tests.unit.builders import run_config, scored, tiny_model

pytestmark = pytest.mark.usefixtures("process_group")
LIMIT = 64


def settings(**algorithm: Any) -> RunConfig:
    return run_config(algorithm=algorithm, rollout={"max_response_tokens": LIMIT, "temperature": 0.8})


def groups(version: int = 0, count: int = 6) -> list[ScoredGroup]:
    draw = np.random.default_rng(version)
    return [
        scored(i, rewards=(0.0, 1.0, 0.0, 1.0), lengths=draw.integers(1, LIMIT, 4).tolist(), version=version)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with weights large enough that every token matters."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(tied=False).save_pretrained(path)
    return str(path)


def model_of(folder: str) -> Any:
    from deltal.learner.model import load

    return load(folder)


def instrument_of(config: RunConfig, model: Any) -> Instrument:
    head = model.get_output_embeddings()
    return Instrument(config, vocabulary=head.out_features, width=head.in_features, device="cpu")


def sketched(folder: str, config: RunConfig, some: list[ScoredGroup]) -> tuple[Batch, dict[str, Any], Tensor]:
    """One batch through the learner's step at rate 0: the batch, its row's figures, the sketches."""
    model = model_of(folder)
    instrument = instrument_of(config, model)
    batch = assemble(0, some, config, alpha=instrument.alpha())
    sketcher = instrument.sketcher(batch)
    assert sketcher is not None
    train_batch(
        model, torch.optim.SGD(model.parameters(), lr=0.0), mini_batches(batch, count=1, seed=0), config.algorithm,
        config.learner, temperature=config.rollout.temperature, version=0, sketcher=sketcher,
    )  # fmt: skip
    return batch, instrument.read(batch, sketcher, instrument.alpha()), sketcher.sketches


def by_autograd(folder: str, some: list[ScoredGroup], temperature: float) -> Tensor:
    """Gradient of Σ log π for the head's matrix, one response at a time, by a plain forward."""
    model, rows = model_of(folder), []
    for group in some:
        for response in group.group.responses:
            row = torch.as_tensor(np.concatenate([group.group.prompt_tokens, response.tokens])).long()
            start = len(group.group.prompt_tokens)
            logits = model(input_ids=row[None], use_cache=False).logits[0, start - 1 : -1] / temperature
            logs = torch.log_softmax(logits, -1).gather(1, row[start:, None])
            (gradient,) = torch.autograd.grad(logs.sum(), model.lm_head.weight)
            rows.append(gradient.flatten())
    return torch.stack(rows)


def test_exact_products_are_those_of_autograd(folder: str) -> None:
    some = groups(count=3)
    right = gram(by_autograd(folder, some, 0.8))
    told = {}
    for parameters in ("lm_head", r"^lm_head\.weight$"):
        products = measure(
            folder, some, temperature=0.8, parameters=parameters, size=64, seed=0, advance=lambda done, of: None
        )
        torch.testing.assert_close(products.exact, right, rtol=1e-3, atol=1e-4 * float(right.diagonal().mean()))
        told[parameters] = products
    assert products.lengths.tolist() == [r.length for g in some for r in g.group.responses]
    assert products.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_step_s_sketches_estimate_the_same_gradients(folder: str) -> None:
    some, config = groups(), settings(sketch={"size": 128})
    _, _, sketches = sketched(folder, config, some)
    right = by_autograd(folder, some, 0.8).square().sum(1).double()
    ratio = gram(sketches).diagonal() / right
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.15)
    assert float(ratio.std()) < 2 / 128**0.5


def test_what_others_would_have_done_agrees_with_exact_gradients(folder: str) -> None:
    some, config = groups(count=16), settings(sketch={"size": 256})
    batch, told, _ = sketched(folder, config, some)
    lengths = torch.tensor([r.length for g in some for r in g.group.responses])
    exact = would_have_done(
        gram(by_autograd(folder, some, 0.8)), lengths, torch.from_numpy(batch.advantages.copy()),
        {m: token_coefficients(m, lengths, max_length=LIMIT) for m in AGGREGATIONS}, max_length=LIMIT,
    )  # fmt: skip
    assert set(told["methods"]) == set(AGGREGATIONS)
    for method, row in exact.items():
        mine = told["methods"][method]
        assert mine["scale"] == pytest.approx(row["scale"])
        assert mine["positive"] == pytest.approx(row["positive"])
        assert mine["relative_variance"] == pytest.approx(row["relative_variance"], rel=0.1)
        assert mine["cosine"] == pytest.approx(row["cosine"], abs=0.05)
    json.dumps(told)


def test_the_alpha_used_is_the_estimate_s_once_it_is_certain_and_survives_a_checkpoint(folder: str) -> None:
    config = settings(
        aggregation={"kind": "delta_l", "alpha": "auto", "auto": {"fallback": 0.5, "certain_within": 9.0}}
    )
    instrument = instrument_of(config, model_of(folder))
    assert instrument.alpha() == 0.5
    assert instrument.state() == {}
    batch = assemble(0, groups(), config, alpha=instrument.alpha())
    sketcher = instrument.sketcher(batch)
    assert sketcher is not None
    sketcher.sketches = (
        torch.randn(24, 64**2) * torch.tensor([r.length for g in groups() for r in g.group.responses])[:, None]
    )
    told = instrument.read(batch, sketcher, 0.5)
    assert told["beta"] == pytest.approx(2.0, abs=0.05)
    assert instrument.alpha() == config.algorithm.aggregation.auto.high  # type: ignore[union-attr]
    again = instrument_of(config, model_of(folder))
    again.restore(json.loads(json.dumps(instrument.state())))
    assert again.estimate == instrument.estimate
    again.restore({})
    assert again.estimate == AlphaEstimate()


def test_alpha_enters_the_coefficients(folder: str) -> None:
    config = settings(aggregation={"kind": "delta_l", "alpha": "auto"})
    lengths = [r.length for g in groups() for r in g.group.responses]
    batch = assemble(0, groups(), config, alpha=0.3)
    right = token_coefficients("delta_l", lengths, max_length=LIMIT, alpha=0.3).numpy()
    np.testing.assert_allclose(batch.coefficients, right)


def test_nothing_is_sketched_when_it_is_off_or_not_due(folder: str) -> None:
    model = model_of(folder)
    for every, version, due in ((0, 0, False), (3, 3, True), (3, 4, False)):
        instrument = instrument_of(settings(sketch={"every": every}), model)
        batch = assemble(version, groups(version), settings())
        assert (instrument.sketcher(batch) is not None) == due


def test_the_study_is_written_as_table_csv_and_picture(folder: str, tmp_path: Path) -> None:
    config = settings()
    facts = study(folder, groups(count=8), config, parameters="lm_head", advance=lambda done, of: None)
    assert facts["methods"]["dr_grpo"]["expected_relative_error"] == pytest.approx(0.0, abs=1e-6)
    assert facts["methods"]["dapo"]["scale"] > 1
    paths = write(facts, tmp_path)
    assert paths[-1].read_bytes().startswith(b"\x89PNG")
    assert len(paths[2].read_text().splitlines()) == 33
    assert json.loads(paths[0].read_text())["responses"] == 32
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(table(facts))
    assert "delta_l α=1" in console.export_text()
    rewards = [v.reward for g in groups(count=8) for v in g.verdicts]
    numbers = np.repeat(np.arange(8), 4)
    assert facts["each"]["advantage"] == pytest.approx(advantages(rewards, numbers, kind="grpo_no_std").tolist())


def test_a_study_of_nothing_is_the_user_s_mistake(folder: str) -> None:
    with pytest.raises(UserError, match="no response has a token"):
        study(folder, [scored(0, rewards=())], settings(), parameters="lm_head", advance=lambda done, of: None)
    with pytest.raises(UserError, match="names none"):
        study(folder, groups(count=1), settings(), parameters="no_such", advance=lambda done, of: None)
    with pytest.raises(UserError, match="no regular expression"):
        study(folder, groups(count=1), settings(), parameters="(", advance=lambda done, of: None)
