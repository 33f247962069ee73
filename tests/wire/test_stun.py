"""STUN messages against the examples of RFC 5769, and against whatever the network brings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.errors import WireError
from plexd.mesh.address import Endpoint, parse_ip
from plexd.wire.stun import binding_answer, binding_request, read_answer, read_request

TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")
IPV4_ANSWER = bytes.fromhex(  # RFC 5769, section 2.2
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)
IPV6_ANSWER = bytes.fromhex(  # RFC 5769, section 2.3
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004c8fb0b4c"
)
XOR_MAPPED = "002000080001a147e112a643"  # 192.0.2.1:32853
MAPPED = "0001000800010050c6336407"  # 198.51.100.7:80
SKIPPED = "8022000474657374"

endpoints = st.builds(
    Endpoint, st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)), st.integers(0, 65535)
)
transactions = st.binary(min_size=12, max_size=12)


def answer(attributes: str, *, kind: str = "0101", cookie: str = "2112a442", length: int | None = None) -> bytes:
    body = bytes.fromhex(attributes)
    size = len(body) if length is None else length
    return bytes.fromhex(kind) + size.to_bytes(2, "big") + bytes.fromhex(cookie) + TRANSACTION + body


def endpoint(ip: str, port: int) -> Endpoint:
    return Endpoint(parse_ip(ip), port)


def test_request_is_twenty_bytes_with_cookie_and_transaction() -> None:
    assert binding_request(TRANSACTION) == bytes.fromhex("000100002112a442") + TRANSACTION


@pytest.mark.parametrize(
    ("datagram", "expected"),
    [
        (IPV4_ANSWER, endpoint("192.0.2.1", 32853)),
        (IPV6_ANSWER, endpoint("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
        (answer(MAPPED), endpoint("198.51.100.7", 80)),
        (answer(MAPPED + XOR_MAPPED), endpoint("192.0.2.1", 32853)),
        (answer("00010000" + XOR_MAPPED), endpoint("192.0.2.1", 32853)),
        (answer(SKIPPED + "0006000361626300" + XOR_MAPPED), endpoint("192.0.2.1", 32853)),
        (answer(XOR_MAPPED) + b"more than was declared", endpoint("192.0.2.1", 32853)),
    ],
)
def test_address_is_read_from_an_answer(datagram: bytes, expected: Endpoint) -> None:
    assert read_answer(datagram, TRANSACTION) == expected


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        IPV4_ANSWER[:19],
        answer(XOR_MAPPED, kind="0001"),
        answer(XOR_MAPPED, cookie="2112a443"),
        answer(XOR_MAPPED, length=16),  # more than there is
        answer(XOR_MAPPED, length=10),
    ],
)
def test_what_is_no_answer_to_the_request_counts_as_not_received(datagram: bytes) -> None:
    assert read_answer(datagram, TRANSACTION) is None


def test_answer_to_another_request_counts_as_not_received() -> None:
    assert read_answer(IPV4_ANSWER, bytes(12)) is None


@pytest.mark.parametrize(
    "datagram",
    [
        answer(""),
        answer(SKIPPED),
        answer("0009000400000401", kind="0111"),
        answer("00200010" + XOR_MAPPED[8:]),  # an attribute that goes on after the end
        answer(SKIPPED + "00200008"),
        answer(XOR_MAPPED + "00010008"),
        answer("002000080003a147e112a643"),  # no such family
        answer("002000080002a147e112a643"),  # an IPv6 address of four bytes
        answer("0020000400010050"),
        answer("00200000"),
        answer("00010000"),
    ],
)
def test_answer_without_an_address_is_the_servers_fault(datagram: bytes) -> None:
    with pytest.raises(WireError, match="server"):
        read_answer(datagram, TRANSACTION)


@given(endpoints, transactions)
def test_both_ends_understand_each_other(seen: Endpoint, transaction: bytes) -> None:
    assert read_request(binding_request(transaction)) == transaction
    assert read_answer(binding_answer(transaction, seen), transaction) == seen


@given(st.binary(max_size=100))
def test_any_bytes_are_no_request_or_one(datagram: bytes) -> None:
    transaction = read_request(datagram)
    assert transaction is None or len(transaction) == 12


@given(st.binary(max_size=120), st.integers(0, 3))
def test_any_attributes_give_an_address_or_a_fault(body: bytes, cut: int) -> None:
    datagram = answer(body.hex(), length=len(body) // 4 * 4 - 4 * cut if len(body) > 16 else None)
    try:
        found = read_answer(datagram, TRANSACTION)
    except WireError:
        return
    assert found is None or len(found.packed) in {4, 16}


@given(st.binary(max_size=80))
def test_any_bytes_are_survived(datagram: bytes) -> None:
    assert read_answer(datagram, TRANSACTION) is None
