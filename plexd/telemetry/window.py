"""What a pipeline holds in memory, bounded by entries and by bytes, and when a batch of it is due. Pure.

An entry takes its room until it is settled: acknowledged, or dropped and counted. What is in flight can no longer be
pushed out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

ARRAY_BYTES = 2  # the brackets
COMMA_BYTES = 1


class Origin(Protocol):
    """Where an entry came from; told what became of it."""

    @property
    def name(self) -> str: ...

    def settle(self, position: Any) -> None: ...


class Entry:
    """`body` is the JSON that travels; once it is settled, so is everything of its origin up to `position`.

    `entered` is when it came into the window, in monotonic seconds.
    """

    __slots__ = ("body", "entered", "origin", "position")

    def __init__(self, body: bytes, origin: Origin, position: Any, entered: float) -> None:
        self.body = body
        self.origin = origin
        self.position = position
        self.entered = entered


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a batch and of the whole window; sizes are of uncompressed JSON."""

    batch_entries: int
    batch_bytes: int
    batch_seconds: float
    entries: int
    bytes: int


def batch_size(entries: list[Entry]) -> int:
    """Bytes of the JSON array."""
    return ARRAY_BYTES + sum(len(entry.body) + COMMA_BYTES for entry in entries)


class Window:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.count = 0  # with those in flight
        self.bytes = 0
        self._waiting: deque[Entry] = deque()
        self._waiting_bytes = ARRAY_BYTES
        self._in_flight: list[Entry] = []

    def fits(self, size: int) -> bool:
        """Whether one more entry of `size` bytes may come in. An empty window takes any."""
        limits = self.limits
        return self.count < limits.entries and (self.bytes + size <= limits.bytes or not self.count)

    def add(self, entry: Entry) -> None:
        size = len(entry.body)
        self._waiting.append(entry)
        self._waiting_bytes += size + COMMA_BYTES
        self.count += 1
        self.bytes += size

    def make_room(self, size: int) -> list[Entry]:
        """Push out the oldest that are not in flight until `size` more bytes fit; those that had to go."""
        gone = []
        while self._waiting and not self.fits(size):
            gone.append(self._take())
            self._forget(gone[-1])
        return gone

    def clear(self) -> list[Entry]:
        """Empty it of everything that is not in flight."""
        gone = []
        while self._waiting:
            gone.append(self._take())
            self._forget(gone[-1])
        return gone

    @property
    def holds_a_batch(self) -> bool:
        return len(self._waiting) >= self.limits.batch_entries or self._waiting_bytes >= self.limits.batch_bytes

    def due_at(self) -> float | None:
        """When the next batch is to be cut, in monotonic seconds; None while nothing waits."""
        if not self._waiting:
            return None
        return float("-inf") if self.holds_a_batch else self._waiting[0].entered + self.limits.batch_seconds

    def oldest(self) -> float | None:
        """When the oldest unsettled entry came in."""
        if self._in_flight:
            return self._in_flight[0].entered
        return self._waiting[0].entered if self._waiting else None

    def cut(self, byte_limit: int) -> list[Entry]:
        """The next batch, oldest first, of at most `byte_limit` bytes; a single entry may have more."""
        batch: list[Entry] = []
        size = ARRAY_BYTES
        limit = min(self.limits.batch_bytes, byte_limit)
        while self._waiting and len(batch) < self.limits.batch_entries:
            size += len(self._waiting[0].body) + COMMA_BYTES
            if batch and size > limit:
                break
            batch.append(self._take())
        self._in_flight += batch
        return batch

    def settle(self, entries: list[Entry]) -> None:
        """Give back the room of entries that were in flight; they are the oldest."""
        for entry in entries:
            self._forget(entry)
        del self._in_flight[: len(entries)]

    def shorten(self, entry: Entry, body: bytes) -> None:
        """An entry in flight gets a smaller body."""
        self.bytes -= len(entry.body) - len(body)
        entry.body = body

    def _take(self) -> Entry:
        entry = self._waiting.popleft()
        self._waiting_bytes -= len(entry.body) + COMMA_BYTES
        return entry

    def _forget(self, entry: Entry) -> None:
        self.count -= 1
        self.bytes -= len(entry.body)
