"""What programs on this node report: written by them through the node API, delivered by the service `reports`.

One writer at a time; disk first, memory second (docs/contract/node-api.md §4.1, §5 and §6.3).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar

from plexd.log import get_logger
from plexd.mesh.desired import DataEntry
from plexd.store.reports import Delivery, Operation
from plexd.wire.times import format_time

log = get_logger("reports")

MAX_ENTRIES = 1024
MAX_UNSENT_DELETES = 4096
REMEMBERED_DELETES = 4096  # versions of keys that were deleted, and said so; older ones share a floor

T = TypeVar("T")
Precondition = Callable[[int], bool]
"""Whether a write may go on, given the current version; 0: there is no such entry."""


class Store(Protocol):
    """`store.reports.ReportStore` is the real one; all calls block, and writes raise OSError."""

    def load(self) -> tuple[dict[str, DataEntry], Delivery]: ...

    def put(self, entry: DataEntry, delivery: Delivery) -> None: ...

    def delete(self, key: str, delivery: Delivery) -> None: ...

    def save(self, delivery: Delivery) -> None: ...


class VersionConflict(Exception):
    """The precondition does not hold."""

    def __init__(self, current_version: int) -> None:
        super().__init__(f"the current version is {current_version}")
        self.current_version = current_version


class NoSuchReport(Exception):
    pass


class TooManyReports(Exception):
    pass


class Reports:
    """`entries` may be read at any time. `unsent` is set while something is due to the control plane."""

    def __init__(self, store: Store, now: Callable[[], float] = time.time) -> None:
        self.unsent = asyncio.Event()
        self.on_change: list[Callable[[], None]] = []
        self._store = store
        self._now = now
        self._writing = asyncio.Lock()
        self._entries, self._delivery = store.load()
        self._note()

    @property
    def entries(self) -> Mapping[str, DataEntry]:
        return self._entries

    @property
    def pending(self) -> Mapping[str, Operation]:
        return self._delivery.pending

    @property
    def parked(self) -> Mapping[str, Operation]:
        return self._delivery.parked

    def sync_of(self, key: str) -> Literal["synced", "pending", "rejected"]:
        if key in self._delivery.pending:
            return "pending"
        return "rejected" if key in self._delivery.parked else "synced"

    # what local programs do

    async def put(self, key: str, content_type: str, payload: str, may: Precondition) -> DataEntry:
        """The entry as stored, durably. Raises VersionConflict, TooManyReports, and OSError when the disk refuses."""
        return await _through(self._put_one(key, content_type, payload, may))

    async def _put_one(self, key: str, content_type: str, payload: str, may: Precondition) -> DataEntry:
        async with self._writing:
            held, delivery = self._entries.get(key), self._delivery
            _check(held, may)
            unsent = sum(operation.op == "delete" for operation in delivery.pending.values())
            if held is None and (len(self._entries) >= MAX_ENTRIES or unsent >= MAX_UNSENT_DELETES):
                raise TooManyReports
            version = delivery.next_version(key)
            entry = DataEntry(key, content_type, payload, version, format_time(self._now()))
            await self._put(entry)
            return entry

    async def delete(self, key: str, may: Precondition) -> None:
        """Durably. Raises VersionConflict, NoSuchReport, and OSError when the disk refuses."""
        await _through(self._delete_one(key, may))

    async def _delete_one(self, key: str, may: Precondition) -> None:
        async with self._writing:
            held, delivery = self._entries.get(key), self._delivery
            _check(held, may)
            if held is None:
                raise NoSuchReport
            pending = {**delivery.pending, key: Operation("delete", held.version)}
            changed = replace(delivery, pending=pending, parked=_without(delivery.parked, [key]))
            await asyncio.to_thread(self._store.delete, key, changed)
            self._entries = {k: entry for k, entry in self._entries.items() if k != key}
            self._take(changed)

    # what becomes of it at the control plane

    async def sent(self, operations: Mapping[str, Operation]) -> None:
        """The control plane has them. What was written over meanwhile stays due."""
        await _through(self._sent(operations))

    async def _sent(self, operations: Mapping[str, Operation]) -> None:
        async with self._writing:
            delivery = self._delivery
            done = [key for key, operation in operations.items() if delivery.pending.get(key) == operation]
            await self._save(_forgetful(replace(delivery, pending=_without(delivery.pending, done)), self._entries))

    async def park(self, key: str, operation: Operation) -> None:
        """The control plane will never take this one."""
        await _through(self._park(key, operation))

    async def _park(self, key: str, operation: Operation) -> None:
        async with self._writing:
            delivery = self._delivery
            if delivery.pending.get(key) == operation:
                pending = _without(delivery.pending, [key])
                await self._save(replace(delivery, pending=pending, parked={**delivery.parked, key: operation}))

    async def raise_version(self, key: str, operation: Operation, version: int) -> None:
        """Give an entry that is still the one sent a version the control plane may take. Raises OSError."""
        await _through(self._raise_version(key, operation, version))

    async def _raise_version(self, key: str, operation: Operation, version: int) -> None:
        async with self._writing:
            held = self._entries.get(key)
            if held is not None and self._delivery.pending.get(key) == operation:
                await self._put(held._replace(version=max(version, self._delivery.next_version(key))))

    async def _put(self, entry: DataEntry) -> None:
        delivery = self._delivery
        changed = replace(
            delivery,
            pending={**delivery.pending, entry.key: Operation("put", entry.version)},
            parked=_without(delivery.parked, [entry.key]),
            high_water={**delivery.high_water, entry.key: entry.version},
        )
        await asyncio.to_thread(self._store.put, entry, changed)
        self._entries = {**self._entries, entry.key: entry}
        self._take(changed)

    async def _save(self, delivery: Delivery) -> None:
        """A disk that refuses keeps nothing from being true: after a restart it is sent once more."""
        try:
            await asyncio.to_thread(self._store.save, delivery)
        except OSError as exc:
            log.error("delivery of reports not noted", error=str(exc), next_step="they are sent again after a restart")
        self._take(delivery)

    def _take(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._note()
        for listener in self.on_change:
            listener()

    def _note(self) -> None:
        if self._delivery.pending:
            self.unsent.set()
        else:
            self.unsent.clear()


async def _through(work: Coroutine[Any, Any, T]) -> T:
    """A write goes on to its end when whoever asked for it leaves: memory must not fall behind the disk."""
    return await asyncio.shield(asyncio.ensure_future(work))


def _check(held: DataEntry | None, may: Precondition) -> None:
    version = held.version if held is not None else 0
    if not may(version):
        raise VersionConflict(version)


def _without(operations: Mapping[str, Operation], keys: Sequence[str]) -> Mapping[str, Operation]:
    return {key: operation for key, operation in operations.items() if key not in keys}


def _forgetful(delivery: Delivery, entries: Iterable[str]) -> Delivery:
    """Without the versions of keys that were deleted long ago: programs that make up keys must not fill the memory."""
    kept = {*entries, *delivery.pending, *delivery.parked}
    deleted = [key for key in delivery.high_water if key not in kept]
    if len(deleted) <= REMEMBERED_DELETES:
        return delivery
    forgotten = set(deleted[: len(deleted) // 2])
    floor = max(delivery.floor, *(delivery.high_water[key] for key in forgotten))
    high_water = {key: version for key, version in delivery.high_water.items() if key not in forgotten}
    return replace(delivery, high_water=high_water, floor=floor)
