"""Records become events (docs/contract/telemetry.md §5.3). Time is an argument, in seconds of any clock that is never
set.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from plexd.audit.records import EventId, Record
from plexd.audit.types import EOE, stands_alone

WAIT_SECONDS = 2.0  # for the end of an event, from its first record on
MAX_OPEN_EVENTS = 1024
MAX_OPEN_BYTES = 8 << 20  # of payload: one call of execve alone may bring 4 MiB


class Event(NamedTuple):
    """`place` is where its first record was, if `add` was told."""

    id: EventId
    records: tuple[Record, ...]  # as they arrived, without EOE
    place: Any = None


@dataclass(slots=True)
class _Open:
    id: EventId
    records: list[Record]
    deadline: float
    is_complete: bool
    place: Any


class Assembler:
    """Events come out in the order in which their first records went in.

    So a complete event waits for the ones before it: their end or their deadline. When too much is open, the oldest
    comes out as it is.
    """

    def __init__(self) -> None:
        self._order: deque[_Open] = deque()
        self._by_id: dict[EventId, _Open] = {}
        self._bytes = 0

    @property
    def due(self) -> float | None:
        """When the next event comes out without another record; None when nothing is open."""
        return self._order[0].deadline if self._order else None

    @property
    def place(self) -> Any:
        """Of the event that comes out next; None when nothing is open."""
        return self._order[0].place if self._order else None

    def add(self, record: Record, now: float, place: Any = None) -> list[Event]:
        """`place` is kept with an event that begins with this record."""
        if stands_alone(record.type):
            self._append(record, now, place, is_complete=True)
        elif record.type == EOE:
            ended = self._by_id.get(record.event)
            if ended is None:  # it has come out already
                return []
            ended.is_complete = True
        elif (known := self._by_id.get(record.event)) is not None:
            known.records.append(record)
        else:
            self._by_id[record.event] = self._append(record, now, place, is_complete=False)
        if record.type != EOE:
            self._bytes += len(record.payload)
        return self.expire(now)

    def expire(self, now: float) -> list[Event]:
        """What is complete or has waited long enough."""
        out = []
        while self._order and (
            self._order[0].is_complete
            or self._order[0].deadline <= now
            or len(self._order) > MAX_OPEN_EVENTS
            or self._bytes > MAX_OPEN_BYTES
        ):
            out.append(self._take())
        return out

    def flush(self) -> list[Event]:
        """Everything, complete or not."""
        return [self._take() for _ in range(len(self._order))]

    def _append(self, record: Record, now: float, place: Any, *, is_complete: bool) -> _Open:
        opened = _Open(record.event, [record], now + WAIT_SECONDS, is_complete, place)
        self._order.append(opened)
        return opened

    def _take(self) -> Event:
        taken = self._order.popleft()
        if self._by_id.get(taken.id) is taken:
            del self._by_id[taken.id]
        self._bytes -= sum(len(record.payload) for record in taken.records)
        return Event(taken.id, tuple(taken.records), taken.place)
