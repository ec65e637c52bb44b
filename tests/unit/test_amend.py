"""Laws of resuming with other settings: what is trained stays, and a refusal names the key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deltal.config import RunConfig
from deltal.errors import ConfigError
from deltal.run.amend import amended
from tests.unit.builders import run_config


def config(**rooms: Any) -> RunConfig:
    return run_config(run={"name": "a-run", "steps": 20}, **rooms)


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=40", "rollout.workers=3", "learner.ranks=2", "learner.checkpoint_every=1", "learner.threads=2",
        "learner.micro_batch_tokens=64", "evaluation.every=5", "monitor.port=8080", "replay.lease_seconds=3",
        "learner.batch_deadline=60", "verify.workers=0",
    ],
)  # fmt: skip
def test_what_does_not_change_the_training_may_change(override: str) -> None:
    key, value = override.split("=")
    room, name = key.split(".")
    changed = amended(config(), [override], done=7)
    assert getattr(getattr(changed, room), name) == float(value)
    assert changed.model_copy(update={room: getattr(config(), room)}) == config()


@pytest.mark.parametrize(
    "override",
    [
        "rollout.temperature=0.7", "rollout.max_response_tokens=99", "rollout.responses_per_prompt=2",
        "rollout.seed_responses=false", "run.seed=1", "data.size=7", "data.name=letters", "model.seed=3",
        "algorithm.aggregation.alpha=0.5", "algorithm.mini_batches=2", "learner.learning_rate=1e-3",
        "learner.max_grad_norm=2", "learner.schedule.warmup_steps=3", "replay.max_staleness=9",
        "replay.prompts_per_batch=4", "chat.prefill=So", "verify.overlong=verify", "verify.timeout=1", "run.name=other",
        "evaluation.prompts=3", "learner.compute_dtype=bfloat16",
    ],
)  # fmt: skip
def test_what_decides_the_training_is_fixed_and_named(override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"^{re.escape(key)} = .* is fixed for a run: .*--from a-run {key}=") as error:
        amended(config(), ["rollout.workers=3", override], done=7)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("algorithm.aggregation.kind=dapo", r"algorithm\.aggregation\."),
        ("data.kind=jsonl", r"data: |data\.path is missing"),
        ("evaluation.data={kind: generated}", r"evaluation\.data"),
    ],
)
def test_another_choice_of_a_union_is_refused(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        amended(config(), [override], done=7)


def test_nothing_changes_without_an_override_or_with_the_value_there_is() -> None:
    assert amended(config(), [], done=7) == config()
    assert amended(config(), ["rollout.temperature=1.0", "run.seed=0"], done=7) == config()


def test_steps_that_are_done_cannot_be_taken_back() -> None:
    with pytest.raises(ConfigError, match=r"run\.steps = 6 is below the 7 steps that are done"):
        amended(config(), ["run.steps=6"], done=7)
    assert amended(config(), ["run.steps=7"], done=7).run.steps == 7


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_steps_are_fixed_where_the_learning_rate_depends_on_them(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.steps is fixed for a run whose learning rate is {kind}"):
        amended(config(learner={"schedule": {"kind": kind}}), ["run.steps=30"], done=7)


def test_a_misspelt_key_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"did you mean learner\.ranks"):
        amended(config(), ["learner.rank=2"], done=0)


def test_a_run_that_trained_nothing_is_not_offered_as_a_start() -> None:
    for done, offered in ((0, False), (7, True)):
        with pytest.raises(ConfigError, match="deltal train CONFIG") as caught:
            amended(config(), ["rollout.temperature=0.5"], done=done)
        assert ("--from" in str(caught.value)) is offered
