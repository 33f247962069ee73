"""What the Linux kernel audits, from its stream, or from the log that auditd writes (docs/contract/telemetry.md §5.2
and §5.3).

The kernel does not repeat itself, so what the stream brought goes to the spool. What was missed while nobody listened
is read from auditd's log where there is one, else a marker shows the hole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from plexd.audit import linux
from plexd.audit.backlog import Backlog
from plexd.audit.grouping import Assembler, Event
from plexd.audit.records import EventId, Malformed, parse_datagram, parse_line
from plexd.errors import KernelError
from plexd.linux.audit import AuditStream, Overrun
from plexd.linux.audit_log import AuditLog
from plexd.linux.logfiles import FilePosition
from plexd.linux.tail import Hole, Item, Line, Oversized, Tail
from plexd.log import get_logger
from plexd.store.cursors import Cursors
from plexd.telemetry.audit_encoder import AuditEncoder
from plexd.telemetry.counters import Dropped
from plexd.telemetry.gaps import Gap, Reason
from plexd.telemetry.pipeline import Pipeline, SourceQueue, SourceState, SourceStatus
from plexd.telemetry.spooled import Spooled

log = get_logger("telemetry")

GROUP_SECONDS = 0.5  # events are written to the spool together
GROUP_ENTRIES = 250
MAX_LINE = 1 << 20
BURST = 64  # records in one go before others have their turn
OVERLAP_MILLISECONDS = 10_000  # records older than this before the stream was opened are not in it


class Events:
    """Writes events down as entries; `exclude_types` are left out of them."""

    def __init__(self, form: AuditEncoder, data_dir: Path, exclude_types: Collection[int]) -> None:
        self._form = form
        self._data_dir = str(data_dir)
        self._exclude_types = exclude_types

    def write(self, event: Event) -> tuple[bytes, bool] | Dropped | None:
        """The entry and whether its text was cut; why there is none, None if nobody wants it."""
        kept = linux.without(event, self._exclude_types)
        if kept is None:
            return None
        try:
            if linux.is_own(kept, os.getpid(), self._data_dir):
                return Dropped.SELF
            return self._form.write(linux.normalise(kept, self._form.hostname))
        except Exception:  # a mistake here must not keep the events behind this one
            log.exception("audit event not understood", event_id=str(event.id))
            return Dropped.MALFORMED


class KernelAudit:
    """Reads the kernel's stream into the spool. `written` is auditd's log, None if it is not to be read."""

    def __init__(
        self,
        pipeline: Pipeline,
        spooled: Spooled,
        cursors: Cursors,
        events: Events,
        written: Path | None,
    ) -> None:
        self._pipeline = pipeline
        self._spooled = spooled
        self._cursors = cursors
        self._events = events
        self._written = written
        self._row = pipeline.row(linux.SOURCE)
        self._row.position = lambda: "" if self._last is None else str(self._last)
        self._assembler = Assembler()
        self._last: EventId | None = None  # up to here everything is in the spool
        self._taken: EventId | None = None  # up to here it is on its way there
        self._group: list[bytes] = []
        self._group_since = 0.0
        self._read_before: set[tuple[int, str]] = set()  # in the log, and perhaps to come again
        with contextlib.suppress(TypeError, KeyError, Malformed):
            self._last = EventId.parse(cursors.register("auditd", self._stored)["last_event"])

    def _stored(self) -> Any:
        return None if self._last is None else {"last_event": str(self._last)}

    async def collect(self, stream: AuditStream) -> None:
        """Until cancelled, or OSError."""
        with stream:
            try:
                await self._catch_up()
                while True:
                    items: Sequence[bytes | Overrun] = ()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._patience()):
                            items = await stream.read()
                    for start in range(0, len(items), BURST):
                        self._hear(items[start : start + BURST])
                        await self._write_if(len(self._group) >= GROUP_ENTRIES)
                    now = self._pipeline.monotonic()
                    self._emit(self._assembler.expire(now))
                    await self._write_if(now >= self._group_since + GROUP_SECONDS)
            finally:
                self._emit(self._assembler.flush())
                self._hand_over()

    def _patience(self) -> float | None:
        """How long to wait for records before something else is due."""
        due = [moment for moment in (self._assembler.due,) if moment is not None]
        if self._group:
            due.append(self._group_since + GROUP_SECONDS)
        return max(0.0, min(due) - self._pipeline.monotonic()) if due else None

    def _hear(self, items: Iterable[bytes | Overrun]) -> None:
        now = self._pipeline.monotonic()
        for item in items:
            if isinstance(item, Overrun):
                self._pipeline.counters.kernel_lost += 1
                self._mark(Reason.KERNEL_OVERRUN)
                continue
            try:
                record = parse_datagram(item)
            except Malformed:
                self._lose(Dropped.MALFORMED)
                continue
            if record is None:
                continue
            if (record.type, record.payload) in self._read_before:
                self._read_before.discard((record.type, record.payload))
                continue
            self._emit(self._assembler.add(record, now))

    # what happened while nobody listened

    async def _catch_up(self) -> None:
        """Read it from auditd's log. What the stream brings meanwhile waits, and may be the same."""
        last = self._last
        if last is None:
            if self._cursors.was_corrupt:
                self._mark(Reason.CORRUPT_STATE)
            return
        try:
            if self._written is None:
                raise FileNotFoundError
            written = await asyncio.to_thread(AuditLog, self._written)
        except OSError:
            self._mark(Reason.AGENT_DOWN)
            return
        overlap_from = int(self._pipeline.now() * 1000) - OVERLAP_MILLISECONDS
        with contextlib.closing(written):
            is_complete = await asyncio.to_thread(written.holds, last)
            if not is_complete:
                self._mark(Reason.AGENT_DOWN)
            backlog = Backlog(last, is_complete=is_complete)
            chunks = written.chunks()
            while lines := await asyncio.to_thread(next, chunks, None):
                for start in range(0, len(lines), BURST):
                    now = self._pipeline.monotonic()
                    for record in backlog.records(lines[start : start + BURST]):
                        if record.event.milliseconds >= overlap_from:
                            self._read_before.add((record.type, record.payload))
                        self._emit(self._assembler.add(record, now))
                    await self._write_if(len(self._group) >= GROUP_ENTRIES)
            self._lose(Dropped.MALFORMED, backlog.malformed)

    # on the way to the spool

    def _emit(self, events: Iterable[Event]) -> None:
        for event in events:
            self._taken = event.id
            match self._events.write(event):
                case None:
                    self._pipeline.counters.collected += 1
                    self._pipeline.counters.filtered += 1
                case Dropped() as reason:
                    self._lose(reason)
                case (body, cut):
                    self._pipeline.counters.truncated += cut
                    self._add(body)
                    self._row.entries += 1
                    self._row.last_entry_at = self._pipeline.now()

    def _mark(self, reason: Reason) -> None:
        since = self._taken or self._last
        gap = Gap(linux.SOURCE, reason, None, since.milliseconds / 1000 if since else None, self._pipeline.now())
        if (marker := self._pipeline.mark(gap)) is not None:
            self._add(marker)

    def _lose(self, reason: Dropped, count: int = 1) -> None:
        self._pipeline.counters.collected += count
        self._pipeline.counters.dropped[reason] += count

    def _add(self, body: bytes) -> None:
        if not self._group:
            self._group_since = self._pipeline.monotonic()
        self._group.append(body)

    def _hand_over(self) -> None:
        for body in self._group:
            self._spooled.add_nowait(body)
        self._group.clear()

    async def _write_if(self, due: bool) -> None:
        """Others have their turn in any case."""
        if not due or not self._group:
            await asyncio.sleep(0)
            return
        taken = self._taken
        self._hand_over()
        if await self._spooled.flush() and taken is not None and taken != self._last:
            self._last = taken
            self._cursors.touch()


