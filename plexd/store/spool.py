"""A queue of JSON lines on disk, for what can't be read again at its source (docs/contract/telemetry.md §2.8).

Segments `<8 digits>.jsonl`, appended to in groups with one fsync each, read in order, deleted once nobody needs them.
Everything here blocks; one caller at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plexd.store.files import DIRECTORY_MODE, FILE_MODE, sync_directory

SEGMENT_BYTES = 4 << 20
READ_BYTES = 256 << 10


class SpoolPosition(NamedTuple):
    """A place between two lines."""

    segment: int
    offset: int


class Opened(NamedTuple):
    """`torn` lines were cut off, a crash left them unfinished. `is_gap`: segments are missing behind the position."""

    torn: int
    is_gap: bool


class Line(NamedTuple):
    body: bytes
    end: SpoolPosition


class Spool:
    """`unread` is the number of lines not yet given out, `bytes` the size of all segments; both known once open."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.unread = 0
        self.bytes = 0
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 4)
        self._sizes: dict[int, int] = {}  # of the segments there are, oldest first; the last is written to
        self._read = SpoolPosition(0, 0)
        self._file: int | None = None

    def open(self, position: SpoolPosition | None) -> Opened:
        """Begin to read at `position`, with None at the oldest line. Raises OSError."""
        self._directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        self._sizes = {
            int(path.stem): path.stat().st_size
            for path in sorted(self._directory.glob("*.jsonl"))
            if path.stem.isdecimal()
        }
        torn = sum(self._cut_torn_line(segment) for segment in self._sizes)
        self.bytes = sum(self._sizes.values())
        oldest = min(self._sizes, default=position.segment if position is not None else 1)
        is_gap = position is not None and position.segment < oldest
        self._read = position if position is not None and not is_gap else SpoolPosition(oldest, 0)
        # what is gone is not waited for: lines to come would be taken for read
        size = self._sizes.get(self._read.segment, 0)
        self._read = self._read._replace(offset=min(self._read.offset, size))
        self.unread = sum(self._count_lines(segment) for segment in self._sizes if segment >= self._read.segment)
        return Opened(torn, is_gap)

    def append(self, bodies: Sequence[bytes]) -> int:
        """Write them and make them last; the number of unread lines that were deleted to make room.

        OSError leaves nothing of them.
        """
        data = b"".join(body + b"\n" for body in bodies)
        segment = max(self._sizes, default=self._read.segment)
        if self._file is None or self._sizes.get(segment, 0) >= self._segment_bytes:
            if self._sizes.get(segment, 0) >= self._segment_bytes:
                segment += 1
            self._begin(segment)
        assert self._file is not None  # noqa: S101 - just begun
        size = self._sizes[segment]
        try:
            _write_all(self._file, data, size)
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise
        self._sizes[segment] = size + len(data)
        self.bytes += len(data)
        self.unread += len(bodies)
        return self._make_room()

    def read(self) -> list[Line]:
        """The next lines in order, a chunk of them; none when everything was given out. Raises OSError."""
        while True:
            segment, offset = self._read
            size = self._sizes.get(segment, 0)
            if offset < size:
                break
            following = [number for number in self._sizes if number > segment]
            if not following:
                return []
            self._read = SpoolPosition(min(following), 0)
        lines, self._read = self._chunk(self._read, size)
        self.unread -= len(lines)
        return lines

    def normalise(self, position: SpoolPosition) -> SpoolPosition:
        """The same place; behind a finished segment it is named as the beginning of the next one."""
        if position.offset >= self._sizes.get(position.segment, 0) and position.segment < max(self._sizes, default=0):
            return SpoolPosition(position.segment + 1, 0)
        return position

    def trim(self, position: SpoolPosition) -> None:
        """Delete the segments before a position that is safely on disk. Raises OSError."""
        for segment in [number for number in self._sizes if number < position.segment]:
            self._delete(segment)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _path(self, segment: int) -> Path:
        return self._directory / f"{segment:08d}.jsonl"

    def _begin(self, segment: int) -> None:
        self.close()
        file = os.open(self._path(segment), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            sync_directory(self._directory)
        except OSError:
            os.close(file)
            raise
        self._file = file
        self._sizes.setdefault(segment, 0)

    def _make_room(self) -> int:
        lost = 0
        while self.bytes > self._max_bytes and len(self._sizes) > 1:
            oldest = min(self._sizes)
            if oldest >= self._read.segment:
                unread = self._count_lines(oldest)
                lost += unread
                self.unread -= unread
                self._read = SpoolPosition(oldest + 1, 0)
            self._delete(oldest)
        return lost

    def _delete(self, segment: int) -> None:
        self._path(segment).unlink(missing_ok=True)
        self.bytes -= self._sizes.pop(segment)

    def _chunk(self, start: SpoolPosition, size: int) -> tuple[list[Line], SpoolPosition]:
        with self._path(start.segment).open("rb") as file:
            file.seek(start.offset)
            data = file.read(min(READ_BYTES, size - start.offset))
            while b"\n" not in data and start.offset + len(data) < size:
                data += file.read(min(READ_BYTES, size - start.offset - len(data)))
        lines, offset = [], start.offset
        for body in data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]:
            offset += len(body) + 1
            lines.append(Line(body, SpoolPosition(start.segment, offset)))
        return lines, SpoolPosition(start.segment, offset if lines else size)

    def _count_lines(self, segment: int) -> int:
        """Of those not yet read."""
        with self._path(segment).open("rb") as file:
            if segment == self._read.segment:
                file.seek(self._read.offset)
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(READ_BYTES), b""))

    def _cut_torn_line(self, segment: int) -> int:
        path, size = self._path(segment), self._sizes[segment]
        with path.open("r+b") as file:
            end = size
            while end > 0:
                start = max(0, end - READ_BYTES)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end == size:
                return 0
            file.truncate(end)
        self._sizes[segment] = end
        return 1


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
