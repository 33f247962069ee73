"""The event stream, `plexd/wire/sse.py`: whatever pieces it comes in, its items are those of the contract's text.

The limits are small here, so that short streams go beyond them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from unittest import mock

from plexd.wire import sse

DATA_BYTES, LINE_BYTES = 40, 56
WORDS = (b"data:", b"event:", b"id:", b"retry:", b"\n\n", b"\r\n", b"\xef\xbb\xbf", b"\0", b"x" * DATA_BYTES)


def check(data: bytes) -> None:
    with mock.patch.multiple(sse, MAX_DATA_BYTES=DATA_BYTES, MAX_LINE_BYTES=LINE_BYTES):
        expected = by_the_book(data)
        assert decode([data]) == expected
        assert decode(data[i : i + 1] for i in range(len(data))) == expected
        cuts = [0, *itertools.accumulate(data[:16], lambda at, step: at + step % 32), len(data)]
        assert decode(data[a:b] for a, b in itertools.pairwise(sorted(cuts))) == expected
    for item in expected:
        if isinstance(item, sse.Retry):
            assert 0.1 <= item.seconds <= 60


def decode(chunks: Iterable[bytes]) -> list[sse.Item]:
    decoder = sse.Decoder()
    return [item for chunk in chunks for item in decoder.feed(chunk)]


def by_the_book(stream: bytes) -> list[sse.Item]:
    """Section 2 of the events contract, for who has the whole stream before him."""
    *lines, _unfinished = re.split(rb"\r\n|\r|\n", stream)
    items: list[sse.Item] = []
    last_id: str | None = None
    kind, is_utf8, contents = "", True, list[bytes]()
    for number, whole in enumerate(lines):
        line = whole.removeprefix(b"\xef\xbb\xbf") if number == 0 else whole
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            contents.append(value)
        elif len(whole) > LINE_BYTES:
            pass
        elif name == b"event":
            kind = _decoded(value) or ""
            is_utf8 = is_utf8 and _decoded(value) is not None
        elif name == b"id" and b"\0" not in value:
            is_utf8 = is_utf8 and _decoded(value) is not None
            last_id = _decoded(value) if is_utf8 else last_id
        elif name == b"retry" and re.fullmatch(rb"[0-9]+", value):
            items.append(sse.Retry(min(max(int(value), 100), 60_000) / 1000))
        elif not line:
            content = b"\n".join(contents)
            text = _decoded(content)
            if len(content) > DATA_BYTES:
                items.append(sse.Oversized(kind, len(content)))
            elif contents and (text is None or not is_utf8):
                items.append(sse.Malformed(kind))
            elif contents:
                items.append(sse.Event(last_id, kind, text or ""))
            kind, is_utf8, contents = "", True, []
    return items


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
