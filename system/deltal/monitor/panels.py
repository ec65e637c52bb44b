"""What the dashboard shows: rows of charts, each with the question it answers and its PromQL over `metrics.py`'s names.

Data and a few query forms only; `dashboards.py` turns them into Grafana's JSON.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel: what it shows, why one looks at it, Grafana's unit, and its queries as legend and PromQL."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def _of(metric: str, labels: str = "") -> str:
    """The series of the chosen run."""
    return f'deltal_{metric}{{run="$run"{", " + labels if labels else ""}}}'


def _rate(counter: str, by: str = "") -> str:
    """Events a second, summed over actors."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({_of(counter)}[$__rate_interval]))"


def _now(metric: str) -> str:
    """One value for the run: every rank reports the whole batch's."""
    return f"max({_of(metric)})"


def _quantile(histogram: str, quantile: float) -> str:
    return f"histogram_quantile({quantile}, sum by (le) (rate({_of(histogram + '_bucket')}[$__rate_interval])))"


def _quantiles(histogram: str) -> tuple[tuple[str, str], ...]:
    return (("median", _quantile(histogram, 0.5)), ("95%", _quantile(histogram, 0.95)))


TRAINING = (
    Chart(
        "Reward",
        "Mean reward and share of correct responses of the last batch, and the held-out accuracy of the last "
        "evaluation. Single batches are noisy: look at the trend.",
        "short",
        (
            ("reward", _now("learner_reward")),
            ("accuracy", _now("learner_accuracy")),
            ("held-out", _now("controller_evaluation_accuracy")),
        ),
    ),
    Chart(
        "Response length",
        "Mean length of the last batch in tokens. The aggregation decides how length enters the update.",
        "short",
        (("tokens", _now("learner_response_length")),),
    ),
    Chart("Step", "Steps done and the policy version published.", "none", (("step", _now("learner_step")),)),
    Chart(
        "Gradient norm",
        "Before the clip. The unbiased aggregations carry 1/M in every coefficient: compare within a method only.",
        "short",
        (("norm", _now("learner_grad_norm")),),
    ),
    Chart("Loss", "Σ coefficient × objective of the last batch.", "short", (("loss", _now("learner_loss")),)),
    Chart(
        "Entropy and clip",
        "Entropy in nats a token falls as the policy settles; the clipped share says how far one step moves it.",
        "short",
        (("entropy", _now("learner_entropy")), ("clipped share", _now("learner_clip_fraction"))),
    ),
)
ROLLOUT = (
    Chart(
        "Tokens sampled",
        "Tokens the policy writes a second, by worker.",
        "short",
        (("{{actor}}", _rate("rollout_tokens_total", "actor")),),
    ),
    Chart(
        "Requests",
        "Responses in the engines. Many waiting: the workers are the bottleneck; few running: the learner is.",
        "short",
        (("running", f"sum({_of('rollout_running')})"), ("waiting", f"sum({_of('rollout_waiting')})")),
    ),
    Chart(
        "Length of responses",
        "Of finished responses, in tokens. A 95% at the limit means many are cut off.",
        "short",
        _quantiles("rollout_response_tokens"),
    ),
    Chart(
        "Time of a group",
        "From its first token asked for to its last written.",
        "s",
        _quantiles("rollout_group_seconds"),
    ),
    Chart(
        "Loads of weights",
        "Time of one load, and loads that failed (the worker keeps its old version).",
        "s",
        (*_quantiles("rollout_load_seconds"), ("failed a second", _rate("rollout_loads_failed_total"))),
    ),
    Chart(
        "Finish",
        "Responses a second by how they ended; length means cut off at the limit.",
        "short",
        (("{{finish}}", _rate("rollout_responses_total", "finish")),),
    ),
    Chart(
        "Verdicts",
        "Verdicts a second by task and reason. Timeouts and crashes are answers that attack or overload the verifier.",
        "short",
        (("{{task}}: {{reason}}", _rate("verify_verdicts_total", "task, reason")),),
    ),
    Chart("Time of a verdict", "Of one response, sandbox included.", "s", _quantiles("verify_seconds")),
    Chart(
        "Prompts too long",
        "Prompts a second above chat.max_prompt_tokens; they are filtered, not trained on.",
        "short",
        (("prompts", _rate("rollout_prompts_too_long_total")),),
    ),
)
QUEUES = (
    Chart(
        "Queue depth",
        "Entries that wait and entries under a lease. A growing rollout queue: too few Verifiers.",
        "short",
        (
            ("{{actor}} waiting", f"sum by (actor) ({_of('queue_waiting')})"),
            ("{{actor}} leased", f"sum by (actor) ({_of('queue_leased')})"),
        ),
    ),
    Chart(
        "Oldest entry",
        "Age of each queue's oldest entry.",
        "s",
        (("{{actor}}", f"max by (actor) ({_of('queue_oldest_seconds')})"),),
    ),
    Chart(
        "Staleness",
        "Versions between a group's oldest token and its batch; bounded by replay.max_staleness by construction.",
        "short",
        (*_quantiles("replay_staleness"), ("largest in the last batch", _now("learner_staleness_max"))),
    ),
    Chart(
        "Versions",
        "Policy version of the store, the replay buffer and each worker; the distance is what staleness is made of.",
        "none",
        (
            ("store", _now("policy_version")),
            ("replay", _now("replay_policy_version")),
            ("{{actor}}", f"max by (actor) ({_of('rollout_policy_version')})"),
        ),
    ),
    Chart(
        "Leases that ended",
        "Leases a second that ended without an ack: their workers died or hang.",
        "short",
        (("{{actor}}", _rate("queue_expired_total", "actor")),),
    ),
    Chart(
        "Queue traffic",
        "Puts and acks a second.",
        "short",
        (
            ("{{actor}} puts", _rate("queue_puts_total", "actor")),
            ("{{actor}} acks", _rate("queue_acks_total", "actor")),
        ),
    ),
)
LEDGER = (
    Chart(
        "Ledger",
        "issued = consumed + filtered + evicted + in flight. Counters start anew when the buffer restarts; "
        "deltal audit proves the law from the run folder.",
        "short",
        (
            ("issued", f"sum({_of('replay_issued_total')})"),
            ("consumed", f"sum({_of('replay_consumed_total')})"),
            ("filtered: {{reason}}", f"sum by (reason) ({_of('replay_filtered_total')})"),
            ("evicted: {{reason}}", f"sum by (reason) ({_of('replay_evicted_total')})"),
            ("in flight", f"sum({_of('replay_in_flight')})"),
        ),
    ),
    Chart(
        "Waiting for a batch",
        "Scored groups the learner has not taken yet, and slots that are free. Many waiting: the learner is the "
        "bottleneck.",
        "short",
        (
            ("admitted", f"sum({_of('replay_admitted_waiting')})"),
            ("open slots", f"sum({_of('controller_open_slots')})"),
        ),
    ),
    Chart(
        "Duplicates and refusals",
        "Deliveries a second of groups known already (harmless, after a crash) and never issued (a defect).",
        "short",
        (
            ("duplicates", _rate("replay_duplicates_total")),
            ("refused", _rate("replay_refused_total")),
            ("put again by reconcile", _rate("controller_reconciled_total")),
        ),
    ),
    Chart("Journal flush", "Time of one flush; acks wait for it.", "s", _quantiles("replay_flush_seconds")),
    Chart("Records a flush", "Records in one journal file.", "short", _quantiles("replay_flush_records")),
)
LEARNER = (
    Chart(
        "Time of a step, by phase",
        "Mean seconds. Much wait: rollout is the bottleneck, add workers with deltal scale.",
        "s",
        (
            (
                "{{phase}}",
                f"sum by (phase) (rate({_of('learner_seconds_sum')}[$__rate_interval])) / "
                f"sum by (phase) (rate({_of('learner_seconds_count')}[$__rate_interval]))",
            ),
        ),
    ),
    Chart(
        "Tokens trained",
        "Tokens a second while the learner works, and over all time with waiting.",
        "short",
        (("while working", _now("learner_tokens_per_second")), ("over all time", _rate("learner_tokens_total"))),
    ),
    Chart(
        "Engine–learner difference",
        "Largest |log-probability difference| under equal weights, in nats; above 0.01 something is wrong with the "
        "engine's weights or the temperature. Not drawn where no token was sampled under the learner's own version: "
        "see the share compared.",
        "short",
        (
            ("largest", _now("learner_logprob_difference_max")),
            ("share of tokens compared", _now("learner_logprob_compared")),
        ),
    ),
    Chart("Learning rate", "Of the last step.", "sci", (("rate", _now("learner_learning_rate")),)),
    Chart(
        "Clipped and skipped",
        "Steps whose gradient was clipped, and steps skipped for a non-finite loss or gradient, in total.",
        "short",
        (("clipped", _now("learner_grad_clipped_total")), ("skipped", _now("learner_steps_skipped_total"))),
    ),
    Chart(
        "Published weights",
        "Bytes of all versions the store holds; workers waiting for a newer version.",
        "bytes",
        (("bytes", _now("policy_bytes")),),
    ),
)
HEALTH = (
    Chart("State", "The run's state.", "none", (("{{state}}", f"max by (state) ({_of('controller_state')}) == 1"),)),
    Chart("Workers", "Actors alive, by role.", "none", (("{{role}}", f"max by (role) ({_of('controller_workers')})"),)),
    Chart(
        "Restarts",
        "Actors restarted, in total, by role. The run fails when a role dies more than run.max_restarts times.",
        "none",
        (("{{role}}", f"max by (role) ({_of('controller_restarts_total')})"),),
    ),
    Chart(
        "Private memory",
        "Of each process, without the shared object store. A line that keeps rising is a leak.",
        "bytes",
        (("{{actor}}", _of("process_private_memory_bytes")),),
    ),
    Chart(
        "Resident memory",
        "Of each process, shared pages of the object store included.",
        "bytes",
        (("{{actor}}", _of("process_resident_memory_bytes")),),
    ),
    Chart(
        "CPU",
        "Cores each process uses.",
        "short",
        (("{{actor}}", f"sum by (actor) (rate({_of('process_cpu_seconds_total')}[$__rate_interval]))"),),
    ),
)
VARIANCE = (
    Chart(
        "What each aggregation would have done: variance",
        "Variance of the update on the batches of this run, from sketches of each response's gradient; equal "
        "coefficients (dr_grpo) are 1. Lower is better.",
        "short",
        (("{{method}}", f"max by (method) ({_of('learner_method_relative_variance')})"),),
    ),
    Chart(
        "What each aggregation would have done: scale",
        "Sum of the coefficients times M. 1 is unbiased; a method away from 1 changes its step with the lengths.",
        "short",
        (("{{method}}", f"max by (method) ({_of('learner_method_scale')})"),),
    ),
    Chart(
        "What each aggregation would have done: direction",
        "Cosine of the method's update with the batch's plain mean gradient.",
        "short",
        (("{{method}}", f"max by (method) ({_of('learner_method_cosine')})"),),
    ),
    Chart(
        "Token mass of right answers",
        "Share of Σ c L |A| that goes to positive advantages: a length weight shifts it when wrong answers are longer.",
        "percentunit",
        (("{{method}}", f"max by (method) ({_of('learner_method_positive')})"),),
    ),
    Chart(
        "β and α",
        "How fast gradient variance grows with length, fitted and smoothed over batches, its 95% interval's half "
        "width, and the exponent used.",
        "short",
        (
            ("β", _now("learner_beta")),
            ("half width", _now("learner_beta_half_width")),
            ("α", _now("learner_alpha")),
        ),
    ),
)
ROWS: dict[str, tuple[Chart, ...]] = {
    "Training": TRAINING,
    "Variance": VARIANCE,
    "Rollout": ROLLOUT,
    "Queues and staleness": QUEUES,
    "Replay ledger": LEDGER,
    "Learner": LEARNER,
    "Health": HEALTH,
}
