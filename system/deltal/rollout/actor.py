"""RolloutWorker: leases prompts, samples whole groups, loads new weights between engine steps.

One thread runs the engine and everything it touches; a second one long-polls the PolicyStore, a third renews leases
whatever the engine is at, so that a load which takes longer than a lease loses none. The worker starts no group on
weights older than the version stamped at issue, and streams each group out as soon as it is whole.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from deltal.config import RunConfig
from deltal.data.chat import Chat
from deltal.errors import DeltalError, TransferError, one_line
from deltal.monitor.http import serve_metrics
from deltal.monitor.metrics import RolloutMetrics
from deltal.queues.lease_queue import SUSPECT
from deltal.queues.object_queue import get_by
from deltal.rollout.engine import Engine, Sampled, Sampling
from deltal.types import Group, GroupId, Lease, PolicyVersion, Response, RolloutRequest

RPC_SECONDS = 60.0
AGAIN_SECONDS = 1.0
"""Between two tries of a background thread."""


@dataclass(slots=True)
class _Open:
    """A group under way."""

    request: RolloutRequest
    token: str
    prompt_tokens: NDArray[np.int32]
    started: float
    is_suspect: bool
    """Two workers that held it died: nothing else is sampled beside it."""
    responses: dict[int, Sampled] = field(default_factory=dict)


def response_seed(run_seed: int, id: GroupId, response: int) -> int:
    """Seed of one response, the same whoever samples it and however often (design rule 6)."""
    digest = hashlib.sha256(f"{run_seed}:{id}:{response}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _say(text: str) -> None:
    """Into the actor's log."""
    print(f"deltal: {text}", flush=True)  # noqa: T201


