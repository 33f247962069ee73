"""Entries that can't be read again where they came from, kept on disk until they are delivered.

Whoever makes an entry waits until it is on disk, or leaves it to the next group. While the disk refuses, entries stay
in memory, the oldest giving way, and go on from there (docs/contract/telemetry.md §2.7 and §2.8).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from plexd.log import get_logger
from plexd.runtime.waiting import set_within, to_its_end
from plexd.store.cursors import Cursors
from plexd.store.spool import Line, Spool, SpoolPosition
from plexd.telemetry.counters import Dropped
from plexd.telemetry.gaps import Reason
from plexd.telemetry.pipeline import Pipeline, SourceQueue

log = get_logger("telemetry")

GROUP_ENTRIES = 1000
RETRY_SECONDS = 5.0  # between two tries of a disk that refused


class Spooled:
    """A source, and a row of the status, called `name`. `add` works as soon as there is an event loop.

    What is held in memory while the disk refuses has the bounds of the pipeline's window.
    """

    def __init__(self, name: str, pipeline: Pipeline, spool: Spool, cursors: Cursors, section: str) -> None:
        self.name = name
        self._pipeline = pipeline
        self._spool = spool
        self._cursors = cursors
        self._disk = asyncio.Lock()  # the spool has one user at a time
        self._is_open = False
        self._is_gap = False
        self._pending: deque[bytes] = deque()  # not on disk, oldest first
        self._pending_bytes = 0
        self._being_written = 0  # the first ones of them
        self._added = self._tried = 0  # how many ever came; how many of them the disk took or refused
        self._in_hand: deque[Line] = deque()  # read, not yet in the window
        self._lost = 0  # pushed out, not yet marked
        self._problem = ""
        self._changed = asyncio.Event()  # for the reader
        self._progress = asyncio.Event()  # for those who wait for the disk
        self._handed = asyncio.Event()  # for those who wait for the reader
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_writing = False
        self._feed: SourceQueue[SpoolPosition | None] = pipeline.feed(name, self._settled, precounted=True)
        self._delivered = _position(cursors.register(section, self._stored, self._saved))
        self._feed.row.position = lambda: "" if self._delivered is None else "{}:{}".format(*self._delivered)
        pipeline.spooled = lambda: (spool.unread + len(self._in_hand) + len(self._pending), spool.bytes)

    # whoever has entries

    def add_nowait(self, body: bytes) -> None:
        """It is on disk within a second, unless the process dies before."""
        self._pipeline.counters.collected += 1
        self._added += 1
        self._pending.append(body)
        self._pending_bytes += len(body)
        self._push_out()
        if not self._is_writing:
            self._is_writing = True
            self._start(self._write())

    async def add(self, body: bytes) -> None:
        """Returns when it is on disk, or the disk has refused it; then it is in memory only."""
        self.add_nowait(body)
        await self.flush()

    async def flush(self) -> bool:
        """Until everything added so far is on disk, or the disk has refused it; whether it is there."""
        wanted = self._added
        while self._tried < wanted:
            self._progress.clear()
            await self._progress.wait()
        return not self._problem

    async def retire(self) -> None:
        """After `collect` has ended for good. What is on disk now counts as not collected so far: whoever opens the
        spool next will count it."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._spool.close()
        self._pipeline.counters.collected -= self._spool.unread + len(self._in_hand)

    def succeed(self, retired: Spooled) -> None:
        """Take over what the disk has refused so far."""
        self._lost += retired._lost
        self._pipeline.counters.collected -= len(retired._pending)
        for body in retired._pending:
            self.add_nowait(body)

    async def read_out(self, seconds: float) -> bool:
        """Until all of it is in the window, at most that long; whether it is. `collect` has to run."""
        try:
            async with asyncio.timeout(seconds):
                while self._spool.unread or self._in_hand or self._pending:
                    self._handed.clear()
                    await self._handed.wait()
        except TimeoutError:
            return False
        return True

    def _push_out(self) -> None:
        limits = self._pipeline.window.limits
        while len(self._pending) > self._being_written + 1 and (
            len(self._pending) > limits.entries or self._pending_bytes > limits.bytes
        ):
            self._pending_bytes -= len(self._pending[self._being_written])
            del self._pending[self._being_written]
            self._count_lost(1)

    def _count_lost(self, count: int) -> None:
        self._lost += count
        self._pipeline.counters.dropped[Dropped.OVERFLOW] += count

    async def _write(self) -> None:
        """Until nothing is pending or the disk refuses; then `collect` tries again from time to time."""
        try:
            while self._pending:
                async with self._disk:
                    group = [self._pending[index] for index in range(min(GROUP_ENTRIES, len(self._pending)))]
                    self._being_written = len(group)
                    try:
                        await self._open()
                        lost = await asyncio.to_thread(self._spool.append, group)
                    finally:
                        self._being_written = 0
                    for body in group:
                        self._pending.popleft()
                        self._pending_bytes -= len(body)
                if lost:
                    self._count_lost(lost)
                self._tried = self._added - len(self._pending)
                self._recovered()
                self._tell()
        except OSError as exc:
            self._failed(exc)
            self._tried = self._added
            self._tell()
        finally:
            self._is_writing = False

    def _tell(self) -> None:
        self._progress.set()
        self._changed.set()

    async def _open(self) -> None:
        """With the disk held. Raises OSError."""
        if self._is_open:
            return
        opened = await asyncio.to_thread(self._spool.open, self._delivered)
        self._is_open = True
        self._is_gap = opened.is_gap
        self._pipeline.counters.collected += self._spool.unread + opened.torn
        self._pipeline.counters.dropped[Dropped.MALFORMED] += opened.torn

    def _failed(self, exc: OSError) -> None:
        if not self._problem:
            log.error(
                "spool degraded, entries stay in memory",
                pipeline=self._pipeline.name,
                error=str(exc),
                next_step="make room in the data directory, or make it writable",
            )
        self._problem = exc.strerror or str(exc)
        self._feed.row.detail = f"spool: degraded ({self._problem})"

    def _recovered(self) -> None:
        if self._problem:
            log.info("spool works again", pipeline=self._pipeline.name)
            self._problem = self._feed.row.detail = ""

    # the source

    async def collect(self) -> None:
        while True:
            self._changed.clear()
            await self._read()
            if self._is_gap:
                self._is_gap = False
                await self._feed.gap(Reason.OVERFLOW, None, None)
            if self._lost:
                lost, self._lost = self._lost, 0
                await self._feed.gap(Reason.OVERFLOW, lost, None)
            if self._in_hand:
                await self._hand_over()
            elif self._problem and self._pending:
                await self._hand_over_from_memory()
            elif self._problem:
                await self._wait_and_try()
            else:
                await self._changed.wait()

    async def _read(self) -> None:
        if self._in_hand:
            return
        async with self._disk:
            try:
                await to_its_end(self._read_lines())  # else a cancellation would lose what was just read
            except OSError as exc:
                self._failed(exc)

    async def _read_lines(self) -> None:
        await self._open()
        self._in_hand.extend(await asyncio.to_thread(self._spool.read))

    async def _hand_over(self) -> None:
        while self._in_hand:
            line = self._in_hand[0]
            if self._feed.offer(line.body, line.end):
                self._in_hand.popleft()
                self._handed.set()
            else:
                await self._feed.room(len(line.body))

    async def _hand_over_from_memory(self) -> None:
        """The disk holds nothing older."""
        async with self._disk:
            while self._pending and self._feed.offer(self._pending[0], None):
                self._pending_bytes -= len(self._pending.popleft())
            size = len(self._pending[0]) if self._pending else 0
        if size:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._feed.room(size)
        await self._wait_and_try()

    async def _wait_and_try(self) -> None:
        await set_within(self._changed, RETRY_SECONDS)
        if not self._is_writing and self._pending:
            self._is_writing = True
            self._start(self._write())

    # positions

    def _settled(self, position: SpoolPosition | None) -> None:
        if position is not None:
            self._delivered = position
            self._cursors.touch()

    def _stored(self) -> Any:
        if self._delivered is None:
            return None
        return self._spool.normalise(self._delivered)._asdict()

    def _saved(self, value: Any) -> None:
        position = _position(value)
        if position is not None:
            self._start(self._trim(position))

    async def _trim(self, position: SpoolPosition) -> None:
        async with self._disk:
            try:
                await asyncio.to_thread(self._spool.trim, position)
            except OSError as exc:
                log.error("delivered part of the spool not deleted", pipeline=self._pipeline.name, error=str(exc))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work, name=f"{self.name} spool")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _position(value: Any) -> SpoolPosition | None:
    try:
        return SpoolPosition(int(value["segment"]), int(value["offset"]))
    except (TypeError, KeyError, ValueError):
        return None