class LogAudit:
    """Reads the log that auditd writes, and keeps the place behind the last event whose fate is known."""

    def __init__(self, pipeline: Pipeline, cursors: Cursors, events: Events, path: Path, interval: float) -> None:
        self._pipeline = pipeline
        self._cursors = cursors
        self._events = events
        self._path = path
        self._interval = interval
        self._mark: FilePosition | None = None
        self._feed: SourceQueue[FilePosition] = pipeline.feed(linux.SOURCE, self._settled)
        stored = cursors.register("auditd_log", lambda: self._mark and self._mark._asdict())
        with contextlib.suppress(TypeError, KeyError, ValueError):
            self._mark = FilePosition.parse(stored)

    def obstacle(self) -> str | None:
        """Why the log cannot be read. Blocks."""
        try:
            self._path.open("rb").close()
        except OSError as exc:
            return f"cannot read {self._path}: {exc.strerror}"
        return None

    async def collect(self) -> None:
        """Until cancelled, or OSError."""
        self._feed.row.position = lambda: "" if self._mark is None else f"{self._mark.inode}:{self._mark.offset}"
        tail = Tail(self._path, self._mark, MAX_LINE, at_end=True)
        assembler = Assembler()
        place: FilePosition | None = None  # behind what was read last
        try:
            while True:
                items = await asyncio.to_thread(tail.read, self._pipeline.monotonic())
                if place is None:
                    if tail.began is None:
                        await asyncio.sleep(self._interval)
                        continue
                    place = tail.began
                    await self._begin(place)
                for number, item in enumerate(items):
                    await self._take(item, place, assembler)
                    place = item.mark
                    if number % BURST == BURST - 1:
                        await asyncio.sleep(0)
                now = self._pipeline.monotonic()
                await self._emit(assembler.expire(now), assembler, place)
                if not items:
                    due = assembler.due
                    await asyncio.sleep(self._interval if due is None else min(self._interval, due - now))
        finally:
            tail.close()  # what is open is read again

    async def _begin(self, place: FilePosition) -> None:
        if self._mark is None:
            self._settled(place)
            if self._cursors.was_corrupt:
                await self._feed.gap(Reason.CORRUPT_STATE, None, place)

    async def _take(self, item: Item, place: FilePosition, assembler: Assembler) -> None:
        now = self._pipeline.monotonic()
        match item:
            case Hole(reason, mark):
                await self._emit(assembler.flush(), assembler, place)
                await self._feed.gap(Reason(reason.value), None, mark)
            case Oversized():
                self._feed.lose(Dropped.OVERSIZE)
            case Line(text, mark):
                try:
                    record = parse_line(text.decode("utf-8", "replace"))
                except Malformed:
                    self._feed.lose(Dropped.MALFORMED)
                else:
                    if record is not None:
                        await self._emit(assembler.add(record, now, place), assembler, mark)

    async def _emit(self, events: Sequence[Event], assembler: Assembler, read_to: FilePosition) -> None:
        """The place behind an event is where the next one begins."""
        for event, following in zip_longest(events, events[1:]):
            place: FilePosition = following.place if following is not None else assembler.place or read_to
            match self._events.write(event):
                case None:
                    self._feed.skip_filtered(place)
                case Dropped() as reason:
                    self._feed.lose(reason, place)
                case (body, cut):
                    if cut:
                        self._feed.note_truncated()
                    await self._feed.put(body, place)

    def _settled(self, mark: FilePosition) -> None:
        self._mark = mark
        self._cursors.touch()


