"""Delivers reports: gathers changes for a moment, sends them in batches, and gives up on single ones only.

What has not arrived stays due, on disk too, so nothing is lost with the process (docs/contract/node-api.md §6.3 and
§6.4).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from plexd.errors import (
    Conflict,
    ControlError,
    Forbidden,
    NotFound,
    Rejected,
    TooLarge,
    Transient,
    Unauthenticated,
)
from plexd.log import get_logger
from plexd.mesh.desired import DataEntry
from plexd.node.reports import Reports
from plexd.node.state import Node
from plexd.runtime.backoff import Backoff, requested_delay
from plexd.runtime.waiting import set_within
from plexd.store.reports import Operation

log = get_logger("reports")

BATCH_OPERATIONS = 100
BATCH_BYTES = 900 << 10
ENTRY_OVERHEAD_BYTES = 200  # names of members, version, time, content type
FIRST_RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 300.0
REFUSED_RETRY_SECONDS = 300.0  # after 403, and 404 for the node
REFUSALS = 3
MAX_VERSION = 2**63 - 1

Batch = Mapping[str, Operation]


class ControlPlane(Protocol):
    async def sync_reports(self, entries: Sequence[DataEntry], deleted: Sequence[str]) -> None:
        """One try. Raises ControlError."""


class ReportSync:
    """`debounce` is in seconds, from the first change after an idle moment to the request."""

    name = "reports"

    def __init__(
        self,
        control: ControlPlane,
        node: Node,
        reports: Reports,
        debounce: float,
        now: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._control = control
        self._node = node
        self._reports = reports
        self._debounce = debounce
        self._now = now
        self._backoff = Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, uniform)
        self._uniform = uniform
        self._retry_now = asyncio.Event()

    def retry(self) -> None:
        """The control plane is back: what waits for its time need not."""
        self._retry_now.set()

    async def run(self) -> None:
        gather = 0.0 if self._reports.unsent.is_set() else self._debounce  # what an earlier run left goes at once
        while True:
            await self._reports.unsent.wait()
            await asyncio.sleep(gather)
            gather = self._debounce
            while (pause := await self._try()) is not None:
                await set_within(self._retry_now, pause)

    async def flush(self) -> None:
        """A last attempt. Raises ControlError."""
        if self._reports.pending and self._node.accepted.is_set():
            await self._deliver()

    async def _try(self) -> float | None:
        """Send what is due; the seconds until the next attempt, None when all of it has gone."""
        await self._node.accepted.wait()
        self._retry_now.clear()
        try:
            await self._deliver()
        except (Forbidden, NotFound) as exc:
            log.error("reports refused", error=str(exc), next_try_seconds=REFUSED_RETRY_SECONDS)
            return REFUSED_RETRY_SECONDS
        except (Transient, Unauthenticated, OSError) as exc:
            pause = self._backoff.next()
            if isinstance(exc, Transient):
                pause = max(pause, requested_delay(exc, self._uniform))
            log.warning("reports not sent", error=str(exc), pending=len(self._reports.pending), next_try_seconds=pause)
            return pause
        self._backoff.reset()
        return None

    async def _deliver(self) -> None:
        """Everything that is due at this moment. Raises ControlError, or OSError, when the rest has to wait."""
        for batch in _batches(self._reports):
            if len(batch) == 1:
                await self._isolate(batch)
                continue
            try:
                await self._send(batch)
            except (Conflict, Rejected, TooLarge, NotFound) as exc:
                log.info("reports are sent one by one", count=len(batch), error=str(exc))
                await self._isolate(batch)

    async def _send(self, batch: Batch) -> None:
        # what was written over since it was listed has its turn later
        current = {key: op for key, op in batch.items() if self._reports.pending.get(key) == op}
        if not current:
            return
        entries = [self._reports.entries[key] for key, op in current.items() if op.op == "put"]
        await self._control.sync_reports(entries, [key for key, op in current.items() if op.op == "delete"])
        await self._reports.sent(current)

    async def _isolate(self, batch: Batch) -> None:
        """Each alone, so that one that is refused holds up no other.

        A 404 is for the key only where another key was taken; else for the node, and all of them wait.
        """
        unknown: dict[str, tuple[Operation, NotFound]] = {}
        for key, operation in batch.items():
            try:
                await self._send_alone(key, operation)
            except NotFound as exc:
                unknown[key] = (operation, exc)
        for key, (operation, refusal) in unknown.items():
            if len(unknown) == len(batch):
                raise refusal
            await self._park(key, operation, refusal)

    async def _send_alone(self, key: str, operation: Operation) -> None:
        for refusal in range(1, REFUSALS + 1):
            try:
                await self._send({key: operation})
            except Conflict as exc:
                if refusal == REFUSALS or operation.op == "delete":
                    await self._park(key, operation, exc)
                    return
                version = _conflicting_version(exc, key)
                wanted = version + 1 if version is not None else max(operation.version + 1, int(self._now()))
                log.info("report gets a newer version", key=key, version=wanted)
                await self._reports.raise_version(key, operation, wanted)
                operation = self._reports.pending.get(key, operation)
            except (Rejected, TooLarge) as exc:
                await self._park(key, operation, exc)
                return
            else:
                return

    async def _park(self, key: str, operation: Operation, exc: ControlError) -> None:
        log.error("report rejected", key=key, op=operation.op, error=str(exc), next_step="it waits for the next write")
        await self._reports.park(key, operation)


def _batches(reports: Reports) -> Iterator[Batch]:
    batch: dict[str, Operation] = {}
    size = 0
    for key, operation in sorted(reports.pending.items()):
        entry = reports.entries.get(key)
        weight = ENTRY_OVERHEAD_BYTES + len(key)
        weight += len(entry.payload.encode()) if operation.op == "put" and entry is not None else 0
        if batch and (len(batch) == BATCH_OPERATIONS or size + weight > BATCH_BYTES):
            yield batch
            batch, size = {}, 0
        batch[key] = operation
        size += weight
    if batch:
        yield batch


def _conflicting_version(exc: Conflict, key: str) -> int | None:
    """The version the control plane holds, as far as its answer says so."""
    try:
        for conflict in json.loads(exc.body)["conflicts"]:
            version = conflict["version"]
            if conflict["key"] == key and isinstance(version, int) and 0 <= version < MAX_VERSION:
                return version
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
