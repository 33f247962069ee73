"""Compression with a bound, whatever arrives and in whatever pieces."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.control.body import MAX_ANSWER_BYTES, BodyReader, BrokenBody, compress, readable


def read(chunks: Iterable[bytes], encoding: str = "", limit: int = MAX_ANSWER_BYTES) -> bytes:
    reader = BodyReader(encoding, limit)
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def split(raw: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(raw) + 1) for cut in cuts), len(raw)]
    return [raw[start:end] for start, end in pairwise(places)]


@given(body=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 10_000), max_size=8), packed=st.booleans())
def test_any_split_of_a_body_gives_the_body(body: bytes, cuts: list[int], packed: bool) -> None:
    raw = compress(body) if packed else body
    assert read(split(raw, cuts), "gzip" if packed else "") == body


@given(parts=st.lists(st.binary(max_size=50), max_size=6), cuts=st.lists(st.integers(0, 10_000), max_size=4))
def test_members_of_a_gzip_file_are_joined(parts: list[bytes], cuts: list[int]) -> None:
    raw = b"".join(map(compress, parts))
    assert read(split(raw, cuts), "gzip") == b"".join(parts)


@given(body=st.binary(min_size=1, max_size=300), data=st.data())
def test_gzip_cut_anywhere_is_an_error(body: bytes, data: st.DataObject) -> None:
    raw = compress(body)
    with pytest.raises(BrokenBody, match="cut short"):
        read([raw[: data.draw(st.integers(1, len(raw) - 1))]], "gzip")


@given(raw=st.binary(min_size=1, max_size=200))
def test_what_is_no_gzip_is_an_error_of_ours(raw: bytes) -> None:
    try:
        expected = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error):
        with pytest.raises(BrokenBody):
            read([raw], "gzip")
    else:
        assert read([raw], "gzip") == expected


def test_garbage_after_gzip_is_an_error() -> None:
    with pytest.raises(BrokenBody, match="damaged"):
        read([compress(b"{}") + b"garbage"], "gzip")


@pytest.mark.parametrize("encoding", ["", "gzip", " GZIP ", "identity"])
def test_an_empty_body_stays_empty(encoding: str) -> None:
    assert read([], encoding) == b""


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "zstd", "x"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(BrokenBody, match="not asked for"):
        BodyReader(encoding)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("excess", [0, 1])
def test_exactly_ten_mebibytes_are_accepted(packed: bool, excess: int) -> None:
    body = b"x" * (MAX_ANSWER_BYTES + excess)
    chunks = [compress(body)] if packed else split(body, range(0, len(body), 1 << 20))
    if excess:
        with pytest.raises(BrokenBody, match="larger than 10485760 bytes"):
            read(chunks, "gzip" if packed else "")
    else:
        assert read(chunks, "gzip" if packed else "") == body


def test_a_bomb_is_never_unpacked_beyond_the_limit() -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(50)) + packer.flush()
    reader = BodyReader("gzip", limit=5000)
    with pytest.raises(BrokenBody, match="larger"):
        reader.feed(bomb)
    assert len(reader._body) == 5001
    assert len(reader.start()) == 5000


def test_endless_empty_members_end_at_the_limit_too() -> None:
    with pytest.raises(BrokenBody, match="larger"):
        read(repeat(compress(b"") * 1000), "gzip")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"no such node\n", "no such node"),
        (b"\x1b[31mred\x00\x7f", "[31mred"),
        (b"caf\xe9 \xff", "caf\ufffd \ufffd"),
        (b"a" * 5000, "a" * 4096),
        ("\u0085x\u009f".encode(), "x"),
    ],
)
def test_error_text_is_short_and_printable(raw: bytes, text: str) -> None:
    assert readable(raw) == text
