"""Every metric's definition, in one place: one class a role, each with a registry of its own.

An attribute's Prometheus name is `deltal_<role>_<attribute>`, with `_total` behind a counter; units are base units
(seconds, bytes, tokens, versions). Every sample carries the labels run, role and actor. What a metric is *for* stands
in its help text; where it is drawn, in `dashboards.py`. Nothing here knows what an actor does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

BRIEF = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
"""Seconds of things that should take milliseconds."""
LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Seconds of things that may take minutes."""
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Lengths."""
SMALL_COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
"""Versions, records."""


class RoleRegistry(CollectorRegistry):
    """A registry that puts the same labels on every sample; a metric's own label of the same name wins."""

    def __init__(self, labels: dict[str, str]) -> None:
        super().__init__()
        self.labels = labels

    def collect(self) -> Iterator[Metric]:
        """All metrics with the constant labels, without the `_created` series nobody reads and what was never set."""
        for metric in super().collect():
            metric.samples = [
                sample._replace(labels={**self.labels, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created") and sample.value == sample.value
            ]
            yield metric


class ProcessCollector(Collector):
    """Memory and CPU of the process it was made in, read at every scrape."""

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())

    def collect(self) -> Iterable[Metric]:
        """Yields RSS, private memory, CPU seconds and threads; a value the kernel hides is left out."""
        memory = GaugeMetricFamily(
            "deltal_process_resident_memory_bytes", "Resident memory, the object store's shared pages included"
        )
        private = GaugeMetricFamily(
            "deltal_process_private_memory_bytes", "Memory of this process alone; must stay flat over a long run"
        )
        cpu = CounterMetricFamily("deltal_process_cpu_seconds", "User and system CPU time")
        threads = GaugeMetricFamily("deltal_process_threads", "Threads")
        times = self._process.cpu_times()
        memory.add_metric([], self._process.memory_info().rss)
        cpu.add_metric([], times.user + times.system)
        threads.add_metric([], self._process.num_threads())
        # Some containers hide smaps; the other three are worth having all the same.
        with contextlib.suppress(psutil.Error, AttributeError):
            private.add_metric([], self._process.memory_full_info().uss)
        return [memory, private, cpu, threads]


class RoleMetrics:
    """Base of all: a registry with constant labels, the process's own metrics, three ways to define one.

    `run` is the run's name, `name` the actor's.
    """

    role = "none"

    def __init__(self, run: str, name: str) -> None:
        self.registry = RoleRegistry({"run": run, "role": self.role, "actor": name})
        self.registry.register(ProcessCollector())

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"deltal_{self.role}_{name}", what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, labels: Sequence[str] = ()) -> Gauge:
        """Absent until it is set: a 0 that nobody measured would look like a perfect loss or a fresh policy."""
        gauge = Gauge(f"deltal_{self.role}_{name}", what, labels, registry=self.registry)
        if not labels:
            gauge.set(float("nan"))
        return gauge

    def _histogram(self, name: str, what: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"deltal_{self.role}_{name}", what, labels, registry=self.registry, buckets=buckets)


class RolloutMetrics(RoleMetrics):
    """Of one RolloutWorker."""

    role = "rollout"

    def __init__(self, run: str, name: str) -> None:
        super().__init__(run, name)
        self.tokens = self._counter("tokens", "Tokens the policy wrote")
        self.groups = self._counter("groups", "Groups finished")
        self.responses = self._counter("responses", "Responses finished, by finish", ["finish"])
        self.prompts_too_long = self._counter("prompts_too_long", "Prompts above max_prompt_tokens, not sampled")
        self.loads_failed = self._counter("loads_failed", "Loads of weights that failed; the old version stayed")
        self.running = self._gauge("running", "Responses the engine is sampling now")
        self.waiting = self._gauge("waiting", "Responses waiting inside the engine")
        self.policy_version = self._gauge("policy_version", "Policy version loaded")
        self.load_seconds = self._histogram("load_seconds", "One load of new weights", LONG)
        self.step_seconds = self._histogram("step_seconds", "One engine step", BRIEF)
        self.group_seconds = self._histogram("group_seconds", "One group, first token asked for to last written", LONG)
        self.response_tokens = self._histogram("response_tokens", "Length of a response in tokens", TOKENS)


