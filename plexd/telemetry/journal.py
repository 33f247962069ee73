"""The journal as a source of logs: nothing of an earlier boot is lost, and what was vacuumed away is counted.

Entries carry a sequence number within a journal, so a jump in it tells how many are missing (docs/contract/telemetry.md
§4.4).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plexd.linux import journalctl
from plexd.log import get_logger
from plexd.store.cursors import Cursors
from plexd.telemetry.counters import Dropped
from plexd.telemetry.gaps import Reason
from plexd.telemetry.lines import Lines
from plexd.telemetry.pipeline import Pipeline, SourceQueue, SourceState
from plexd.telemetry.records import LogEncoder
from plexd.telemetry.severity import INFO, NAMES, Filter

log = get_logger("telemetry")

NAME = "journald"
LINE_BYTES = 1 << 20
_CURSOR = re.compile(r"s=([0-9a-f]+);i=([0-9a-f]+);b=([0-9a-f]+);[0-9a-z=;]+", re.ASCII)
_PRIORITIES = {str(number): number for number in range(len(NAMES))}


class JournalPosition(NamedTuple):
    """An entry. Before the first one `cursor` is empty, and the time is where to begin."""

    cursor: str
    realtime_usec: int


class SequenceNumber(NamedTuple):
    """Where an entry stands: in which journal and boot, and the how manieth it is there."""

    journal: str
    boot: str
    number: int


# parsing


def parse_place(cursor: str) -> SequenceNumber | None:
    match = _CURSOR.fullmatch(cursor)
    return SequenceNumber(match[1], match[3], int(match[2], 16)) if match is not None else None


def message_text(value: Any) -> str | None:
    """The text of a field in any of the forms that journalctl gives it; None where there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(type(byte) is int for byte in value):
            return bytes(byte & 255 for byte in value).decode("utf-8", "replace")
        parts = [message_text(part) for part in value]  # a field that was given several times
        return "\n".join(part for part in parts if part is not None)
    return None


def priority_of(value: Any) -> int:
    if isinstance(value, list) and value:
        value = value[0]
    return _PRIORITIES.get(value, INFO) if isinstance(value, str) else INFO


def unit_of(record: Mapping[str, Any]) -> str:
    unit = record.get("_SYSTEMD_UNIT") or record.get("UNIT") or ""
    return unit if isinstance(unit, str) else message_text(unit) or ""


class Continuity:
    """Follows the sequence numbers of each journal within a boot."""

    def __init__(self, last: SequenceNumber | None) -> None:
        self._last: dict[tuple[str, str], int] = {}
        self._skipped = 0
        if last is not None:
            self._last[last.journal, last.boot] = last.number

    def missing_before(self, place: SequenceNumber) -> int:
        """How many entries are missing between this one and the last one seen."""
        key = place.journal, place.boot
        last = self._last.get(key)
        if last is None and len(self._last) >= 64:
            self._last.pop(next(iter(self._last)))
        self._last[key] = max(place.number, last or 0)
        if last is None:
            return 0
        known, self._skipped = self._skipped, 0
        return max(0, place.number - last - 1 - known)

    def skip(self) -> None:
        """An entry came by whose place could not be read."""
        self._skipped += 1


# the source


