"""STUN, `plexd/wire/stun.py`: the address in an accepted answer is the one that RFC 5389 puts there."""

from __future__ import annotations

import ipaddress

from plexd.errors import WireError
from plexd.wire import stun

HEADER_BYTES = 20
COOKIE = 0x2112A442.to_bytes(4, "big")
WORDS = (COOKIE, b"\1\1", b"\1\x11", b"\0\1", b"\0\x20", b"\0\1\0\x08\0\1", b"\0\x20\0\x14\0\2")


def check(data: bytes) -> None:
    transaction = data[8:HEADER_BYTES]
    request = stun.read_request(data)
    if request is not None:
        assert data == stun.binding_request(request)[:2] + data[2:]
        assert stun.read_request(stun.binding_request(request)) == request
    other = bytes(byte ^ 1 for byte in transaction)
    assert stun.read_answer(data, other) is None  # whatever it says, nobody asked
    try:
        seen = stun.read_answer(data, transaction)
    except WireError:
        assert address_in(data) is None
        return
    assert (str(seen) if seen else None) == address_in(data)
    if seen is not None:
        assert stun.read_answer(stun.binding_answer(transaction, seen), transaction) == seen


def address_in(datagram: bytes) -> str | None:
    """What a binding success gives as `address:port`; None when it is none, or gives none."""
    header, body = datagram[:HEADER_BYTES], datagram[HEADER_BYTES:]
    length = int.from_bytes(header[2:4], "big")
    if len(header) < HEADER_BYTES or header[:2] != b"\1\1" or header[4:8] != COOKIE or length % 4:
        return None
    if length > len(body):
        return None
    found: dict[int, bytes] = {}
    body = body[:length]
    while body:
        size = int.from_bytes(body[2:4], "big")
        if size > len(body) - 4:
            return None
        found.setdefault(int.from_bytes(body[:2], "big"), body[4 : 4 + size])
        body = body[4 + (size + 3) // 4 * 4 :]
    kind = next((kind for kind in (0x20, 0x01) if kind in found), None)
    if kind is None:
        return None
    value = found[kind]
    port, address = int.from_bytes(value[2:4], "big"), value[4:]
    if len(value) < 4 or {1: 4, 2: 16}.get(value[1]) != len(address):
        return None
    number = int.from_bytes(address, "big")
    if kind == 0x20:
        mask = (COOKIE + header[8:])[: len(address)]
        port, number = port ^ 0x2112, number ^ int.from_bytes(mask, "big")
    ip = ipaddress.IPv4Address(number) if len(address) == 4 else ipaddress.IPv6Address(number)
    return f"{ip}:{port}" if ip.version == 4 else f"[{ip}]:{port}"
