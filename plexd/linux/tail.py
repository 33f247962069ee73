"""One growing file, followed through rotation by rename and by copy, across restarts (docs/contract/telemetry.md §4.5).

A place in it is told by inode and by a fingerprint of its beginning, so that a file is known again under another name,
and another file is known to be another one under the same name. Everything here blocks, for a moment.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from plexd.linux.logfiles import FileId, FilePosition, LogFile, file_id, open_if_there, open_rotated

READ_BYTES = 256 << 10
TURN_BYTES = 1 << 20  # in one call of `read`: others want their turn
AFTERGLOW_SECONDS = 5.0  # a rotated file may still be written to
HELD_SECONDS = 30.0  # then a line without an end is one


class Reason(StrEnum):
    ROTATED_AWAY = "rotated_away"
    TRUNCATED_FILE = "truncated_file"


class Line(NamedTuple):
    """`text` is without its end; `mark` is behind it."""

    text: bytes
    mark: FilePosition


class Oversized(NamedTuple):
    """A line longer than allowed was skipped."""

    mark: FilePosition


class Hole(NamedTuple):
    """Lines may be missing here."""

    reason: Reason
    mark: FilePosition


Item = Line | Oversized | Hole


class Tail:
    """`mark` is where an earlier process was; without one, reading begins at the end, or at the beginning.

    `now` is monotonic everywhere. `is_there`: the file exists, as far as is known. `began`: where reading began, once
    it has.
    """

    def __init__(self, path: Path, mark: FilePosition | None, max_line: int, *, at_end: bool = False) -> None:
        self.is_there = False
        self.began: FilePosition | None = None
        self._path = path
        self._sought = mark
        self._hole: Reason | None = None  # to be shown where reading goes on
        self._at_end = at_end and mark is None
        self._max_line = max_line
        self._older: deque[tuple[LogFile, int]] = deque()  # rotated files to be read before the path, and from where on
        self._is_older = False
        self._left: FileId | None = None  # the file read last
        self._file: LogFile | None = None
        self._offset = 0  # behind the last line that was given out
        self._held = b""  # what follows it, without an end so far
        self._skipped = 0  # bytes of a line that is too long
        self._grown_at = 0.0
        self._gone_since: float | None = None

    def read(self, now: float) -> list[Item]:
        """What has come, at most a megabyte; nothing when there is nothing new. Raises OSError."""
        items: list[Item] = []
        room = TURN_BYTES
        while room > 0:
            file = self._file or self._open(items)
            if file is None:
                break
            count = self._read_some(file, items, min(READ_BYTES, room), now)
            room -= count
            if not count and not self._at_eof(file, items, now):
                break
        return items

    def close(self) -> None:
        self._leave()
        while self._older:
            self._older.popleft()[0].close()

    def _leave(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # files

    def _open(self, items: list[Item]) -> LogFile | None:
        """The next file, if there is one."""
        sought, self._sought = self._sought, None
        if sought is not None:
            self._hole = self._seek_out(sought)
        file = open_if_there(self._path)  # before the others are listed: none that comes between is missed
        if self._left is not None and not self._older:
            self._queue_later(self._left)
        if self._older:
            if file is not None:
                file.close()
            older, offset = self._older.popleft()
            self._is_older = True
            self.began = self.began or older.mark(offset)
            return self._begin(older, offset)
        self._is_older = False
        self.is_there = file is not None
        if file is not None:
            self._begin(file, 0)
            self._left = None
            if sought is not None and file.id == sought.file and _holds(file, sought):
                self._offset = sought.offset
            elif self._at_end:
                self._offset = self._last_line_end(file)
            self.began = self.began or file.mark(self._offset)
            if self._hole is not None:
                items.append(Hole(self._hole, file.mark(self._offset)))
                self._hole = None
        self._at_end = False  # what comes from now on is new
        return file

    def _seek_out(self, mark: FilePosition) -> Reason | None:
        """Find where reading ended: at the path, or in a rotated file, then those after it come first as well."""
        here = open_if_there(self._path)
        if here is not None:
            with here:
                if here.id == mark.file:
                    if here.size() < mark.offset:
                        return Reason.TRUNCATED_FILE
                    return None if here.matches(mark.fingerprint) else Reason.ROTATED_AWAY
        return None if self._queue_from(mark.file, mark) else Reason.ROTATED_AWAY

    def _queue_later(self, known: FileId) -> None:
        """Files rotated after that one, which may have been more than one since somebody looked."""
        self._queue_from(known, None)

    def _queue_from(self, known: FileId, mark: FilePosition | None) -> bool:
        """Those that follow the known file, with `mark` also its own rest; whether it was found."""
        files = open_rotated(self._path)
        ids = [file.id for file in files]
        at = ids.index(known) if known in ids else len(files)
        found = at < len(files) and (mark is None or _holds(files[at], mark))
        wanted = files[at if mark is not None else at + 1 :] if found else []
        for file in files:
            if file in wanted:
                self._older.append((file, mark.offset if mark is not None and file.id == known else 0))
            else:
                file.close()
        return found

    def _begin(self, file: LogFile, offset: int) -> LogFile:
        self._file, self._offset = file, offset
        self._held, self._skipped, self._gone_since = b"", 0, None
        return file

    def _last_line_end(self, file: LogFile) -> int:
        """Behind the last complete line: one that is being written is taken whole."""
        size = file.size()
        start = max(0, size - self._max_line)
        found = file.read(start, size - start).rfind(b"\n")
        return start + found + 1 if found >= 0 else start

    # lines

    def _read_some(self, file: LogFile, items: list[Item], size: int, now: float) -> int:
        if file.size() < self._read_to() or not file.is_same_content():
            self._give_held(file, items)
            self._offset = 0
            file.renew()
            items.append(Hole(Reason.TRUNCATED_FILE, file.mark(0)))
        data = file.read(self._read_to(), size)
        if data:
            if not self._read_to():
                file.know_by(data)  # it may have been empty a moment ago
            self._grown_at = now
            self._split(file, items, data)
        return len(data)

    def _read_to(self) -> int:
        return self._offset + self._skipped + len(self._held)

    def _split(self, file: LogFile, items: list[Item], data: bytes) -> None:
        *lines, rest = (self._held + data).split(b"\n")
        for text in lines:
            self._offset += self._skipped + len(text) + 1
            mark = file.mark(self._offset)
            items.append(Oversized(mark) if self._skipped or len(text) > self._max_line else Line(text, mark))
            self._skipped = 0
        if self._skipped or len(rest) > self._max_line:
            self._skipped += len(rest)
            rest = b""
        self._held = rest

    def _at_eof(self, file: LogFile, items: list[Item], now: float) -> bool:
        """Whether there is more to read, in this file or in another one."""
        if not self._is_older:
            if file_id(self._path) == file.id:
                self._gone_since = None
                if self._held and now - self._grown_at >= HELD_SECONDS:
                    self._give_held(file, items)
                return False
            if self._gone_since is None:
                self._gone_since = now
            if now - self._gone_since < AFTERGLOW_SECONDS:
                return False
        self._give_held(file, items)
        self._left = file.id
        self._leave()
        return True

    def _give_held(self, file: LogFile, items: list[Item]) -> None:
        if self._skipped or self._held:
            self._offset += self._skipped + len(self._held)
            mark = file.mark(self._offset)
            items.append(Oversized(mark) if self._skipped else Line(self._held, mark))
            self._held, self._skipped = b"", 0


def _holds(file: LogFile, mark: FilePosition) -> bool:
    return file.matches(mark.fingerprint) and file.size() >= mark.offset
