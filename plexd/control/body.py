"""Bodies of requests and answers: compression with a bound (docs/contract/wire.md §2). No I/O."""

from __future__ import annotations

import gzip
import re
import zlib

PLAIN_REQUEST_BYTES = 1024  # a larger one is compressed
MAX_ANSWER_BYTES = 10 << 20
MAX_ERROR_BYTES = 4096

# gzip of what cannot be compressed is a little longer than what it holds
_GZIP_OVERHEAD_BYTES = MAX_ANSWER_BYTES // 64
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class BrokenBody(Exception):
    """The body is too large, cut, damaged, or encoded in a way nobody asked for; the text says which."""


def compress(raw: bytes) -> bytes:
    """gzip. The same bytes for the same input: no time in the header."""
    return gzip.compress(raw, compresslevel=6, mtime=0)


class BodyReader:
    """Takes a body as it arrives and decompresses it, never holding more than `limit` bytes of it and one chunk.

    `encoding` is the Content-Encoding header, empty without. `feed` and `finish` raise BrokenBody.
    """

    def __init__(self, encoding: str, limit: int = MAX_ANSWER_BYTES) -> None:
        name = encoding.strip().lower()
        if name not in {"", "identity", "gzip"}:
            raise BrokenBody("the answer is encoded in a way that was not asked for")
        self.received = 0
        self._limit = limit
        self._body = bytearray()
        self._gzip = zlib.decompressobj(_GZIP_WINDOW) if name == "gzip" else None

    def feed(self, chunk: bytes) -> None:
        self.received += len(chunk)
        if self._gzip is None:
            self._body += chunk[: self._limit + 1 - len(self._body)]
        elif self.received > self._limit + _GZIP_OVERHEAD_BYTES:
            self._refuse()
        else:
            self._decompress(chunk)
        if len(self._body) > self._limit:
            self._refuse()

    def finish(self) -> bytes:
        """The whole body, once all of it was fed."""
        if self._gzip is not None and self.received and not self._gzip.eof:
            raise BrokenBody("the answer's gzip data is cut short")
        return bytes(self._body)

    def start(self) -> bytes:
        """What has been understood so far, at most `limit` bytes."""
        return bytes(self._body[: self._limit])

    def _decompress(self, chunk: bytes) -> None:
        assert self._gzip is not None  # noqa: S101 - the caller asked
        while chunk and len(self._body) <= self._limit:
            if self._gzip.eof:  # a gzip file may consist of several members
                self._gzip = zlib.decompressobj(_GZIP_WINDOW)
            try:
                self._body += self._gzip.decompress(chunk, self._limit + 1 - len(self._body))
            except zlib.error as exc:
                raise BrokenBody("the answer's gzip data is damaged") from exc
            chunk = self._gzip.unused_data

    def _refuse(self) -> None:
        raise BrokenBody(f"the answer is larger than {self._limit} bytes")


def readable(raw: bytes) -> str:
    """The text of an error body: its first 4096 bytes, invalid UTF-8 replaced, control characters removed."""
    return _CONTROL.sub("", raw[:MAX_ERROR_BYTES].decode("utf-8", "replace")).strip()
