"""The log that auditd writes, read from a known event on: what happened while nobody listened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from plexd.audit.backlog import holds
from plexd.audit.records import EventId

LIMIT_BYTES = 16 << 20
CHUNK_BYTES = 256 << 10


class AuditLog:
    """The newest 16 MiB of the log and of the one rotated away last, as they are when this is made. Blocks."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the log cannot be read; a rotated one need not exist."""
        self._files: list[tuple[BinaryIO, int]] = []
        room = LIMIT_BYTES
        try:
            for candidate in (path, path.with_name(path.name + ".1")):
                try:
                    file = candidate.open("rb")
                except FileNotFoundError:
                    if candidate == path:
                        raise
                    break
                size = os.fstat(file.fileno()).st_size
                self._files.insert(0, (file, max(0, size - room)))
                room -= min(size, room)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        for file, _ in self._files:
            file.close()

    def holds(self, event: EventId) -> bool:
        """Whether a record of that event is there. Raises OSError."""
        return any(holds(lines, event) for lines in self.chunks())

    def chunks(self) -> Iterator[list[bytes]]:
        """All complete lines, oldest first, some at a time. Raises OSError."""
        for file, start in self._files:
            file.seek(start)
            if start:
                file.readline()  # it begins somewhere before
            while lines := file.readlines(CHUNK_BYTES):
                if not lines[-1].endswith(b"\n"):  # still being written
                    lines.pop()
                yield lines
