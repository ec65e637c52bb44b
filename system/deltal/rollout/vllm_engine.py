"""vLLM in this process, on CPU or GPU: sampling, and weight updates through vLLM's weight-transfer interface.

vllm is imported inside `create`, after its environment is set; nothing else in deltal imports it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltal.config import RolloutConfig
from deltal.errors import ModelError, one_line
from deltal.rollout.engine import Sampled, Sampling, Shard
from deltal.types import Finish, Span

BACKEND = "deltal_arrays"
NEVER_AGAIN = (ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError, ImportError)
"""What vLLM raises for a model or a setting it does not take: pydantic's errors are ValueErrors. They follow from files
and settings alone, so another worker would meet the same: the user's to mend, at once. CUDA errors and lack of memory
(RuntimeError, MemoryError), files and networks (OSError) may be better in a minute: that worker dies and is replaced.
"""


def environment(settings: RolloutConfig) -> dict[str, str]:
    """Environment variables a process must have before vllm is imported."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # Weights are handed over as arrays, which only works in-process.
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(settings.threads),
    }
    if settings.num_gpus == 0:
        variables |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Several engines share the cores.
            "TORCHDYNAMO_DISABLE": "1",  # Otherwise the first request with logprobs compiles C++ for half a minute.
        }
    return variables


def create(model: str, settings: RolloutConfig, *, max_model_len: int, seed: int) -> VllmEngine:
    """An engine with the weights of `model` (a folder or hub name); load a policy version before sampling.

    Raises ModelError, in one line, when vLLM cannot run this model with these settings.
    """
    os.environ.update(environment(settings))
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # It would win over our own figure, and knows whole GiB only.
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    torch.set_num_threads(settings.threads)
    _register_backend()
    on_gpu = settings.num_gpus > 0
    try:
        arguments = EngineArgs(
            model=model,
            # Tokens go in and come out. Its own tokenizer would be of the class a config names (see data/tokenizer.py).
            skip_tokenizer_init=True,
            dtype=settings.dtype,
            max_model_len=max_model_len,
            max_num_seqs=settings.max_sequences,
            # On CPU a seeded request breaks when its prefill is cut over steps, so nothing may be cut.
            max_num_batched_tokens=None if on_gpu else settings.max_sequences * max_model_len,
            # Small blocks let a group share its prompt from the prefix cache even when the prompt is short.
            block_size=None if on_gpu else 32,
            kv_cache_memory_bytes=None if on_gpu else int(settings.kv_cache_gib * 2**30),
            enable_prefix_caching=True,
            enforce_eager=not on_gpu,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            seed=seed % 2**31,
            disable_log_stats=True,
            logprobs_mode="processed_logprobs",  # After temperature: the distribution that is sampled from.
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        )
        engine = LLMEngine.from_engine_args(arguments)
    except NEVER_AGAIN as error:
        if "memory" in one_line(error).lower():
            raise  # Another process may give some back, a learner that is ended for instance.
        raise ModelError(f"vLLM cannot run {model}: {one_line(error, line=0)}") from error
    engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
    return VllmEngine(engine)


