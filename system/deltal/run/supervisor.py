"""The supervisor: creates the actors of a run, watches each, restarts what dies, scales the workers.

A member's life: `pending -> running -> left | died`; pending until Ray has found it a place and it has started, for
which nobody waits: it is asked nothing and told of. A dead RolloutWorker or Verifier is replaced, a dead learner rank
ends all ranks, which start again together with a new rendezvous.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from deltal.config import LearnerConfig, RolloutConfig, RunConfig, VerifyConfig
from deltal.errors import ActorLostError, DeltalError, ResourceError, one_line
from deltal.learner.actor import LearnerRank
from deltal.policy.store import PolicyStore
from deltal.queues.object_queue import ObjectQueue, own_cause
from deltal.replay.actor import ReplayActor
from deltal.rollout.actor import RolloutWorker
from deltal.run.deaths import DeathBudget, is_blameless
from deltal.verify.actor import Verifier

RPC_SECONDS = 60.0
LONGEST_LOOK = 10.0
"""Seconds that one look at the members can take."""


@dataclass(slots=True)
class Member:
    """One worker of a role."""

    name: str
    handle: Any
    needs: dict[str, float]
    """What Ray must find for it: CPU, GPU."""
    pending: bool = False
    """It has no place yet, or is starting there."""
    watch: asyncio.Task[None] | None = None
    leaving: bool = False
    node: str = ""
    pid: int = 0
    """Where it runs, once it has started."""
    stats: dict[str, Any] = field(default_factory=dict)
    """What it last answered."""
    silent: float = 0.0
    """Seconds since then, of those in which it was asked."""
    ended: str = ""
    """Why the supervisor ends it; empty while it does not."""
    born: float = field(default_factory=time.monotonic)


async def answer(reference: Any, seconds: float = RPC_SECONDS) -> Any:
    """Await a Ray reference with a deadline. Raises asyncio.TimeoutError, and an error of ours as it was raised."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(reference.future()), seconds)
    except ray.exceptions.RayTaskError as error:
        raise own_cause(error) from None


def _needs(room: RolloutConfig | VerifyConfig | LearnerConfig) -> dict[str, float]:
    """What Ray must find for one actor of a room."""
    gpus = getattr(room, "num_gpus", 0.0)
    return {"CPU": room.num_cpus} | ({"GPU": gpus} if gpus else {})


