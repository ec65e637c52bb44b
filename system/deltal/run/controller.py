"""The Controller: one named actor a run. It admits prompts, supervises the others, evaluates, and tells.

    prompts --> [prompt queue] --> RolloutWorker (vLLM) --> [rollout queue] --> Verifier
       ^         cursor.next()      0…N, leases, whole       references          0…N, sandboxed
       |         admission          groups out                                      |
    Controller                                                     admits once      v
       |  supervises, scales,      PolicyStore <-- publishes --  Learner <-- ReplayBuffer
       |  reconciles, evaluates      newest        version v+1   K ranks     batch v, journal
       v                               |                          FSDP2         = the truth
    live page, /sd, summary            +--> RolloutWorkers load between engine steps

1 data/cursor.py next() under run/admission.py   2 rollout/actor.py leases, data/chat.py makes tokens
3 rollout/vllm_engine.py step()                  4 queues/object_queue.py put
5 verify/actor.py verifies                       6 replay/actor.py admits, journals, sample(version)
7 learner/batch.py assemble, pack                8 learner/step.py Σ coefficient × objective, backward
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from deltal.config import RunConfig
from deltal.data.cursor import PromptCursor
from deltal.data.made_models import ready_folder
from deltal.errors import DeadlineError, DeltalError, UserError, one_line
from deltal.folder import RunFolder
from deltal.learner.actor import prepare_model
from deltal.monitor.http import live_app, serve_app
from deltal.plan.prompts import prompts_of_run
from deltal.run.admission import open_slots
from deltal.run.evaluation import Evaluation
from deltal.run.observer import Observer
from deltal.run.supervisor import Supervisor, answer
from deltal.types import GroupId, Prompt, RolloutRequest, ScoredGroup

MODEL_SECONDS = 3600.0
"""A large model may have to be downloaded or written."""
STEP_SECONDS = 3600.0
"""A step under way and its checkpoint; who will not wait presses Ctrl-C again."""


class StoppedError(DeltalError):
    """The run was asked to stop."""


class Controller:
    """Async Ray actor that owns all other actors of the run: when it dies, Ray ends them.

    Args:
        config: resolved settings.
        folder: URL of the run folder, locked by the driver.
        token: needed to read anything when listening beyond loopback.
    """

    def __init__(self, config: RunConfig, folder: str, token: str | None) -> None:
        self._config, self._folder, self._token = config, RunFolder(folder), token
        self._observer = Observer(config, self._folder)
        self._paused = self._is_admitting = False
        self._stop, self._issuing, self._slots_may_be_free = asyncio.Event(), asyncio.Lock(), asyncio.Event()
        self._evaluation: Evaluation | None = None
        self._whole: asyncio.Task[dict[str, Any]] | None = None

    # --- what others call -------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """The whole run, begun by the first call; a driver that lost its answer on the way asks again.

        Returns the summary; its `state` is done, stopped or failed (with `error`, `exit_code`).
        """
        if self._whole is None:
            self._whole = asyncio.create_task(self._run_whole())
        return await asyncio.shield(self._whole)

    async def _run_whole(self) -> dict[str, Any]:
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        outcome: dict[str, Any] = {}
        try:
            await self._run()
            self._observer.enter("done")
        except StoppedError:
            self._observer.enter("stopped")
        except DeltalError as error:
            self._observer.enter("failed")
            outcome = {"error": str(error), "exit_code": error.exit_code}
        await self._observer.look()  # What was trained since the last one, however the run ended.
        return await asyncio.to_thread(self._observer.last_words, outcome)

    async def status(self) -> dict[str, Any]:
        """Facts for the progress display and `deltal status`."""
        return self._observer.status()

    async def scale(self, counts: dict[str, int]) -> dict[str, int]:
        """Have so many workers of each role (`rollout`, `verify`); returns what is wanted now."""
        if self._observer.address is None:
            raise UserError(f"{self._folder.name} is still starting; scale it when it trains")
        for role, count in counts.items():
            await self._supervisor.scale(role, count)
        self._observer.say("scaled to " + ", ".join(f"{role} = {n}" for role, n in self._supervisor.wanted.items()))
        return dict(self._supervisor.wanted)

    async def stop(self) -> None:
        """Finish the step under way, checkpoint, leave."""
        self._observer.say("stopping: the step under way is finished and checkpointed")
        self._stop.set()

    async def pause(self, paused: bool) -> None:
        """Close or open admission; what is in flight goes on."""
        self._paused = paused
        if self._observer.state in ("training", "paused"):
            self._observer.enter("paused" if paused else "training")

    async def evaluated(self, groups: list[ScoredGroup]) -> None:
        """Take scored evaluation groups from a Verifier."""
        for scored in groups:
            if self._evaluation is not None:
                self._evaluation.take(scored)

    async def admits(self) -> bool:
        """Whether groups are admitted: not before training, after it, or in a pause."""
        return self._is_admitting and not self._paused

    async def tell(self, text: str) -> None:
        """A line for people, from another actor."""
        self._observer.say(text)

    async def report_step(self, row: dict[str, Any]) -> None:
        """Take the row of a finished step from learner rank 0 and append it to metrics.jsonl."""
        self._slots_may_be_free.set()
        self._observer.take_row(row)
        await asyncio.to_thread(self._folder.append_rows, "metrics.jsonl", [row])

    async def checkpoints_to_keep(self) -> list[int]:
        """Versions whose checkpoints stay however old they get: the best so far, and the one under evaluation."""
        return self._observer.checkpoints_to_keep()

    # --- the run, from start to end ---------------------------------------------------------------

    async def _run(self) -> None:
        with self._observer.phase("starting"):
            await self._start()
        observer = self._observer
        loops = [
            asyncio.create_task(self._forever(observer.look, 1.0)),
            asyncio.create_task(self._forever(self._reconcile, self._config.replay.lease_seconds)),
            asyncio.create_task(self._forever(self._admit, 0.0)),
        ]
        try:
            if self._held_out and not observer.evaluations:
                with self._observer.phase("evaluating", "evaluation_before"):
                    await self._evaluate("before")
            with self._observer.phase("training"):
                await self._train()
            if self._held_out:
                with self._observer.phase("evaluating", "evaluation_after"):
                    await self._evaluate("after")
            if self._config.run.export and self._folder.is_local:
                with self._observer.phase("exporting"):
                    await self._export()
        finally:
            self._is_admitting = False
            for loop in loops:
                loop.cancel()

    async def _start(self) -> None:
        """The page first, so that people can watch; then data, services, model folder, learner and workers."""
        config, observer = self._config, self._observer
        me = ray.get_runtime_context().current_actor
        self._supervisor = supervisor = Supervisor(
            config, run=self._folder.name, folder=self._folder.url, controller=me, token=self._token,
            say=observer.say, failed=self._fail,
        )  # fmt: skip
        host = config.monitor.host
        app = live_app(
            status=observer.status, targets=lambda: observer.targets, registry=observer.metrics.registry,
            token=self._token,
        )  # fmt: skip
        page = serve_app(app, host=host, port=config.monitor.port)
        # A listener on all interfaces is reached by this node's address.
        reach = ray.util.get_node_ip_address() if host in ("0.0.0.0", "::") else host
        observer.begin(supervisor, reach, page.port)
        prompts = await asyncio.to_thread(prompts_of_run, config, self._folder)
        self._prompts, self._held_out, observer.rows_skipped = prompts.train, prompts.held_out, prompts.rows_skipped
        supervisor.start_services()
        await observer.look()
        self._cursor = PromptCursor(len(self._prompts), config.run.seed)
        model = ready_folder(config.model)
        if model is None:
            observer.say("preparing the model folder")
            task = ray.remote(prepare_model).options(num_cpus=0)
            prepared = answer(task.remote(config.model), MODEL_SECONDS)
            model = await self._unless_stopped(prepared, f"the model folder within {MODEL_SECONDS:.0f} s")
        supervisor.model = model
        observer.say("loading the learner and the engine")
        # The learner's place first, since workers may take all others; then the workers, whose engines load longest.
        await self._unless_stopped(supervisor.reserve_learner())
        await supervisor.scale("verify", config.verify.workers)
        await supervisor.scale("rollout", config.rollout.workers)
        await self._unless_stopped(supervisor.start_learner())

    async def _train(self) -> None:
        """Until the learner has done its last step, or `stop`; evaluates every N steps on the way."""
        learner, every = self._supervisor.learner_done, self._config.evaluation.every
        evaluated = self._observer.policy_version
        during: asyncio.Task[None] | None = None
        self._is_admitting = True
        self._slots_may_be_free.set()
        while not learner.done():
            await self._unless_stopped(asyncio.wait([learner], timeout=0.5))
            if during is not None and during.done():
                await during  # Raises what went wrong with it.
                during = None
            version = self._observer.policy_version
            is_due = bool(every and self._held_out) and version // max(every, 1) > evaluated // max(every, 1)
            if is_due and version < self._config.run.steps and during is None:
                evaluated = version
                during = asyncio.create_task(self._evaluate("during"))
        self._is_admitting = False
        if during is not None:
            await self._unless_stopped(during)

    async def _leave(self) -> None:
        """After `stop`: no new groups, the learner checkpoints, the others go."""
        self._is_admitting = False
        self._observer.enter("stopping")
        if self._supervisor.members["learner"] and not self._supervisor.learner_done.done():
            self._supervisor.stop_learner()
            waits: list[asyncio.Future[Any]] = [self._supervisor.learner_done, self._failure]
            done, _ = await asyncio.wait(waits, timeout=STEP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineError(f"the learner did not finish its step within {STEP_SECONDS:.0f} s of the stop")
            if self._failure.done():
                self._failure.result()
        raise StoppedError("stopped")

    async def _evaluate(self, label: str) -> None:
        """One evaluation by the fleet. Raises DeadlineError that says how many prompts were outstanding."""
        policy, newest = self._supervisor.services["policy"], None
        while newest is None or newest < self._observer.policy_version:
            newest = await self._unless_stopped(answer(policy.newest.remote()))
            await asyncio.sleep(0.1)
        evaluation = self._evaluation = self._observer.evaluation = Evaluation.of(
            label, newest, self._held_out, self._config
        )
        await self._put(list(evaluation.requests.values()))
        limit, began = self._config.evaluation.deadline, time.time()
        deadline = time.monotonic() + limit
        while not evaluation.is_complete:
            await self._unless_stopped(asyncio.sleep(0.1))
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"the evaluation waited {limit:.0f} s for {len(evaluation.requests) - len(evaluation.results)} of "
                    f"{len(evaluation.requests)} prompts; {self._supervisor.count('rollout')} workers are alive"
                )
        self._evaluation = None
        row = {"time": began, "seconds": time.time() - began} | await asyncio.to_thread(evaluation.row)
        self._observer.evaluation = None
        self._observer.take_evaluation(row)
        self._folder.append_rows("evaluations.jsonl", [row])

    async def _export(self) -> None:
        """A Hugging Face folder from the last checkpoint, by rank 0."""
        facts = {f"held-out accuracy, {row['label']}": row["accuracy"] for row in self._observer.evaluations}
        rank = next(iter(self._supervisor.members["learner"].values())).handle
        done = rank.export.remote(self._folder.path("export"), facts)
        await self._unless_stopped(answer(done, MODEL_SECONDS), f"the export within {MODEL_SECONDS:.0f} s")

    # --- loops ------------------------------------------------------------------------------------

    async def _forever(self, body: Callable[[], Awaitable[None]], period: float) -> None:
        """Repeat `body`; a service that restarts is waited for, one that stays away fails the run."""
        failures = 0
        while True:
            try:
                await body()
                failures = 0
            except (TimeoutError, ray.exceptions.RayError) as error:
                failures += 1
                if failures >= 5:
                    self._fail(DeadlineError(f"{body.__name__.strip('_')} failed {failures} times in a row: {error!r}"))
                    return
            except Exception as error:
                self._fail(error)
                return
            await asyncio.sleep(period)

    async def _admit(self) -> None:
        """Issue groups while there are slots: journal first, then the prompt queue.

        Looks after each step, which frees slots, and each second, since filtering and eviction free some too.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._slots_may_be_free.wait(), 1.0)
        self._slots_may_be_free.clear()
        is_open = self._is_admitting and not self._paused and not self._stop.is_set()
        if not is_open:
            return
        services = self._supervisor.services
        state = await answer(services["replay"].state.remote())
        newest = await answer(services["policy"].newest.remote())
        count = open_slots(state, newest_version=newest, is_open=is_open)
        self._observer.metrics.open_slots.set(count)
        if count == 0:
            return
        async with self._issuing:
            # The journal's cursor is the truth: a call that was lost on its way has not moved it.
            epoch, index = state["cursor"]
            self._cursor = PromptCursor(len(self._prompts), self._config.run.seed, epoch=epoch, index=index)
            ids = [self._cursor.next() for _ in range(count)]
            version = await answer(services["replay"].issue.remote(ids, (self._cursor.epoch, self._cursor.index)))
            await self._put([self._request(id, version) for id in ids])

    async def _reconcile(self) -> None:
        """Put again what exists and is nowhere; evict what is overdue or ends its readers."""
        services = self._supervisor.services
        async with self._issuing:
            await self._evict()
            # The order matters: a group moves from prompt queue to rollout queue to the buffer, never back.
            present = await answer(services["prompt"].keys.remote())
            present |= await answer(services["rollout"].keys.remote())
            lost = await answer(services["replay"].unaccounted.remote(present))
            requests = [self._request(id, version) for id, version in lost]
            if self._evaluation is not None:
                requests += self._evaluation.missing(present)
            if requests:
                self._observer.metrics.reconciled.inc(len(requests))
                await self._put(requests)

    async def _evict(self) -> None:
        """Groups older than their deadline, and groups that ended three readers, which are kept aside."""
        services = self._supervisor.services
        gone = await answer(services["replay"].evict_overdue.remote())
        if gone:
            self._observer.say(f"{len(gone)} group(s) were older than replay.group_deadline and were evicted")
        for queue in ("prompt", "rollout"):
            poisoned = await answer(services[queue].delivered.remote(3))
            if poisoned:
                await answer(services["replay"].evict.remote(poisoned, "poisoned"))
                if self._evaluation is not None:
                    self._evaluation.give_up(poisoned)
                rows = [{"group": str(id), "prompt": self._prompt(id).id, "queue": queue} for id in poisoned]
                self._folder.append_rows("poisoned.jsonl", rows)
                self._observer.say(f"{len(poisoned)} group(s) ended three readers and were evicted: poisoned.jsonl")
                gone += poisoned
        if gone:
            for queue in ("prompt", "rollout"):
                await answer(services[queue].remove.remote(gone))

    # --- small things -----------------------------------------------------------------------------

    def _prompt(self, id: GroupId) -> Prompt:
        return self._held_out[id.index] if id.purpose == "eval" else self._prompts[self._cursor.row(id)]

    def _request(self, id: GroupId, version: int) -> RolloutRequest:
        rollout = self._config.rollout
        return RolloutRequest(
            id=id, prompt=self._prompt(id), issued_version=version, responses=rollout.responses_per_prompt,
            temperature=rollout.temperature, max_tokens=rollout.max_response_tokens,
        )  # fmt: skip

    async def _put(self, requests: list[RolloutRequest]) -> None:
        entries = [(request.id, [ray.put(request)]) for request in requests]
        await answer(self._supervisor.services["prompt"].put.remote(entries))

    async def _unless_stopped(self, work: Awaitable[Any], what: str = "an answer") -> Any:
        """Await `work`, but not beyond a stop or a failure. Raises DeadlineError with `what` when it times out."""
        task, stopping = asyncio.ensure_future(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([task, stopping, self._failure], return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            if not task.done():
                await self._leave()
        finally:
            stopping.cancel()
        try:
            return task.result()
        except TimeoutError:
            raise DeadlineError(f"waited in vain for {what}") from None
        except ray.exceptions.RayTaskError as error:
            raise UserError(one_line(error, line=0)) from None

    def _fail(self, error: BaseException) -> None:
        """End the run with `error`; the first one counts."""
        if not self._failure.done():
            known = isinstance(error, DeltalError)
            self._failure.set_exception(error if known else DeltalError(f"{type(error).__name__}: {one_line(error)}"))
