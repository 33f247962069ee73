"""STUN binding messages (RFC 5389 without authentication), both ends: a node asks, the lab's responder answers. Pure.

Bytes from the network are judged here and nowhere else: what is not the answer to our request counts as not received,
and an answer to it that gives no address is a fault of the server.
"""

from __future__ import annotations

import struct

from plexd.errors import WireError
from plexd.mesh.address import Endpoint

COOKIE = 0x2112A442
TRANSACTION_BYTES = 12
DEFAULT_PORT = 3478

BINDING_REQUEST, BINDING_SUCCESS, BINDING_ERROR = 0x0001, 0x0101, 0x0111
MAPPED_ADDRESS, XOR_MAPPED_ADDRESS = 0x0001, 0x0020
FAMILY_IPV4, FAMILY_IPV6 = 0x01, 0x02

_HEADER = struct.Struct("!HHI12s")  # type, length of the attributes, cookie, transaction id
_ATTRIBUTE = struct.Struct("!HH")  # type, length without padding
_ADDRESS = struct.Struct("!xBH")  # family, port; the address follows
_ADDRESS_BYTES = {FAMILY_IPV4: 4, FAMILY_IPV6: 16}


def binding_request(transaction: bytes) -> bytes:
    """`transaction` is 12 random bytes, the same in every repetition."""
    return _HEADER.pack(BINDING_REQUEST, 0, COOKIE, transaction)


def read_request(datagram: bytes) -> bytes | None:
    """The transaction id of a binding request, None when it is anything else."""
    if len(datagram) < _HEADER.size:
        return None
    kind, length, cookie, transaction = _HEADER.unpack_from(datagram)
    whole = length == len(datagram) - _HEADER.size and length % 4 == 0
    return bytes(transaction) if kind == BINDING_REQUEST and cookie == COOKIE and whole else None


def binding_answer(transaction: bytes, seen: Endpoint) -> bytes:
    """What a server says to a request that came from `seen`."""
    family = FAMILY_IPV4 if len(seen.packed) == 4 else FAMILY_IPV6
    value = _ADDRESS.pack(family, seen.port ^ COOKIE >> 16) + _xor(seen.packed, transaction)
    attribute = _ATTRIBUTE.pack(XOR_MAPPED_ADDRESS, len(value)) + value
    return _HEADER.pack(BINDING_SUCCESS, len(attribute), COOKIE, transaction) + attribute


def read_answer(datagram: bytes, transaction: bytes) -> Endpoint | None:
    """The address that the server saw; None when this is no answer to the request of `transaction`.

    Raises WireError when the server refused, or its answer gives no address.
    """
    if len(datagram) < _HEADER.size:
        return None
    kind, length, cookie, answered = _HEADER.unpack_from(datagram)
    if cookie != COOKIE or answered != transaction or length % 4 or length > len(datagram) - _HEADER.size:
        return None
    if kind == BINDING_ERROR:
        raise WireError("the server answered with an error")
    if kind != BINDING_SUCCESS:
        return None
    return _read_address(datagram[_HEADER.size : _HEADER.size + length], transaction)


def _read_address(attributes: bytes, transaction: bytes) -> Endpoint:
    values: dict[int, bytes] = {}  # the first of each type counts
    start = 0
    while start < len(attributes):  # both are multiples of four: a header is whole
        kind, length = _ATTRIBUTE.unpack_from(attributes, start)
        start += _ATTRIBUTE.size
        if start + length > len(attributes):
            raise WireError("the server's answer has a truncated attribute")
        values.setdefault(kind, attributes[start : start + length])
        start += length + 3 & ~3
    if XOR_MAPPED_ADDRESS in values:
        masked = _read_endpoint(values[XOR_MAPPED_ADDRESS])
        return Endpoint(_xor(masked.packed, transaction), masked.port ^ COOKIE >> 16)
    if MAPPED_ADDRESS in values:
        return _read_endpoint(values[MAPPED_ADDRESS])
    raise WireError("the server's answer has no address")


def _read_endpoint(value: bytes) -> Endpoint:
    if len(value) >= _ADDRESS.size:
        family, port = _ADDRESS.unpack_from(value)
        packed = value[_ADDRESS.size :]
        if len(packed) == _ADDRESS_BYTES.get(family):
            return Endpoint(packed, port)
    raise WireError("the server's answer has a malformed address")


def _xor(packed: bytes, transaction: bytes) -> bytes:
    mask = COOKIE.to_bytes(4, "big") + transaction
    return bytes(byte ^ masked for byte, masked in zip(packed, mask, strict=False))
