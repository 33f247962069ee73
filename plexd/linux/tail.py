"""One growing file, followed through rotation by rename and by copy, across restarts (telemetry contract, 4.5).

A place in it is told by inode and by a fingerprint of its beginning, so that a file is known again under another name,
and another file is known to be another one under the same name. Everything here blocks, for a moment.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

READ_BYTES = 256 << 10
TURN_BYTES = 1 << 20  # in one call of `read`: other files want their turn
FINGERPRINT_BYTES = 256
AFTERGLOW_SECONDS = 5.0  # a rotated file may still be written to
HELD_SECONDS = 30.0  # then a line without an end is one
PACKED = frozenset({".gz", ".xz", ".bz2", ".zst", ".zip"})


class Mark(NamedTuple):
    """A place between two lines."""

    dev: int
    inode: int
    offset: int
    fingerprint: str  # SHA-256 of the first bytes, and how many those are

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError."""
        return cls(int(stored["dev"]), int(stored["inode"]), int(stored["offset"]), str(stored["fingerprint"]))


class Reason(StrEnum):
    ROTATED_AWAY = "rotated_away"
    TRUNCATED_FILE = "truncated_file"


class Line(NamedTuple):
    """`text` is without its end; `mark` is behind it."""

    text: bytes
    mark: Mark


class Oversized(NamedTuple):
    """A line longer than allowed was skipped."""

    mark: Mark


class Hole(NamedTuple):
    """Lines may be missing here."""

    reason: Reason
    mark: Mark


Item = Line | Oversized | Hole

_Identity = tuple[int, int, int, int]  # device, inode, size, time of the last change


