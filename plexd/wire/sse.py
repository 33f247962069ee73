"""Server-sent events: bytes in, events out (docs/contract/events.md §2). No I/O, no clock.

A line ends with CR LF, LF or CR and nothing else; a chunk may end anywhere. What cannot be used comes out as an item
of its own, so that the reader can log it and the good events around it are not lost.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_DATA_BYTES = 4 * 1024 * 1024
MAX_LINE_BYTES = MAX_DATA_BYTES + 16  # the data of an event and its field name; more is counted, not kept
_MAX_RETRY_DIGITS = 9

_BOM = b"\xef\xbb\xbf"
_CR = 0x0D
_LF = 0x0A


class Event(NamedTuple):
    """`id` is the last one the stream has named, None if none yet, `""` if it was taken back. `type` is for logs."""

    id: str | None
    type: str
    data: str


class Malformed(NamedTuple):
    """An event that is not UTF-8."""

    type: str


class Oversized(NamedTuple):
    """An event with more than 4 MiB of data; `size` is how much of it came."""

    type: str
    size: int


class Retry(NamedTuple):
    """The base delay for reconnections, already clamped."""

    seconds: float


Item = Event | Malformed | Oversized | Retry


class Decoder:
    """One connection's worth of stream. What follows the last empty line when it ends counts for nothing."""

    def __init__(self) -> None:
        self._line = bytearray()  # the unfinished line; of one that is too long only the beginning
        self._line_size = 0
        self._first_line = True
        self._after_cr = False
        self._last_id: str | None = None
        self._clear()

    def _clear(self) -> None:
        self._type = ""
        self._data: list[bytes] = []
        self._size = -1  # of the data joined with line feeds; -1: no data line yet
        self._is_utf8 = True

    def feed(self, chunk: bytes) -> list[Item]:
        """Every item that is complete with `chunk`, in order."""
        items: list[Item] = []
        if not chunk:
            return items
        start = 1 if self._after_cr and chunk[0] == _LF else 0
        self._after_cr = chunk[-1] == _CR
        lines = (chunk[start:] if start else chunk).splitlines(keepends=True)
        # bytes, unlike text, are only ever split at CR and LF
        rest = lines.pop() if lines and lines[-1][-1] not in {_CR, _LF} else b""
        for line in lines:
            content = line.rstrip(b"\r\n")
            if self._line_size:
                self._extend(content)
                self._end_line(bytes(self._line), self._line_size, items)
                self._line.clear()
                self._line_size = 0
            else:
                self._end_line(content[:MAX_LINE_BYTES], len(content), items)
        self._extend(rest)
        return items

    def _extend(self, part: bytes) -> None:
        self._line += part[: max(0, MAX_LINE_BYTES - len(self._line))]
        self._line_size += len(part)

    def _end_line(self, line: bytes, size: int, items: list[Item]) -> None:
        if self._first_line:
            self._first_line = False
            if line.startswith(_BOM):
                line, size = line[len(_BOM) :], size - len(_BOM)
        if not line:
            self._dispatch(items)
            return
        name, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        match name:
            case b"data":
                # of a line that was cut, `value` lacks what `size` still counts
                self._add_data(value, len(value) + size - len(line))
            case _ if size != len(line):
                pass  # no id, type or delay has four million characters
            case b"event":
                self._type = self._text(value)
            case b"id" if b"\0" not in value:
                last_id = self._text(value)
                if self._is_utf8:
                    self._last_id = last_id
            case b"retry" if value.isdigit():
                digits = value.lstrip(b"0")[: _MAX_RETRY_DIGITS + 1] or b"0"
                items.append(Retry(min(max(int(digits), 100), 60_000) / 1000))

    def _add_data(self, value: bytes, size: int) -> None:
        self._size += size + 1
        if self._size > MAX_DATA_BYTES:
            self._data.clear()
        else:
            self._data.append(value)

    def _text(self, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            self._is_utf8 = False
            return ""

    def _dispatch(self, items: list[Item]) -> None:
        if self._size > MAX_DATA_BYTES:
            items.append(Oversized(self._type, self._size))
        elif self._size >= 0:
            data = self._text(b"\n".join(self._data))
            items.append(Event(self._last_id, self._type, data) if self._is_utf8 else Malformed(self._type))
        self._clear()