class Journal:
    """`lookback` is in seconds: so much is read at the very first start. `sees_all`: this process may read every
    entry, so that a missing one is a loss. `is_wanted` tells for the transport of an entry whether it is one for here.
    """

    name = NAME

    def __init__(
        self,
        pipeline: Pipeline,
        cursors: Cursors,
        form: LogEncoder,
        wanted: Filter,
        *,
        lookback: float,
        directory: Path | None,
        sees_all: bool,
        is_wanted: Callable[[Any], bool],
    ) -> None:
        self._pipeline = pipeline
        self._cursors = cursors
        self._form = form
        self._wanted = wanted
        self._lookback = lookback
        self._directory = directory
        self._sees_all = sees_all
        self._is_wanted = is_wanted
        self._feed: SourceQueue[JournalPosition] = pipeline.feed(NAME, self._settled)
        self._committed = _position(cursors.register(NAME, self._stored))
        self._read: JournalPosition | None = self._committed  # the last one that came into the window
        self._feed.row.position = lambda: self._committed.cursor if self._committed is not None else ""

    def _settled(self, position: JournalPosition) -> None:
        self._committed = position
        self._cursors.touch()

    def _stored(self) -> Any:
        return self._committed._asdict() if self._committed is not None else None

    async def collect(self) -> None:
        if not journalctl.is_installed():
            log.info("journal not read", reason=f"there is no {journalctl.PROGRAM}")
            self._feed.row.state = SourceState.UNAVAILABLE
            self._feed.row.detail = f"there is no {journalctl.PROGRAM}"
            return
        if self._read is None:
            # on disk before anything is read: else a kill would move the beginning on, and lose what lies between
            self._read = JournalPosition("", int((self._pipeline.now() - self._lookback) * 1_000_000))
            if self._committed is None:
                self._committed = self._read
                await self._cursors.save()
            if self._cursors.was_corrupt:
                await self._feed.gap(Reason.CORRUPT_STATE, None, self._read)
        start, last = await self._go_on(self._read)
        self._feed.row.state, self._feed.row.detail = SourceState.READING, ""
        async with journalctl.follow(
            cursor=start.cursor, since_usec=start.realtime_usec, directory=self._directory
        ) as chunks:
            lines = Lines(LINE_BYTES)
            continuity = Continuity(last)
            async for chunk in chunks:
                for line, length in lines.feed(chunk):
                    await self._take(line, length, start.cursor, continuity)

    async def _go_on(self, read: JournalPosition) -> tuple[JournalPosition, SequenceNumber | None]:
        """Where to begin after what was read, and the place before the first entry to come, where that is known.

        Where the entry is gone, the numbers of its journal tell how many went with it; else only the time is left.
        """
        last = parse_place(read.cursor)
        found = await self._find(read.cursor) if last is not None else None
        if last is not None and found == last:
            return read, last
        if last is not None and found is not None and self._sees_all and _is_later(found, last):
            await self._feed.gap(Reason.CURSOR_LOST, found.number - last.number - 1, read)
            return read, found._replace(number=found.number - 1)
        now = self._pipeline.now()
        usec = read.realtime_usec
        if usec > now * 1e6:  # of a clock that was set back since: it would hide entries until then
            usec = int((now - self._lookback) * 1e6)
        elif not read.cursor:
            return read, None  # nothing was read yet: it begins there
        position = JournalPosition("", usec)
        await self._feed.gap(Reason.CURSOR_LOST, None, position)
        return position, None

    async def _find(self, cursor: str) -> SequenceNumber | None:
        """Of the entry, or of the one that comes next if it is gone."""
        try:
            first = json.loads(await journalctl.first_line(cursor, self._directory) or b"{}")
            return parse_place(first.get("__CURSOR", ""))
        except (ValueError, TypeError, AttributeError):
            return None

    async def _take(self, line: bytes, length: int, start: str, continuity: Continuity) -> None:
        if length > LINE_BYTES:
            self._feed.lose(Dropped.OVERSIZE)
            continuity.skip()  # its number is in the part that was not kept
            return
        try:
            record = json.loads(line)
            cursor, realtime = record["__CURSOR"], int(record["__REALTIME_TIMESTAMP"])
        except (ValueError, KeyError, TypeError, RecursionError):
            self._feed.lose(Dropped.MALFORMED)
            return
        if cursor == start:
            return  # it was delivered, or is in the window
        position = JournalPosition(cursor, realtime)
        place = parse_place(cursor) if self._sees_all else None
        if place is not None and (missing := continuity.missing_before(place)):
            since = self._read.realtime_usec / 1e6 if self._read is not None else None
            before = self._read or position
            await self._feed.gap(Reason.ROTATED_AWAY, missing, before, since=since, until=realtime / 1e6)
        priority, unit = priority_of(record.get("PRIORITY")), unit_of(record)
        if not self._is_wanted(record.get("_TRANSPORT")) or not self._wanted.wants_unit(unit, priority):
            self._feed.skip_filtered(position)
            self._read = position
            return
        message = message_text(record.get("MESSAGE"))
        if message is None or not message.strip("\0 \t\r\n\v\f"):
            self._feed.skip_empty(position)
            self._read = position
            return
        body, cut = self._form.write(realtime, unit, message, NAMES[priority])
        while not self._feed.offer(body, position):
            await self._feed.room(len(body))
        self._read = position
        if cut:
            self._feed.note_truncated()


def _is_later(place: SequenceNumber, other: SequenceNumber) -> bool:
    return (place.journal, place.boot) == (other.journal, other.boot) and place.number > other.number


def _position(value: Any) -> JournalPosition | None:
    try:
        return JournalPosition(str(value["cursor"]), int(value["realtime_usec"]))
    except (TypeError, KeyError, ValueError):
        return None
