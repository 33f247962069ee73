"""What one node's event stream has carried, so that several connections can follow it and a lost one can replay."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

KEPT = 1000  # chunks a node can fall behind before it has to pull its state instead


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes as they go on the stream. Only those with an id are replayed; `ends` closes the connection instead."""

    data: bytes
    event_id: str | None = None
    ends: bool = False


class EventLog:
    """Positions count every chunk ever appended; a reader holds the position it has read to."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque(maxlen=KEPT)
        self._end = 0

    @property
    def end(self) -> int:
        return self._end

    def append(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._end += 1

    def since(self, position: int) -> Sequence[Chunk]:
        """The chunks from `position` on, as far as they are still kept."""
        first = self._end - len(self._chunks)
        return list(self._chunks)[max(0, position - first) :]

    def replay(self, last_event_id: str) -> Sequence[Chunk]:
        """The events after the one named; none when it is unknown, since a pull then says more than a guess."""
        chunks = list(self._chunks)
        for index, chunk in enumerate(chunks):
            if chunk.event_id == last_event_id:
                return [later for later in chunks[index + 1 :] if later.event_id is not None]
        return []


def sse(event_type: str, event_id: str, data: bytes) -> bytes:
    """One event in stream form. `data` is one line: the envelope without insignificant white space."""
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (event_id.encode(), event_type.encode(), data)
