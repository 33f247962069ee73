"""Lines out of chunks, with a bound on what an endless one may take. Pure."""

from __future__ import annotations


class Lines:
    """Splits at newlines. Of a line longer than `limit` only the beginning is kept, `limit` bytes and one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = b""
        self._skipped = 0  # bytes of the unfinished line that were not kept

    def feed(self, chunk: bytes) -> list[tuple[bytes, int]]:
        """The lines that end in this chunk, without their newlines, each with the length it really has."""
        *whole, rest = chunk.split(b"\n")
        if not whole:
            self._keep(rest)
            return []
        self._keep(whole[0])
        lines = [(self._rest, len(self._rest) + self._skipped)]
        lines += [(line[: self._limit + 1], len(line)) for line in whole[1:]]
        self._rest, self._skipped = b"", 0
        self._keep(rest)
        return lines

    @property
    def unfinished(self) -> tuple[bytes, int]:
        """What came after the last newline, and the length it really has."""
        return self._rest, len(self._rest) + self._skipped

    def clear(self) -> None:
        self._rest, self._skipped = b"", 0

    def _keep(self, part: bytes) -> None:
        room = self._limit + 1 - len(self._rest)
        self._rest += part[:room]
        self._skipped += max(0, len(part) - room)