class VerifyMetrics(RoleMetrics):
    """Of one Verifier."""

    role = "verify"

    def __init__(self, run: str, name: str) -> None:
        super().__init__(run, name)
        self.groups = self._counter("groups", "Groups verified")
        self.verdicts = self._counter("verdicts", "Verdicts, by task and reason", ["task", "reason"])
        self.seconds = self._histogram("seconds", "One verdict", BRIEF, ["task"])


class QueueMetrics(RoleMetrics):
    """Of one ObjectQueue; the label actor says which."""

    role = "queue"

    def __init__(self, run: str, name: str) -> None:
        super().__init__(run, name)
        self.waiting = self._gauge("waiting", "Entries nobody has leased")
        self.leased = self._gauge("leased", "Entries under a lease")
        self.oldest_seconds = self._gauge("oldest_seconds", "Age of the oldest entry")
        self.puts = self._counter("puts", "Entries put")
        self.acks = self._counter("acks", "Entries acked")
        self.expired = self._counter("expired", "Leases that ended without an ack; their entries are delivered again")


class ReplayMetrics(RoleMetrics):
    """Of the ReplayBuffer. issued = consumed + filtered + evicted + in_flight holds over its life."""

    role = "replay"

    def __init__(self, run: str, name: str) -> None:
        super().__init__(run, name)
        self.issued = self._counter("issued", "Groups issued")
        self.consumed = self._counter("consumed", "Groups trained on")
        self.filtered = self._counter("filtered", "Groups filtered, by reason", ["reason"])
        self.evicted = self._counter("evicted", "Groups evicted, by reason", ["reason"])
        self.duplicates = self._counter("duplicates", "Deliveries of a group that was known already")
        self.refused = self._counter("refused", "Deliveries of a group that was never issued")
        self.in_flight = self._gauge("in_flight", "Groups issued that have no fate yet")
        self.admitted_waiting = self._gauge("admitted_waiting", "Scored groups waiting for their batch")
        self.policy_version = self._gauge("policy_version", "Policy version now")
        self.staleness = self._histogram("staleness", "Versions between a group's oldest token and batch", SMALL_COUNTS)
        self.flush_seconds = self._histogram("flush_seconds", "One journal flush, disk included", BRIEF)
        self.flush_records = self._histogram("flush_records", "Records in one journal file", SMALL_COUNTS)


