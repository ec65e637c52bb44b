"""The ReplayBuffer's Ray actor: the one writer of the journal. Every answer waits until its records are on disk."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import ray

from deltal.config import ReplayConfig
from deltal.errors import DeadlineError, FolderError, JournalError
from deltal.monitor.http import serve_metrics
from deltal.monitor.metrics import ReplayMetrics
from deltal.replay.buffer import ReplayBuffer, Waiting
from deltal.replay.journal import Journal
from deltal.replay.ledger import Admitted, BatchFormed, Evicted, Issued, Record, Trained
from deltal.types import GroupId, Receipt, ScoredGroup

Boxed = list[Any]
"""A reference in a list, which Ray hands on as it is."""


class ReplayActor:
    """Async Ray actor around `ReplayBuffer` and `Journal`; a restart rebuilds both from the run folder.

    All calls may be sent twice: a known id, batch or version gets its first outcome again.
    """

    def __init__(
        self,
        *,
        run: str,
        journal: str,
        settings: ReplayConfig,
        batches: int,
        responses: int,
        max_length: int,
        host: str,
        token: str | None,
    ) -> None:
        self._journal = Journal(journal)
        self._buffer = ReplayBuffer(settings, batches=batches, responses=responses, max_length=max_length)
        self._broken: FolderError | None = None
        """Why the journal takes no more records; every call tells it, and the run ends with it."""
        try:
            # Opened first: an older writer can then add nothing that is not read here.
            self._journal.open_writer(time.time())
        except FolderError as error:
            self._broken = error
        for record in self._journal.read():
            self._buffer.apply(record)
        self._pending: list[tuple[Record, asyncio.Future[None]]] = []
        self._writing: list[tuple[Record, asyncio.Future[None]]] = []
        self._boxes: dict[int, asyncio.Future[Boxed]] = {}
        self._changed = asyncio.Condition()
        self._flusher: asyncio.Task[None] | None = None
        self._metrics = ReplayMetrics(run, "replay")
        self._server = serve_metrics(self._metrics.registry, host=host, token=token)

    async def metrics_port(self) -> int:
        """Port of this actor's metrics."""
        return self._server.port

    async def issue(self, ids: list[GroupId], cursor: tuple[int, int]) -> int:
        """Journal that `ids` exist and where the cursor stands after them; returns the version stamped on them."""
        self._require_whole()
        record = self._buffer.issue(ids, cursor, at=time.time())
        if record is not None:
            await self._on_disk(self._fold(record))
        return self._buffer.ledger.entries[ids[0]].version

    async def admit(self, groups: list[ScoredGroup]) -> list[Receipt]:
        """Admit scored groups, each once; the receipts say what became of them."""
        self._require_whole()
        receipts, records, refused = [], [], self._buffer.refused
        for scored in groups:
            receipt, record = self._buffer.admit(scored)
            receipts.append(receipt)
            if record is not None:
                records.append(self._fold(record))
        self._metrics.duplicates.inc(sum(receipt.duplicate for receipt in receipts))
        self._metrics.refused.inc(self._buffer.refused - refused)
        await self._on_disk(*records)
        await self._settled()
        return receipts

    async def sample(self, version: int, wait_seconds: float) -> Boxed | Waiting:
        """Batch `version`, the same at each call: a list that holds a reference to its groups, the same one for every
        rank. `Waiting` when there is none after `wait_seconds`.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            self._require_whole()
            outcome = self._buffer.sample(version)
            if isinstance(outcome, BatchFormed):
                await self._on_disk(self._fold(outcome))
                outcome = outcome.ids
            if isinstance(outcome, tuple):
                await self._settled()
                return await self._boxed(version, outcome)
            left = deadline - time.monotonic()
            if left <= 0:
                return outcome
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    return outcome

    async def trained(self, version: int, skipped: bool) -> None:
        """Batch `version` is trained and `version + 1` published: its slots are free."""
        self._require_whole()
        record = self._buffer.trained(version, skipped=skipped)
        if record is not None:
            await self._on_disk(self._fold(record))

    async def evict(self, ids: list[GroupId], reason: str) -> list[GroupId]:
        """Evict groups in flight that have no outcome; returns which."""
        return await self._evict(self._buffer.evict(ids, reason))

    async def evict_overdue(self) -> list[GroupId]:
        """Evict groups older than the deadline; returns which."""
        return await self._evict(self._buffer.overdue(at=time.time()))

    async def unaccounted(self, present: set[GroupId]) -> list[tuple[GroupId, int]]:
        """Groups (id, issued version) without an outcome that are not in `present`."""
        entries = self._buffer.ledger.entries
        return [(id, entries[id].version) for id in self._buffer.unaccounted(present)]

    async def state(self) -> dict[str, Any]:
        """Ledger counts, versions, cursor and open slots, for the Controller and the learner."""
        self._require_whole()
        ledger = self._buffer.ledger
        self._metrics.in_flight.set(len(ledger.open))
        self._metrics.admitted_waiting.set(sum(entry.admitted for entry in ledger.open.values()))
        return {
            "policy_version": ledger.policy_version,
            "batches": len(ledger.batches),
            "cursor": ledger.cursor,
            "open_slots": self._buffer.open_slots(),
            "counts": ledger.counts(),
            "reasons": {key: count for key, count in ledger.fates.items() if ":" in key},
            "duplicates": self._buffer.duplicates,
            "refused": self._buffer.refused,
            "skipped": ledger.skipped,
        }

    async def _boxed(self, version: int, ids: tuple[GroupId, ...]) -> Boxed:
        """One reference for all ranks that ask; the one of the batch before is let go."""
        if version not in self._boxes:
            self._boxes = {version: asyncio.ensure_future(self._box(ids))}
        try:
            return await asyncio.shield(self._boxes[version])
        except BaseException:
            self._boxes.pop(version, None)
            raise

    async def _box(self, ids: tuple[GroupId, ...]) -> Boxed:
        ready = self._buffer.ready
        if all(id in ready for id in ids):
            return [ray.put(tuple(ready[id] for id in ids))]
        # Read back once, and not on the loop: admissions go on meanwhile.
        return [ray.put(tuple(await asyncio.to_thread(self._journal.find, ids)))]

    async def _evict(self, records: list[Evicted]) -> list[GroupId]:
        await self._on_disk(*(self._fold(record) for record in records))
        return [record.id for record in records]

    def _fold(self, record: Record) -> asyncio.Future[None]:
        """Fold the record at once, in the same turn of the loop in which the buffer made it: between the two nothing
        may look at the state. The future is done when it is on disk.
        """
        self._buffer.apply(record)
        self._count(record)
        done = asyncio.get_running_loop().create_future()
        self._pending.append((record, done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return done

    async def _on_disk(self, *records: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait_for(asyncio.gather(*records), 60.0)
        except TimeoutError:
            raise DeadlineError(
                "the journal did not reach the disk within 60 s: is the run folder's disk full?"
            ) from None
        async with self._changed:
            self._changed.notify_all()

    async def _settled(self) -> None:
        """Wait until every record folded so far is on disk, so that an outcome given again is as true as the first."""
        if self._pending or self._writing:
            waiting = [done for _, done in [*self._writing, *self._pending]]
            await asyncio.wait(waiting, timeout=60.0)
        self._require_whole()

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise self._broken

    async def _flush(self) -> None:
        """Write pending records, at most `flush_records` a segment, until none is left."""
        settings = self._buffer.settings
        while self._pending:
            if len(self._pending) < settings.flush_records:
                await asyncio.sleep(settings.flush_seconds)
            limit = settings.flush_records
            taken, self._pending = self._pending[:limit], self._pending[limit:]
            self._writing = taken
            started = time.monotonic()
            try:
                await asyncio.to_thread(self._journal.write, [record for record, _ in taken])
            except JournalError as error:
                # Nothing after a lost record may be acked: the process ends, its successor rebuilds from disk.
                print(f"deltal: the ReplayBuffer stops: {error}", flush=True)  # noqa: T201
                os._exit(1)
            except FolderError as error:
                # A successor would fail alike. The state holds records that are not on disk: it is told no more.
                self._broken = error
                for _, done in [*taken, *self._pending]:
                    if not done.done():
                        done.set_exception(error)
                self._pending, self._writing = [], []
                return
            self._metrics.flush_seconds.observe(time.monotonic() - started)
            self._metrics.flush_records.observe(len(taken))
            for _, done in taken:
                if not done.done():
                    done.set_result(None)
            self._writing = []

    def _count(self, record: Record) -> None:
        metrics = self._metrics
        match record:
            case Issued(ids):
                metrics.issued.inc(len(ids))
            case Admitted(_, filtered) if filtered:
                metrics.filtered.labels(reason=filtered).inc()
            case Evicted(_, reason):
                metrics.evicted.labels(reason=reason).inc()
            case BatchFormed(version, ids):
                metrics.consumed.inc(len(ids))
                for id in ids:
                    oldest = self._buffer.ledger.entries[id].oldest_version
                    metrics.staleness.observe(version - (version if oldest is None else oldest))
            case Trained(version):
                metrics.policy_version.set(version + 1)
            case _:
                pass