class LinuxAudit:
    """A source: the kernel's stream, the log of auditd, or nothing, by `method` and by what there is.

    With `auto` the log is read where the stream cannot be heard.
    """

    name = linux.SOURCE

    def __init__(
        self,
        row: SourceStatus,
        kernel: KernelAudit | None,
        written: LogAudit | None,
        open_stream: Callable[[], AuditStream] = AuditStream,
    ) -> None:
        self._row = row
        self._kernel = kernel
        self._written = written
        self._open_stream = open_stream

    async def collect(self) -> None:
        obstacles = []
        if self._kernel is not None:
            try:
                stream = self._open_stream()
            except KernelError as exc:
                obstacles.append(str(exc))
            else:
                self._row.state, self._row.detail = SourceState.READING, "netlink"
                await self._kernel.collect(stream)
        if self._written is not None:
            obstacle = await asyncio.to_thread(self._written.obstacle)
            if obstacle is None:
                self._row.state, self._row.detail = SourceState.READING, "file"
                await self._written.collect()
            else:
                obstacles.append(obstacle)
        self._row.state, self._row.detail = SourceState.UNAVAILABLE, "; ".join(obstacles)
        log.warning(
            "linux audit unavailable", reason=self._row.detail, next_step="see audit.auditd in the configuration"
        )