class Tail:
    """`mark` is where an earlier process was; without one, reading begins at the end, or at the beginning.

    `now` is monotonic everywhere. `is_there`: the file exists, as far as is known. `began`: where reading began, once
    it has.
    """

    def __init__(self, path: Path, mark: Mark | None, max_line: int, *, at_end: bool = False) -> None:
        self.is_there = False
        self.began: Mark | None = None
        self._path = path
        self._sought = mark
        self._hole: Reason | None = None  # to be shown where reading goes on
        self._at_end = at_end and mark is None
        self._max_line = max_line
        self._older: deque[tuple[Path, int]] = deque()  # rotated files to be read before the path, and from where on
        self._is_older = False
        self._left: tuple[int, int] | None = None  # the file read last, by device and inode
        self._file: int | None = None
        self._dev = self._inode = 0
        self._offset = 0  # behind the last line that was given out
        self._held = b""  # what follows it, without an end so far
        self._skipped = 0  # bytes of a line that is too long
        self._grown_at = 0.0
        self._fingerprint = fingerprint(b"")
        self._gone_since: float | None = None

    def read(self, now: float) -> list[Item]:
        """What has come, at most a megabyte; nothing when there is nothing new. Raises OSError."""
        items: list[Item] = []
        room = TURN_BYTES
        while room > 0:
            if self._file is None and not self._open(items):
                break
            count = self._read_some(items, min(READ_BYTES, room), now)
            room -= count
            if not count and not self._at_eof(items, now):
                break
        return items

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # files

    def _open(self, items: list[Item]) -> bool:
        """Whether there is a file now."""
        sought, self._sought = self._sought, None
        if sought is not None:
            self._hole = self._seek_out(sought)
        if self._left is not None and not self._older:
            self._queue_later(*self._left)
        while self._older:
            path, offset = self._older.popleft()
            if self._open_at(path, offset):
                self._is_older = True
                self.began = self.began or self._mark()
                return True
        self._is_older = False
        self.is_there = self._open_at(self._path, 0)
        if self.is_there:
            self._left = None
            if sought is not None and self._is_at(sought):
                self._offset = sought.offset
            elif self._at_end:
                self._offset = self._last_line_end()
            self._update_fingerprint(self._offset)
            self.began = self.began or self._mark()
            if self._hole is not None:
                items.append(Hole(self._hole, self._mark()))
                self._hole = None
        self._at_end = False  # what comes from now on is new
        return self.is_there

    def _seek_out(self, mark: Mark) -> Reason | None:
        """Find where reading ended: at the path, or in a rotated file, then those after it come first as well."""
        here = _identity(self._path)
        if here is not None and here[:2] == (mark.dev, mark.inode):
            if _starts_as(self._path, mark.fingerprint):
                return None if here[2] >= mark.offset else Reason.TRUNCATED_FILE
            return Reason.TRUNCATED_FILE if here[2] < mark.offset else Reason.ROTATED_AWAY
        for path, identity in self._siblings():
            if identity[:2] == (mark.dev, mark.inode) and _starts_as(path, mark.fingerprint):
                self._older.append((path, mark.offset))
                self._queue_later(mark.dev, mark.inode)
                return None
        return Reason.ROTATED_AWAY

    def _queue_later(self, dev: int, inode: int) -> None:
        """Files rotated after that one, which may have been more than one since somebody looked."""
        siblings = self._siblings()
        for _, known in siblings:
            if known[:2] == (dev, inode):
                later = sorted((identity[3], path) for path, identity in siblings if identity[3] > known[3])
                self._older.extend((path, 0) for _, path in later if self._is_rotation(path))

    def _siblings(self) -> list[tuple[Path, _Identity]]:
        try:
            names = [path for path in self._path.parent.iterdir() if path.name != self._path.name]
        except OSError:
            return []
        found = [(path, _identity(path)) for path in names if path.suffix not in PACKED]
        return [(path, identity) for path, identity in found if identity is not None]

    def _is_rotation(self, path: Path) -> bool:
        """By its name: audit.log.1, error.log-20260301, audit-2026-03-01T10-20-30.123.log."""
        stem, suffix = re.escape(self._path.stem), re.escape(self._path.suffix)
        return re.fullmatch(rf"{stem}(?:{suffix})?[-.][0-9TZ:.-]+(?:{suffix})?", path.name) is not None

    def _open_at(self, path: Path, offset: int) -> bool:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            os.close(file)
            return False
        self._file, self._dev, self._inode, self._offset = file, status.st_dev, status.st_ino, offset
        self._held, self._skipped, self._gone_since = b"", 0, None
        self._fingerprint = fingerprint(b"")
        self._update_fingerprint(offset)
        return True

    def _is_at(self, mark: Mark) -> bool:
        assert self._file is not None  # noqa: S101 - the caller has opened it
        if (self._dev, self._inode) != (mark.dev, mark.inode) or os.fstat(self._file).st_size < mark.offset:
            return False
        return _matches(self._file, mark.fingerprint)

    def _last_line_end(self) -> int:
        """Behind the last complete line: one that is being written is taken whole."""
        assert self._file is not None  # noqa: S101 - the caller has opened it
        size = os.fstat(self._file).st_size
        start = max(0, size - self._max_line)
        found = os.pread(self._file, size - start, start).rfind(b"\n")
        return start + found + 1 if found >= 0 else start

    # lines

    def _read_some(self, items: list[Item], size: int, now: float) -> int:
        assert self._file is not None  # noqa: S101 - the caller has opened it
        if self._was_rewritten(self._file):
            self._give_held(items)
            self._offset, self._fingerprint = 0, fingerprint(b"")
            items.append(Hole(Reason.TRUNCATED_FILE, self._mark()))
        at = self._read_to()
        data = os.pread(self._file, size, at)
        if data:
            self._grown_at = now
            self._update_fingerprint(at + len(data))
            self._split(items, data)
        return len(data)

    def _read_to(self) -> int:
        return self._offset + self._skipped + len(self._held)

    def _was_rewritten(self, file: int) -> bool:
        return os.fstat(file).st_size < self._read_to() or not _matches(file, self._fingerprint)

    def _split(self, items: list[Item], data: bytes) -> None:
        *lines, rest = (self._held + data).split(b"\n")
        for text in lines:
            self._offset += self._skipped + len(text) + 1
            too_long = self._skipped or len(text) > self._max_line
            self._skipped = 0
            items.append(Oversized(self._mark()) if too_long else Line(text, self._mark()))
        if self._skipped or len(rest) > self._max_line:
            self._skipped += len(rest)
            rest = b""
        self._held = rest

    def _at_eof(self, items: list[Item], now: float) -> bool:
        """Whether there is more to read, in this file or in another one."""
        if self._is_older:
            self._leave(items)
            return True
        identity = _identity(self._path)
        if identity is not None and identity[:2] == (self._dev, self._inode):
            self._gone_since = None
            if self._held and now - self._grown_at >= HELD_SECONDS:
                self._give_held(items)
            return False
        if self._gone_since is None:
            self._gone_since = now
        if now - self._gone_since < AFTERGLOW_SECONDS:
            return False
        self._leave(items)
        return True

    def _leave(self, items: list[Item]) -> None:
        self._give_held(items)
        self._left = (self._dev, self._inode)
        self.close()

    def _give_held(self, items: list[Item]) -> None:
        if self._skipped or self._held:
            self._offset += self._skipped + len(self._held)
            items.append(Oversized(self._mark()) if self._skipped else Line(self._held, self._mark()))
            self._held, self._skipped = b"", 0

    def _mark(self) -> Mark:
        return Mark(self._dev, self._inode, self._offset, self._fingerprint)

    def _update_fingerprint(self, read_to: int) -> None:
        """It covers the more of a young file the more of it was read."""
        assert self._file is not None  # noqa: S101 - the caller has opened it
        if int(self._fingerprint.partition(":")[2]) < min(FINGERPRINT_BYTES, read_to):
            self._fingerprint = fingerprint(os.pread(self._file, min(FINGERPRINT_BYTES, read_to), 0))


def fingerprint(beginning: bytes) -> str:
    return f"{hashlib.sha256(beginning).hexdigest()}:{len(beginning)}"


def _matches(file: int, wanted: str) -> bool:
    size = wanted.partition(":")[2]
    return size.isdecimal() and fingerprint(os.pread(file, int(size), 0)) == wanted


def _starts_as(path: Path, wanted: str) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _matches(file, wanted)
    finally:
        os.close(file)


def _identity(path: Path) -> _Identity | None:
    """None for what is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