class Supervisor:
    """All actors of one run; owned by the Controller, so that they end with it.

    Args:
        config: of the run.
        run, folder: its name and the URL of its folder.
        controller: the Controller's own handle.
        say: takes a line for people.
        failed: called once with the error that ends the run.
    """

    def __init__(
        self, config: RunConfig, *, run: str, folder: str, controller: Any, token: str | None,
        say: Callable[[str], None], failed: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._config, self._run, self._folder, self._controller = config, run, folder, controller
        self._say, self._failed = say, failed
        self._common: dict[str, Any] = {"host": config.monitor.host, "token": token}
        self._numbers = {"rollout": itertools.count(), "verify": itertools.count()}
        self._deaths = DeathBudget(config.run.max_restarts)
        self._group: PlacementGroup | None = None
        self._looked = time.monotonic()
        self._ending: dict[str, asyncio.Task[None]] = {}
        self.members: dict[str, dict[str, Member]] = {"rollout": {}, "verify": {}, "learner": {}}
        self.wanted = {"rollout": 0, "verify": 0}
        self.services: dict[str, Any] = {}
        self.model = ""
        self.learner_done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def start_services(self) -> None:
        """ReplayBuffer, queues and PolicyStore: Ray restarts them by itself, calls under way are sent again."""
        config, forever = self._config, {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        queue = ray.remote(ObjectQueue).options(**forever, max_concurrency=1000)
        for name in ("prompt", "rollout"):
            self.services[name] = queue.remote(
                run=self._run, name=name, lease_seconds=config.replay.lease_seconds, **self._common
            )
        self.services["policy"] = (
            ray.remote(PolicyStore).options(**forever, max_concurrency=1000).remote(run=self._run, **self._common)
        )
        self.services["replay"] = (
            ray.remote(ReplayActor)
            .options(**forever, max_concurrency=1000)
            .remote(
                run=self._run, journal=f"{self._folder}/journal", settings=config.replay, batches=config.run.steps,
                responses=config.rollout.responses_per_prompt, max_length=config.rollout.max_response_tokens,
                **self._common,
            )
        )  # fmt: skip

    async def reserve_learner(self) -> None:
        """A placement group for all K ranks, kept over restarts. Raises ResourceError when there is no place."""
        settings = self._config.learner
        bundle = _needs(settings)
        self._group = placement_group([bundle] * settings.ranks, strategy="PACK")
        try:
            await answer(self._group.ready(), settings.rendezvous_deadline)
        except TimeoutError:
            raise ResourceError(
                f"no place for {settings.ranks} learner rank(s) with {bundle} within "
                f"{settings.rendezvous_deadline:.0f} s; the cluster has {ray.cluster_resources()}"
            ) from None

    async def start_learner(self) -> None:
        """All K ranks in their reserved place, and their run. Raises ResourceError when they do not start in time, and
        ActorLostError when one dies while it starts.
        """
        settings, bundle = self._config.learner, _needs(self._config.learner)
        variables = {"OMP_NUM_THREADS": str(settings.threads)}
        if ray.util.get_node_ip_address() == "127.0.0.1":
            variables["GLOO_SOCKET_IFNAME"] = "lo"
        ranks = [
            ray.remote(LearnerRank)
            .options(
                num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, max_concurrency=8,
                runtime_env={"env_vars": variables},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
            )
            .remote(
                rank=rank, run=self._run, model=self.model, config=self._config, folder=self._folder,
                replay=self.services["replay"], policy=self.services["policy"], controller=self._controller,
                **self._common,
            )
            for rank in range(settings.ranks)
        ]  # fmt: skip
        host, port = "", 0
        try:
            calls = (answer(rank.whereabouts.remote(), settings.rendezvous_deadline) for rank in ranks)
            places = await asyncio.gather(*calls)
            if settings.ranks > 1:
                host, port = await answer(ranks[0].open_rendezvous.remote(), settings.rendezvous_deadline)
        except TimeoutError:
            raise ResourceError(
                f"{settings.ranks} learner rank(s) did not start within {settings.rendezvous_deadline:.0f} s: is a "
                "node gone, or the machine overloaded?"
            ) from None
        except ray.exceptions.RayError as error:
            raise ActorLostError(f"a learner rank died while it started: {one_line(error, line=0)}") from error
        is_to_stop = any(member.leaving for member in self.members["learner"].values())  # those before these
        self.members["learner"] = {
            f"learner-{i}": Member(f"learner-{i}", handle, bundle, node=node, pid=pid)
            for i, (handle, (node, pid)) in enumerate(zip(ranks, places, strict=True))
        }
        runs = [handle.run.remote(host, port) for handle in ranks]
        self._learner_watch = asyncio.create_task(self._watch_learner(runs))
        if is_to_stop:
            self.stop_learner()

    async def scale(self, role: str, count: int) -> None:
        """Have `count` RolloutWorkers or Verifiers; those that leave finish what they hold first."""
        self.wanted[role] = count
        staying = [member for member in self.members[role].values() if not member.leaving]
        # Those without a place go first: they hold nothing.
        for member in sorted(staying, key=lambda member: member.pending)[count:]:
            member.leaving = True
            if member.pending:
                ray.kill(member.handle)
            else:
                member.handle.stop.remote()
        for _ in range(count - len(staying)):
            self._add(role)

    def stop_learner(self) -> None:
        """Ask all ranks to finish the step, checkpoint and leave."""
        for member in self.members["learner"].values():
            member.leaving = True
            member.handle.stop.remote()

    def count(self, role: str) -> int:
        """Members of a role that run and are not leaving."""
        return sum(not member.leaving and not member.pending for member in self.members[role].values())

    def pending(self) -> dict[str, dict[str, Any]]:
        """By role: `count` of members that have not started, `needs` of each, `seconds` the longest has waited."""
        found: dict[str, dict[str, Any]] = {}
        for role, members in self.members.items():
            waiting = [member for member in members.values() if member.pending and not member.leaving]
            if waiting:
                seconds = time.monotonic() - min(member.born for member in waiting)
                found[role] = {"count": len(waiting), "needs": waiting[0].needs, "seconds": seconds}
        return found

    def running(self, *roles: str) -> list[tuple[str, Member]]:
        """Role and member of all that have started; of all roles when none is named."""
        chosen = roles or tuple(self.members)
        return [(role, m) for role in chosen for m in list(self.members[role].values()) if not m.pending]

    async def ask(self, reference: Any, seconds: float = 5.0) -> Any:
        """What a member answers; None when it does not within `seconds`, or is gone."""
        try:
            return await answer(reference, seconds)
        except (TimeoutError, ray.exceptions.RayError, DeltalError):
            return None

    async def free(self) -> dict[str, float]:
        """What is free in the cluster, by resource; empty when Ray does not tell in time."""
        try:
            found: dict[str, float] = await asyncio.wait_for(asyncio.to_thread(ray.available_resources), 5.0)
            return found
        except (TimeoutError, ray.exceptions.RayError):
            return {}

    @property
    def restarts(self) -> Counter[str]:
        """Deaths of members, by role."""
        return self._deaths.told

    async def look_after(self) -> None:
        """Ask all members how they are. Who gives no answer, or makes no progress, beyond its deadline is ended, for a
        living process is not a working one; who watches it replaces it.
        """
        members, started = self.running(), time.monotonic()
        # A Controller that was held up itself has asked nobody meanwhile.
        since, self._looked = min(started - self._looked, LONGEST_LOOK), started
        told = await asyncio.gather(*(self.ask(member.handle.stats.remote(), 3.0) for _, member in members))
        for (role, member), stats in zip(members, told, strict=True):
            member.stats, member.silent = (stats, 0.0) if stats else (member.stats, member.silent + since)
            stuck = member.stats.get("stuck_seconds", 0.0)
            if member.ended:
                continue
            if member.silent > self._config.run.silence_deadline:
                self._end(member, f"gave no answer for {member.silent:.0f} s")
            elif stuck > self._progress_deadline(role):
                self._end(member, f"made no progress for {stuck:.0f} s")

    def _progress_deadline(self, role: str) -> float:
        config = self._config
        if role == "verify":
            # A group's responses may be judged one after the other, each to the end of its time.
            return RPC_SECONDS + config.verify.timeout * config.rollout.responses_per_prompt
        return config.rollout.step_deadline if role == "rollout" else config.learner.step_deadline

    def _end(self, member: Member, why: str) -> None:
        """End a member's process by its id, on its node: ray.kill leaves a stopped one where it is, with its memory."""
        member.ended = why
        self._say(f"{member.name} {why}; it is ended and replaced")

        async def end() -> None:
            place = NodeAffinitySchedulingStrategy(member.node, soft=False)
            task = ray.remote(end_process).options(num_cpus=0, scheduling_strategy=place)
            await self.ask(task.remote(member.pid), RPC_SECONDS)
            ray.kill(member.handle)

        self._ending[member.name] = asyncio.create_task(end())

    def _add(self, role: str) -> None:
        name = f"{role}-{next(self._numbers[role])}"
        handle = self._rollout_worker(name) if role == "rollout" else self._verifier(name)
        needs = _needs(self._config.rollout if role == "rollout" else self._config.verify)
        member = self.members[role][name] = Member(name, handle, needs, pending=True)
        member.watch = asyncio.create_task(self._watch(role, member))

    def _rollout_worker(self, name: str) -> Any:
        settings = self._config.rollout
        variables = {
            "OMP_NUM_THREADS": str(settings.threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        return (
            ray.remote(RolloutWorker)
            .options(
                num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, max_concurrency=8,
                runtime_env={"env_vars": variables},
            )
            .remote(
                name=name, run=self._run, model=self.model, config=self._config, queues=self.services,
                policy=self.services["policy"], **self._common,
            )
        )  # fmt: skip

    def _verifier(self, name: str) -> Any:
        settings = self._config.verify
        return (
            ray.remote(Verifier)
            .options(num_cpus=settings.num_cpus, max_concurrency=8)
            .remote(
                name=name, run=self._run, settings=settings, lease_seconds=self._config.replay.lease_seconds,
                max_response_tokens=self._config.rollout.max_response_tokens, rollouts=self.services["rollout"],
                replay=self.services["replay"], controller=self._controller, **self._common,
            )
        )  # fmt: skip

    async def _watch(self, role: str, member: Member) -> None:
        """Wait for a worker's start, however long that takes, and for its end; replace it unless it was to leave."""
        try:
            member.node, member.pid = await asyncio.wrap_future(member.handle.whereabouts.remote().future())
            member.pending = False
            await asyncio.wrap_future(member.handle.run.remote().future())
            died = None
        except ray.exceptions.RayError as error:
            died = error
        self.members[role].pop(member.name, None)
        ray.kill(member.handle)
        if member.leaving or died is None:
            return
        if self._count_death(role, member, died):
            await asyncio.sleep(self._deaths.backoff(role))
            if sum(not one.leaving for one in self.members[role].values()) < self.wanted[role]:
                self._add(role)

    async def _watch_learner(self, runs: list[Any]) -> None:
        """Wait for all ranks; when one dies, end the others and start all again."""
        try:
            versions = await asyncio.gather(*(asyncio.wrap_future(run.future()) for run in runs))
            self.learner_done.set_result(versions[0])
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            ended = next((member for member in self.members["learner"].values() if member.ended), None)
            for member in self.members["learner"].values():
                ray.kill(member.handle)
            if isinstance(cause, DeltalError):
                self._failed(cause)
            else:
                await self._restart_learner(error, ended)

    async def _restart_learner(self, died: BaseException, ended: Member | None) -> None:
        """Start all ranks again, also when one dies while it starts; fails the run after too many deaths."""
        while self._count_death("learner", ended, died):
            await asyncio.sleep(self._deaths.backoff("learner"))
            try:
                await self.start_learner()
                return
            except ActorLostError as again:
                died = again
            except DeltalError as error:
                self._failed(error)
                return

    def _count_death(self, role: str, member: Member | None, error: BaseException) -> bool:
        """Note a death; False when it was one too many and the run fails. `member`: who died, where that is known."""
        name = member.name if member else f"a {role} rank"
        blameless = is_blameless(error)
        is_borne = self._deaths.note(role, self.wanted.get(role, 0), now=time.monotonic(), blameless=blameless)
        cause = getattr(error, "cause", None)
        if isinstance(cause, DeltalError) and cause.exit_code == 2:
            self._failed(cause)
            return False
        text = f"it {member.ended}" if member and member.ended else one_line(error, line=0)
        if not is_borne:
            count = self._deaths.count(role)
            self._failed(ActorLostError(f"{name} died, the {count}th of its role in 10 minutes: {text}"))
            return False
        if not (member and member.ended):  # of which it was told when it was ended
            self._say(f"{name} died and is replaced: {text}")
        return True


def end_process(pid: int) -> None:
    """Task body: kill -9 of an actor's process on this node, if it is one still."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if any("ray::" in part for part in process.cmdline()):
            process.kill()
