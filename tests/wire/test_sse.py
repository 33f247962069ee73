from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.wire.sse import MAX_DATA_BYTES, Decoder, Event, Item, Malformed, Oversized, Retry

STREAM = (
    "\ufeff: hello\nretry: 2000\n\n"
    'id: 8841\r\nevent: peer_removed\r\ndata: {"a":\r\ndata: "é \u2028 \u0085 \x0b \x0c 😀"}\r\n\r\n'
    ": keepalive\r\r"
    "data:no space\rdata:  two spaces\rdata\r\r"
    "unknown: x\nid: 9\nid: nul\0\ndata: y\n\n"
    "id\ndata: z\n\n"
    "event: no_data\n\n"
    "data: never finished"
).encode()

ITEMS: list[Item] = [
    Retry(2.0),
    Event("8841", "peer_removed", '{"a":\n"é \u2028 \u0085 \x0b \x0c 😀"}'),
    Event("8841", "", "no space\n two spaces\n"),
    Event("9", "", "y"),
    Event("", "", "z"),
]


def decode(*chunks: bytes) -> list[Item]:
    decoder = Decoder()
    return [item for chunk in chunks for item in decoder.feed(chunk)]


def test_whole_stream_gives_its_events() -> None:
    assert decode(STREAM) == ITEMS


@pytest.mark.parametrize("size", range(1, 8))
def test_small_chunks_give_the_same_events(size: int) -> None:
    assert decode(*(STREAM[i : i + size] for i in range(0, len(STREAM), size))) == ITEMS


def test_stream_may_be_cut_at_every_byte() -> None:
    for cut in range(len(STREAM) + 1):
        assert decode(STREAM[:cut], STREAM[cut:]) == ITEMS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_split_gives_the_same_events(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert decode(*(STREAM[a:b] for a, b in itertools.pairwise(places))) == ITEMS


@given(st.binary(max_size=200).map(lambda raw: raw.translate(bytes(b"\r\n:d \xff"[i % 6] for i in range(256)))))
def test_any_bytes_give_the_same_items_byte_by_byte(raw: bytes) -> None:
    assert decode(*(raw[i : i + 1] for i in range(len(raw)))) == decode(raw)


def test_event_that_is_not_utf8_is_malformed_and_the_next_is_not() -> None:
    stream = b"event: e\nid: 4\ndata: \xff\n\nid: \xff\ndata: x\n\ndata: good\n\n"
    assert decode(stream) == [Malformed("e"), Malformed(""), Event("4", "", "good")]


def test_stream_that_has_named_no_id_says_so() -> None:
    assert decode(b"data: x\n\n") == [Event(None, "", "x")]


def test_four_mebibytes_are_an_event_and_one_byte_more_is_not() -> None:
    most = b"x" * MAX_DATA_BYTES
    assert decode(b"data: " + most + b"\n\n") == [Event(None, "", most.decode())]
    assert decode(b"id: 1\nevent: e\ndata: " + most + b"x\n\ndata: next\n\n") == [
        Oversized("e", MAX_DATA_BYTES + 1),
        Event("1", "", "next"),
    ]


def test_line_feeds_between_data_lines_count() -> None:
    half = b"x" * (MAX_DATA_BYTES // 2)
    assert decode(b"data: " + half + b"\ndata: " + half[1:] + b"\n\n") == [
        Event(None, "", f"{half.decode()}\n{half[1:].decode()}")
    ]
    assert decode(b"data: " + half + b"\ndata: " + half + b"\n\n") == [Oversized("", MAX_DATA_BYTES + 1)]


@pytest.mark.parametrize("chunk", [1000, 65536])
def test_oversized_event_in_chunks_is_skipped_to_its_empty_line(chunk: int) -> None:
    stream = b"data: " + b"x" * (2 * MAX_DATA_BYTES) + b"\r\ndata: y\r\n\r\ndata: good\r\n\r\n"
    assert decode(*(stream[i : i + chunk] for i in range(0, len(stream), chunk))) == [
        Oversized("", 2 * MAX_DATA_BYTES + 2),
        Event(None, "", "good"),
    ]


def test_endless_comment_is_not_kept() -> None:
    decoder = Decoder()
    for _ in range(10):
        assert decoder.feed(b":" + b"c" * 1_000_000) == []
    assert len(decoder._line) < MAX_DATA_BYTES + 100
    assert decoder.feed(b"\ndata: x\n\n") == [Event(None, "", "x")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.1), ("99", 0.1), ("100", 0.1), ("2500", 2.5), ("60000", 60.0), ("60001", 60.0), ("9" * 5000, 60.0),
     ("0" * 50 + "200", 0.2)],
)  # fmt: skip
def test_retry_is_clamped(text: str, seconds: float) -> None:
    assert decode(f"retry: {text}\n".encode()) == [Retry(seconds)]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "1s", "٣", "+5", " 7"])
def test_retry_that_is_not_digits_is_ignored(text: str) -> None:
    assert decode(f"retry: {text}\n".encode()) == []