class RolloutWorker:
    """Threaded Ray actor. `run` lasts until `stop`; its failure is the worker's failure."""

    def __init__(
        self, *, name: str, run: str, model: str, config: RunConfig, queues: dict[str, Any], policy: Any,
        host: str, token: str | None,
    ) -> None:  # fmt: skip
        self.name = name
        self._config, self._model = config, model
        self._prompts, self._rollouts, self._policy = queues["prompt"], queues["rollout"], policy
        self._open: dict[GroupId, _Open] = {}
        self._held: deque[Lease[Any]] = deque()
        self._offered: PolicyVersion[Any] | None = None
        self._polled: int | None = None
        self._stopping = threading.Event()
        self._gone: deque[GroupId] = deque()
        """Groups that got their fate elsewhere; the engine's thread drops them."""
        self._has_left = threading.Event()
        self._progress = time.monotonic()
        self._busy_seconds = 0.0
        self._written = 0
        self._ready = False
        self._metrics = RolloutMetrics(run, name)
        self._server = serve_metrics(self._metrics.registry, host=host, token=token)

    def metrics_port(self) -> int:
        """Port of this actor's metrics."""
        return self._server.port

    def stats(self) -> dict[str, Any]:
        """Tokens written, seconds the engine was busy, seconds since it last made progress, loaded version."""
        engine = getattr(self, "_engine", None)
        return {
            "tokens": self._written,
            "busy_seconds": self._busy_seconds,
            "stuck_seconds": time.monotonic() - self._progress if self._ready else 0.0,
            "version": engine.version if engine else None,
            "open_groups": len(self._open),
        }

    def whereabouts(self) -> tuple[str, int]:
        """Node and process id of this actor, to end a process that does not answer."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def stop(self) -> None:
        """Finish the groups under way, then leave; `run` returns."""
        self._stopping.set()

    def run(self) -> None:
        """The engine loop. Returns after `stop`."""
        from deltal.rollout import vllm_engine

        chat, settings = self._config.chat, self._config.rollout
        self._chat = Chat(self._model, chat)
        self._engine: Engine = vllm_engine.create(
            self._model,
            settings,
            max_model_len=chat.max_prompt_tokens + settings.max_response_tokens,
            seed=self._config.run.seed,
        )
        threading.Thread(target=self._poll_policy, daemon=True, name="policy-poller").start()
        threading.Thread(target=self._renew, daemon=True, name="lease-renewer").start()
        while not (self._stopping.is_set() and not self._open):
            self._load()
            if not self._stopping.is_set():
                self._lease()
            self._start_held()
            self._drop_gone()
            self._step()
        self._has_left.set()
        self._give_back()

    def _poll_policy(self) -> None:
        """Long-poll the PolicyStore; the engine thread picks up what is offered."""
        while not self._stopping.is_set():
            try:
                newer = get_by(
                    self._policy.wait_newer.remote(self._polled, 5.0), seconds=RPC_SECONDS,
                    what="the PolicyStore's answer",
                )  # fmt: skip
            except (ray.exceptions.RayError, DeltalError) as error:
                _say(f"{self.name} asks for new weights again: {one_line(error, line=0)}")
                self._stopping.wait(AGAIN_SECONDS)
                continue
            if newer is not None:
                self._polled = newer.version
                self._offered = newer

    def _load(self) -> None:
        """Load the newest offered weights; a failed load keeps the old version."""
        offered, self._offered = self._offered, None
        if offered is None or (self._engine.version is not None and offered.version <= self._engine.version):
            return
        started = time.monotonic()
        try:
            boxes = [box[0] for box in offered.shards]
            shards = get_by(boxes, seconds=RPC_SECONDS, what=f"weights of version {offered.version}")
            self._engine.load(offered.version, [self._tensors(shard, offered.version) for shard in shards])
        except (ray.exceptions.RayError, TransferError):
            # The holder died between offer and load, or has a newer version by now: ask again.
            self._polled = self._engine.version
            self._metrics.loads_failed.inc()
            return
        self._metrics.load_seconds.observe(time.monotonic() - started)
        self._metrics.policy_version.set(offered.version)
        self._progress, self._ready = time.monotonic(), True

    def _tensors(self, shard: dict[str, Any], version: int) -> Any:
        """A rank's tensors: out of the object store, or fetched from the rank itself."""
        if "holder" not in shard:
            return shard["tensors"]
        from deltal.policy.direct import receive

        answer = shard["holder"].open_sender.remote(version)
        address = get_by(answer, seconds=RPC_SECONDS, what=f"a learner rank to offer version {version}")
        if address is None:
            raise TransferError(f"version {version} is not held any more")
        return receive(
            shard["layout"], address, device="cuda" if self._config.weights_stay_on_gpu else "cpu",
            own_host=ray.util.get_node_ip_address(), seconds=RPC_SECONDS,
        )  # fmt: skip

    def _lease(self) -> None:
        """Take as many prompts as there is room for; waits for one only when there is nothing else to do."""
        if self._engine.version is None or self._held or any(opened.is_suspect for opened in self._open.values()):
            return
        size = self._config.rollout.responses_per_prompt
        room = (self._config.rollout.max_sequences - self._engine.running) // size
        if room < 1:
            return
        wait = 0.0 if self._engine.running else 0.5
        leases = get_by(self._prompts.lease.remote(room, wait), seconds=RPC_SECONDS, what="the prompt queue")
        self._progress = time.monotonic()
        self._held.extend(leases)

    def _start_held(self) -> None:
        """Start held groups whose version stamp the loaded weights satisfy."""
        waiting: deque[Lease[Any]] = deque()
        while self._held:
            lease = self._held.popleft()
            if lease.key in self._open:
                # Its lease had ended while this process was held up; the group goes on under the new one.
                self._open[lease.key].token = lease.token
                continue
            try:
                request: RolloutRequest = get_by(lease.item[0], seconds=RPC_SECONDS, what=f"prompt of {lease.key}")
            except ray.exceptions.RayError:
                continue  # The queue died with its payload; reconcile puts the group again.
            is_suspect = lease.deliveries > SUSPECT
            is_too_new = self._engine.version is None or request.issued_version > self._engine.version
            # What may end this process is sampled when nothing else is.
            if is_too_new or (is_suspect and self._open):
                waiting.append(lease)
            else:
                self._start(request, lease.token, is_suspect=is_suspect)
        self._held = waiting
        if waiting and not self._engine.running:
            time.sleep(0.02)

    def _start(self, request: RolloutRequest, token: str, *, is_suspect: bool) -> None:
        tokens = self._chat.encode(request.prompt)
        opened = _Open(request, token, tokens, time.monotonic(), is_suspect)
        if len(tokens) > self._config.chat.max_prompt_tokens:
            self._metrics.prompts_too_long.inc()
            self._send(opened)
            return
        self._open[request.id] = opened
        for response in range(request.responses):
            seed = response_seed(self._config.run.seed, request.id, response)
            sampling = Sampling(
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                seed=seed if self._config.rollout.seed_responses else None,
                stop_token_ids=self._chat.stop_token_ids,
            )
            self._engine.add(f"{request.id}#{response}", tokens, sampling)

    def _step(self) -> None:
        """One engine step; groups that became whole leave at once."""
        if not self._engine.running:
            return
        started = time.monotonic()
        finished = self._engine.step()
        self._progress = time.monotonic()
        self._busy_seconds += self._progress - started
        written = self._engine.token_counts()["written"]
        self._metrics.tokens.inc(written - self._written)
        self._written = written
        self._metrics.step_seconds.observe(self._progress - started)
        waiting = self._engine.waiting
        self._metrics.running.set(self._engine.running - waiting)
        self._metrics.waiting.set(waiting)
        for sampled in finished:
            id_text, _, response = sampled.key.rpartition("#")
            opened = self._open[GroupId.parse(id_text)]
            opened.responses[int(response)] = sampled
            self._metrics.responses.labels(finish=sampled.finish).inc()
            self._metrics.response_tokens.observe(len(sampled.tokens))
            if len(opened.responses) == opened.request.responses:
                del self._open[opened.request.id]
                self._send(opened)

    def _send(self, opened: _Open) -> None:
        """Put a whole group into the rollout queue, then ack its prompt: in this order, so that it is always in one."""
        request, seconds = opened.request, time.monotonic() - opened.started
        group = Group(
            id=request.id,
            prompt=request.prompt,
            issued_version=request.issued_version,
            prompt_tokens=opened.prompt_tokens,
            responses=tuple(self._response(opened.responses[i]) for i in sorted(opened.responses)),
            worker=self.name,
            seconds=seconds,
        )
        entry = (request.id, [ray.put(group)])
        get_by(self._rollouts.put.remote([entry]), seconds=RPC_SECONDS, what="the rollout queue to take a group")
        self._prompts.ack.remote([opened.token])
        self._metrics.groups.inc()
        self._metrics.group_seconds.observe(seconds)

    def _response(self, sampled: Sampled) -> Response:
        return Response(
            tokens=sampled.tokens,
            logprobs=sampled.logprobs,
            mask=np.ones(len(sampled.tokens), dtype=np.bool_),
            spans=sampled.spans,
            finish=sampled.finish,
            text=self._chat.decode(sampled.tokens),
        )

    def _renew(self) -> None:
        """Renew leases a few times a lease period, so that long groups are not sampled twice; hear of those whose group
        has its fate already.
        """
        period = self._config.replay.lease_seconds / 4
        while not self._has_left.wait(period):
            # Copied in one go, which no other thread can interrupt.
            held = [(opened.token, id) for id, opened in list(self._open.items())]
            held += [(lease.token, lease.key) for lease in list(self._held)]
            try:
                if held:
                    asked = self._prompts.renew.remote(held)
                    self._gone.extend(get_by(asked, seconds=RPC_SECONDS, what="the prompt queue to renew leases"))
            except (ray.exceptions.RayError, DeltalError) as error:
                _say(f"{self.name} renews its leases again: {one_line(error, line=0)}")

    def _drop_gone(self) -> None:
        """End in the engine what nobody waits for any more: an evicted group would keep its place to the end."""
        while self._gone:
            opened = self._open.pop(self._gone.popleft(), None)
            if opened is not None:
                id = opened.request.id
                self._engine.abort([f"{id}#{response}" for response in range(opened.request.responses)])
                self._progress = time.monotonic()

    def _give_back(self) -> None:
        if self._held:
            tokens = [lease.token for lease in self._held]
            get_by(self._prompts.give_back.remote(tokens), seconds=RPC_SECONDS, what="the prompt queue to take back")