class LearnerMetrics(RoleMetrics):
    """Of one LearnerRank; values of the batch are the whole batch's, the same on every rank."""

    role = "learner"

    def __init__(self, run: str, name: str) -> None:
        super().__init__(run, name)
        self.step = self._gauge("step", "Steps done")
        self.loss = self._gauge("loss", "Loss of the last batch")
        self.reward = self._gauge("reward", "Mean reward of the last batch")
        self.accuracy = self._gauge("accuracy", "Share of correct responses in the last batch")
        self.response_length = self._gauge("response_length", "Mean response length of the last batch in tokens")
        self.grad_norm = self._gauge("grad_norm", "Norm of the reduced gradient before the clip")
        self.entropy = self._gauge("entropy", "Mean entropy of the policy in nats a token")
        self.clip_fraction = self._gauge("clip_fraction", "Share of tokens whose ratio met the objective's clip")
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the last step")
        self.tokens_per_second = self._gauge("tokens_per_second", "Trained tokens a second, waiting excluded")
        self.logprob_difference_max = self._gauge(
            "logprob_difference_max", "Largest |engine - learner| log-probability under equal weights, in nats"
        )
        self.logprob_compared = self._gauge(
            "logprob_compared", "Share of the last batch's tokens sampled under equal weights: only those are compared"
        )
        self.staleness_max = self._gauge("staleness_max", "Largest staleness in the last batch, in versions")
        self.tokens = self._counter("tokens", "Tokens trained on")
        self.steps_skipped = self._counter("steps_skipped", "Steps with a non-finite loss or gradient")
        self.grad_clipped = self._counter("grad_clipped", "Steps whose gradient was clipped")
        self.seconds = self._histogram("seconds", "Time of a step, by phase", LONG, ["phase"])
        self.alpha = self._gauge("alpha", "Exponent of delta_l in the last batch")
        self.beta = self._gauge("beta", "Fitted growth of gradient variance with length, smoothed over batches")
        self.beta_half_width = self._gauge("beta_half_width", "Half width of beta's 95% interval")
        self.method_scale = self._gauge("method_scale", "Sum of coefficients times M: 1 is unbiased", ["method"])
        self.method_relative_variance = self._gauge(
            "method_relative_variance", "Variance the method's update would have had, dr_grpo = 1", ["method"]
        )
        self.method_cosine = self._gauge(
            "method_cosine", "Cosine of the method's update with the batch's plain mean gradient", ["method"]
        )
        self.method_positive = self._gauge(
            "method_positive", "Share of token mass the method gives to positive advantages", ["method"]
        )

    def observe_variance(self, told: Mapping[str, Any]) -> None:
        """Take a row's `variance`; what could not be told keeps its last value."""
        for name, key in (("alpha", "alpha"), ("beta", "beta_smoothed"), ("beta_half_width", "beta_half_width")):
            if told.get(key) is not None:
                getattr(self, name).set(told[key])
        for method, row in told.get("methods", {}).items():
            for gauge, key in (
                (self.method_scale, "scale"),
                (self.method_relative_variance, "relative_variance"),
                (self.method_cosine, "cosine"),
                (self.method_positive, "positive"),
            ):
                if row[key] is not None:
                    gauge.labels(method=method).set(row[key])


class PolicyMetrics(RoleMetrics):
    """Of the PolicyStore."""

    role = "policy"

    def __init__(self, run: str, name: str) -> None:
        super().__init__(run, name)
        self.version = self._gauge("version", "Newest visible policy version")
        self.bytes = self._gauge("bytes", "Bytes of weights held, all versions")
        self.waiters = self._gauge("waiters", "Workers waiting for a newer version")
        self.waiters.set(0)
        self.published = self._counter("published", "Versions published")


class ControllerMetrics(RoleMetrics):
    """Of the Controller. In `workers` and `restarts` the label role names the role counted, not the Controller."""

    role = "controller"

    def __init__(self, run: str, name: str) -> None:
        super().__init__(run, name)
        self.state = self._gauge("state", "1 for the run's state now, 0 for the others", ["state"])
        self.workers = self._gauge("workers", "Actors alive, by role", ["role"])
        self.restarts = self._counter("restarts", "Actors restarted, by role", ["role"])
        self.reconciled = self._counter("reconciled", "Groups put again because no queue or lease held them")
        self.open_slots = self._gauge("open_slots", "Groups that may be issued now")
        self.prompts_skipped = self._counter("prompts_skipped", "Prompts skipped because they were too long")
        self.evaluation_accuracy = self._gauge("evaluation_accuracy", "Held-out accuracy of the last evaluation")


ROLES: tuple[type[RoleMetrics], ...] = (
    RolloutMetrics,
    VerifyMetrics,
    QueueMetrics,
    ReplayMetrics,
    LearnerMetrics,
    PolicyMetrics,
    ControllerMetrics,
)
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
"""Prometheus type to what its samples' names end in."""


def metric_names() -> frozenset[str]:
    """All sample names that can appear in an exposition, derived from the definitions above."""
    families = [family for kind in ROLES for family in kind("", "").registry.collect()]
    return frozenset(family.name + suffix for family in families for suffix in SUFFIXES[family.type])
