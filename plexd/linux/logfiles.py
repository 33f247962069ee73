"""Log files as the file system knows them: which there are, which of them is which, and pieces of their content.

A path says little about a file that is rotated; its device, inode and first bytes say which one it is. Everything here
blocks.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

PACKED = (".gz", ".xz", ".bz2", ".zst", ".zip")
FINGERPRINT_BYTES = 256
MAX_FILES = 500
LISTINGS = 5  # of one directory, until two are the same
_WILD = set("*?[")


class FileId(NamedTuple):
    dev: int
    inode: int


class FilePosition(NamedTuple):
    """A place between two lines."""

    dev: int
    inode: int
    offset: int
    fingerprint: str

    @property
    def file(self) -> FileId:
        return FileId(self.dev, self.inode)

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError."""
        return cls(int(stored["dev"]), int(stored["inode"]), int(stored["offset"]), str(stored["fingerprint"]))


class LogFile:
    """An open log file. `fingerprint` is of its first bytes, as many as there were, and grows up to 256."""

    def __init__(self, path: Path) -> None:
        """Raises OSError; also for what is no regular file."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path} is no regular file")
            self.id = FileId(status.st_dev, status.st_ino)
            self.know_by(self._start())
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def modified_ns(self) -> int:
        return os.fstat(self._descriptor).st_mtime_ns

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._descriptor, count, offset)

    def mark(self, offset: int) -> FilePosition:
        return FilePosition(*self.id, offset, self.fingerprint)

    def renew(self) -> None:
        """What it begins with now is what it is known by."""
        self.know_by(self._start())

    def is_same_content(self) -> bool:
        """Whether it still begins with what it began with; the fingerprint grows with a file that is still short."""
        start = self._start()  # once: between two looks it may be emptied and written anew
        if _fingerprint(start, fingerprint_length(self.fingerprint)) != self.fingerprint:
            return False
        self.know_by(start)
        return True

    def know_by(self, start: bytes) -> None:
        """What was read of its beginning is what it is known by from now on."""
        self.fingerprint = _fingerprint(start, FINGERPRINT_BYTES)

    def matches(self, fingerprint: str) -> bool:
        return _fingerprint(self._start(), fingerprint_length(fingerprint)) == fingerprint

    def _start(self) -> bytes:
        return os.pread(self._descriptor, FINGERPRINT_BYTES, 0)


def _fingerprint(start: bytes, length: int) -> str:
    start = start[:length]
    return f"{hashlib.sha256(start).hexdigest()}:{len(start)}"


def fingerprint_length(fingerprint: str) -> int:
    length = fingerprint.rpartition(":")[2]
    return int(length) if length.isdecimal() else 0


def file_id(path: Path) -> FileId | None:
    """None when there is no regular file of that name."""
    try:
        status = path.stat()
    except OSError:
        return None
    return FileId(status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def find(patterns: Sequence[str]) -> list[Path]:
    """The log files that fit, sorted, at most 500; each file under one name only."""
    found: dict[FileId, Path] = {}
    for pattern in patterns:
        root = os.path.realpath(_fixed_part(pattern))
        for name in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute pattern
            path = Path(name)
            identity = file_id(path)
            if identity is None or name.endswith(PACKED):
                continue
            real = os.path.realpath(name)
            if path.is_symlink() and not real.startswith(root.rstrip("/") + "/"):
                continue
            if len(found) < MAX_FILES:
                found.setdefault(identity, path)
    return sorted(found.values())


def siblings(path: Path) -> list[Path]:
    """What rotation may have made of earlier files of this path, the oldest first; unpacked ones.

    Numbers tell the order where all have one; a file may be written to after the next one is. Else the times do.
    """
    found = _rotated(path)
    for _ in range(LISTINGS):  # a rotation under way can hide a file from one listing
        before, found = found, _rotated(path)
        if [each[:2] for each in found] == [each[:2] for each in before]:
            break
    by_number = all(each.number for each in found)
    return [path.parent / each.name for each in sorted(found, key=lambda f: (not by_number and f.mtime_ns, -f.number))]


def open_if_there(path: Path) -> LogFile | None:
    """None for what is not there, or is no file. Raises OSError for what may not be read."""
    try:
        return LogFile(path)
    except OSError as exc:
        if exc.errno in {None, errno.ENOENT, errno.ENOTDIR}:
            return None
        raise


def open_rotated(path: Path) -> list[LogFile]:
    """What rotation made of earlier files of the path, opened, oldest first. Names move on while one looks.

    Raises OSError for what may not be read.
    """
    while True:
        with contextlib.ExitStack() as opened:
            found = (open_if_there(sibling) for sibling in siblings(path))
            files = [opened.enter_context(file) for file in found if file is not None]
            if [file.id for file in files] == [file_id(sibling) for sibling in siblings(path)]:
                opened.pop_all()
                return files


class _Rotated(NamedTuple):
    """`number` is 0 for a name that ends with none; a date has more digits than those of a rotation."""

    inode: int
    name: str
    mtime_ns: int
    number: int


def _rotated(path: Path) -> list[_Rotated]:
    rotated = re.compile(
        rf"{re.escape(path.name)}[-._][-\w.]+|{re.escape(path.stem)}[-._]\d[-\d_.T]*{re.escape(path.suffix)}"
    )
    found: list[_Rotated] = []
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if not rotated.fullmatch(entry.name) or entry.name.endswith(PACKED):
                continue
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    end = entry.name.rpartition(".")[2]
                    number = int(end) if end.isdecimal() and len(end) <= 3 else 0
                    found.append(_Rotated(status.st_ino, entry.name, status.st_mtime_ns, number))
    return sorted(found)


def _fixed_part(pattern: str) -> str:
    """The directory of a pattern down to its first wildcard."""
    parts = Path(pattern).parts
    fixed = [part for index, part in enumerate(parts) if not any(_WILD & set(p) for p in parts[: index + 1])]
    return str(Path(*fixed)) if len(fixed) < len(parts) else str(Path(pattern).parent)
