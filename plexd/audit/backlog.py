"""Which records of auditd's log come after the last event that is known (docs/contract/telemetry.md §5.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from plexd.audit.records import EventId, Malformed, Record, parse_line


def holds(lines: Iterable[bytes], event: EventId) -> bool:
    """Whether a record of that event is among them."""
    stamp = f"audit({event}):".encode()
    return any(stamp in line for line in lines)


class Backlog:
    """Told the lines of the log, oldest first, it gives the records of events after `last`.

    With `is_complete` the event is known to be among them, and what follows is told by its place; without, by its time.
    An event that began before `last` is an old one, although its last records may come after it.
    """

    def __init__(self, last: EventId, *, is_complete: bool) -> None:
        self.malformed = 0
        self._last = last
        self._is_complete = is_complete
        self._is_past = False
        self._older: set[EventId] = set()

    def records(self, lines: Iterable[bytes]) -> Iterator[Record]:
        for line in lines:
            try:
                record = parse_line(line.decode("utf-8", "replace"))
            except Malformed:
                self.malformed += self._is_past or not self._is_complete
                continue
            if record is not None and self._is_new(record.event):
                yield record

    def _is_new(self, event: EventId) -> bool:
        if not self._is_complete:
            return event > self._last
        if self._is_past:
            return event not in self._older
        self._older.add(event)
        self._is_past = event == self._last
        return False
