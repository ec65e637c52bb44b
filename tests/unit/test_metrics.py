"""Laws of the metrics: every sample says whose it is, names follow the attributes, and the list of names is derived."""

import ast
import re
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram, generate_latest

import deltal
from deltal.monitor.metrics import (
    ROLES,
    ControllerMetrics,
    LearnerMetrics,
    ReplayMetrics,
    RoleMetrics,
    RolloutMetrics,
    VerifyMetrics,
    metric_names,
)

PROMISED = {
    "rollout": "tokens groups responses running waiting policy_version load_seconds step_seconds response_tokens "
    "group_seconds prompts_too_long loads_failed",
    "verify": "verdicts seconds groups",
    "queue": "waiting leased puts acks expired oldest_seconds",
    "replay": "issued consumed duplicates refused filtered evicted in_flight admitted_waiting policy_version staleness "
    "flush_seconds flush_records",
    "learner": "step steps_skipped loss reward accuracy grad_norm entropy clip_fraction learning_rate "
    "tokens_per_second response_length grad_clipped logprob_difference_max logprob_compared seconds staleness_max "
    "tokens alpha beta beta_half_width method_scale method_relative_variance method_cosine method_positive",
    "policy": "version bytes published waiters",
    "controller": "state workers restarts reconciled evaluation_accuracy open_slots prompts_skipped",
}


def own_metrics(metrics: RoleMetrics) -> dict[str, Counter | Gauge | Histogram]:
    return {name: value for name, value in vars(metrics).items() if isinstance(value, Counter | Gauge | Histogram)}


@pytest.mark.parametrize("kind", ROLES, ids=lambda kind: kind.role)
def test_a_role_has_the_metrics_it_promises_and_no_others(kind: type[RoleMetrics]) -> None:
    assert set(own_metrics(kind("run", "actor"))) == set(PROMISED[kind.role].split())


@pytest.mark.parametrize("kind", ROLES, ids=lambda kind: kind.role)
def test_a_metric_is_named_after_its_role_and_attribute(kind: type[RoleMetrics]) -> None:
    for attribute, metric in own_metrics(kind("run", "actor")).items():
        family = metric.describe()[0]
        assert family.name == f"deltal_{kind.role}_{attribute}"
        assert family.documentation


def test_every_sample_says_run_role_and_actor() -> None:
    for kind in ROLES:
        metrics = kind("night", f"{kind.role}-7")
        for family in metrics.registry.collect():
            for sample in family.samples:
                assert sample.labels["run"] == "night"
                assert sample.labels["actor"] == f"{kind.role}-7"
                assert sample.labels["role"] == kind.role


def test_a_metric_s_own_label_wins_over_the_constant_one() -> None:
    metrics = ControllerMetrics("night", "controller")
    metrics.workers.labels(role="rollout").set(3)
    labels = {"run": "night", "actor": "controller", "role": "rollout"}
    assert metrics.registry.get_sample_value("deltal_controller_workers", labels) == 3.0


def test_two_actors_of_one_process_share_nothing() -> None:
    one, other = RolloutMetrics("night", "rollout-0"), RolloutMetrics("night", "rollout-1")
    one.tokens.inc(5)
    name = "deltal_rollout_tokens_total"
    assert one.registry.get_sample_value(name, one.registry.labels) == 5.0
    assert other.registry.get_sample_value(name, other.registry.labels) == 0.0


def test_the_exposition_escapes_what_a_run_writes_into_a_label() -> None:
    metrics = VerifyMetrics("night", "verify-0")
    metrics.verdicts.labels(task="math", reason='a"b\nc\\d').inc()
    text = generate_latest(metrics.registry).decode()
    assert 'reason="a\\"b\\nc\\\\d"' in text


def test_every_exposed_sample_is_in_the_list_of_names() -> None:
    names = metric_names()
    replay, learner = ReplayMetrics("night", "replay"), LearnerMetrics("night", "learner-0")
    replay.evicted.labels(reason="deadline").inc()
    replay.staleness.observe(2)
    learner.seconds.labels(phase="wait").observe(0.5)
    for metrics in (replay, learner):
        text = generate_latest(metrics.registry).decode()
        seen = {re.split(r"[{ ]", line, maxsplit=1)[0] for line in text.splitlines() if not line.startswith("#")}
        assert seen <= names
    assert "deltal_replay_evicted_total" in names
    assert "deltal_learner_seconds_bucket" in names
    assert not any(name.endswith("_created") for name in names)


def test_a_gauge_is_absent_until_it_is_set_and_when_its_value_is_not_known() -> None:
    learner = LearnerMetrics("night", "learner-0")
    name = "deltal_learner_logprob_difference_max"
    assert name + "{" not in generate_latest(learner.registry).decode()
    learner.logprob_difference_max.set(0.25)
    assert f"{name}{{" in generate_latest(learner.registry).decode()
    learner.logprob_difference_max.set(float("nan"))
    assert f"{name}{{" not in generate_latest(learner.registry).decode()


def test_every_metric_is_set_by_somebody() -> None:
    """Its attribute, or its name where several are set in a loop, stands in a file outside of the metrics' own."""
    used: set[str] = set()
    for file in Path(deltal.__file__).parent.rglob("*.py"):
        if file.parent.name != "monitor":
            nodes = list(ast.walk(ast.parse(file.read_text())))
            used |= {
                f"{owner}.{node.attr}" for node in nodes if isinstance(node, ast.Attribute)
                for owner in [getattr(node.value, "attr", getattr(node.value, "id", ""))]
            }  # fmt: skip
            used |= {f"metrics.{node.value}" for node in nodes if isinstance(node, ast.Constant)}
    assert "metrics.observe_variance" in used, "it sets these of the learner:"
    used |= {f"metrics.{name}" for name in ("alpha", "beta", "beta_half_width")}
    used |= {f"metrics.method_{name}" for name in ("scale", "relative_variance", "cosine", "positive")}
    for kind in ROLES:
        for name in own_metrics(kind("run", "actor")):
            assert {f"metrics.{name}", f"_metrics.{name}"} & used, f"nobody sets {kind.role}_{name}"


def test_process_memory_and_cpu_are_measured_in_base_units() -> None:
    registry = RolloutMetrics("night", "rollout-0").registry
    assert 1e6 < (registry.get_sample_value("deltal_process_resident_memory_bytes", registry.labels) or 0) < 1e11
    assert (registry.get_sample_value("deltal_process_cpu_seconds_total", registry.labels) or 0) > 0