@dataclass
class _Running:
    """A request under way: what was seen of it so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


class VllmEngine:
    """An `Engine` around vLLM's LLMEngine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._running: dict[str, _Running] = {}
        self._written = 0
        self._version: int | None = None

    @property
    def version(self) -> int | None:
        """Policy version of the loaded weights; None before the first load."""
        return self._version

    @property
    def running(self) -> int:
        """Responses being sampled or waiting."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Of `running`, those that wait for a place in the engine's batch."""
        return int(self._engine.engine_core.engine_core.scheduler.get_request_counts()[1])

    def token_counts(self) -> dict[str, Any]:
        """`written`: tokens sampled so far."""
        return {"written": self._written}

    def add(self, key: str, prompt_tokens: NDArray[np.int32], sampling: Sampling) -> None:
        """Ask for one response."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=0,  # Exactly the sampled token's.
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._running[key] = _Running()
        self._engine.add_request(key, {"prompt_token_ids": prompt_tokens.tolist()}, parameters)

    def step(self) -> list[Sampled]:
        """One engine step; the responses that finished in it. Raises ModelError when vLLM cannot compute the model."""
        finished = []
        try:
            outputs = self._engine.step()
        except NEVER_AGAIN as error:
            if self._written:
                raise  # It could before.
            raise ModelError(f"vLLM cannot compute this model: {one_line(error, line=0)}") from error
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            completion = output.outputs[0]
            self._extend(running, completion)
            if output.finished:
                del self._running[output.request_id]
                finished.append(self._sampled(output.request_id, running, completion.finish_reason))
        return finished

    def abort(self, keys: Sequence[str]) -> None:
        """Forget responses; nothing is returned for them."""
        self._engine.abort_request([key for key in keys if self._running.pop(key, None)])

    def load(self, version: int, shards: Sequence[Shard]) -> None:
        """Swap in weights between steps, by the thread that steps. Keys and values of running requests are
        recomputed under the new weights, so that every log-probability is of one version.

        Raises ModelError when the weights are not those that vLLM's model has.
        """
        tensors = {name: _as_tensor(entry) for shard in shards for name, entry in shard.items()}
        try:
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc("update_weights", kwargs={"update_info": {"tensors": tensors}})
            self._engine.collective_rpc("finish_weight_update")
        except NEVER_AGAIN as error:
            raise ModelError(
                f"vLLM does not take the learner's weights of this architecture: {one_line(error, line=0)}"
            ) from error
        if self._running:
            self._engine.reset_prefix_cache(reset_running_requests=True)
        else:
            self._engine.reset_prefix_cache()
        self._version = version

    def _extend(self, running: _Running, completion: Any) -> None:
        """Append a step's tokens, with a new span when the version changed."""
        new = list(completion.token_ids)
        if not new:
            return
        if self._version is not None and (not running.spans or running.spans[-1].version != self._version):
            running.spans.append(Span(start=len(running.tokens), version=self._version))
        running.tokens += new
        running.logprobs += [entry[token].logprob for entry, token in zip(completion.logprobs, new, strict=True)]
        self._written += len(new)

    @staticmethod
    def _sampled(key: str, running: _Running, reason: str | None) -> Sampled:
        finish: Finish = "stop" if reason == "stop" else "length" if reason == "length" else "abort"
        return Sampled(
            key=key,
            tokens=np.asarray(running.tokens, dtype=np.int32),
            logprobs=np.asarray(running.logprobs, dtype=np.float32),
            spans=tuple(running.spans),
            finish=finish,
        )


def _as_tensor(entry: Any) -> torch.Tensor:
    """A published tensor, without a copy; numpy has no bfloat16, hence bytes."""
    if isinstance(entry, torch.Tensor):
        return entry
    flat = torch.from_numpy(entry.data).view(getattr(torch, entry.dtype))
    return flat.view(entry.shape)


def _register_backend() -> None:
    """Teach vLLM a weight-transfer backend that is handed tensors in this process."""
    from vllm.distributed.weight_transfer import base
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class ArraysInit(base.WeightTransferInitInfo):  # type: ignore[misc]
        pass

    @dataclass
    class ArraysUpdate(base.WeightTransferUpdateInfo):  # type: ignore[misc]
        tensors: dict[str, torch.Tensor]

    class ArraysEngine(base.WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = ArraysInit
        update_info_cls = ArraysUpdate

        def init_transfer_engine(self, init_info: ArraysInit) -> None:
            """Nothing to connect: tensors come by call."""

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # The base class synchronizes an accelerator, which CPU has none of.
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: ArraysUpdate) -> None:
            loaded = self.model.load_weights(iter(update_info.tensors.items()))
            wanted = {name for name, _ in self.model.named_parameters()}
            if getattr(self.model_config.hf_config, "tie_word_embeddings", False):
                wanted.discard("lm_head.weight")  # The embedding's own.
            if lacking := sorted(wanted - set(loaded)):
                # Told of a name it does not know vLLM is silent, and samples from memory that nobody wrote.
                raise ValueError(f"{len(lacking)} of its {len(wanted)} weights get no values, {lacking[0]} for one")

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                self._pack_again()

        def _pack_again(self) -> None:
            """What vLLM packs for CPU when it loads a model, and forgets to when it loads again, silently."""
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            # With tied embeddings the head keeps its copy of the old weights. Models without an lm_head use their
            # embedding, which is packed as any layer.
            is_tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
            if is_tied and hasattr(self.model, "lm_head"):
                dispatch_cpu_unquantized_gemm(self.model.lm_head, remove_weight=False)
            # Experts are left in the order of the files, which their kernel takes for its own.
            for layer in self.model.modules():
                kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
                if kernel is not None:
                    kernel.fused_experts.process_weights_after_loading(layer)

        def shutdown(self) -> None:
            """Nothing to release."""

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ArraysEngine)
