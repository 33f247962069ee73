"""The generic netlink of WireGuard in the kernel (include/uapi/linux/wireguard.h), packed and unpacked in bulk. Pure.

A nested attribute cannot be longer than 64 KiB, so peers go out in messages of about 30 KiB; a peer with more allowed
IPs than fit is continued in the next message. Ten thousand peers pass through here at start-up and at every look, so
neither direction makes an object of an attribute. Written, the usual peer (an IPv4 endpoint, one IPv4 allowed IP) is
one `pack` of a whole struct with the attribute headers in it as numbers; any other shape takes two to four times as
long. Read, a peer is one `unpack`, and what follows it, endpoint and allowed IPs, is remembered by its bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

from plexd.linux.netlink import ATTRIBUTE, NESTED, attribute, attributes
from plexd.mesh.address import Endpoint, Prefix
from plexd.mesh.changes import PeerChange, PutPeer, RemovePeer
from plexd.mesh.keys import KEY_BYTES, NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.observed import Device, DevicePeer

FAMILY_NAME = b"wireguard\0"
GENL_VERSION = 1
GET_DEVICE, SET_DEVICE = 0, 1
(
    DEVICE_IFINDEX, DEVICE_IFNAME, DEVICE_PRIVATE_KEY, DEVICE_PUBLIC_KEY, DEVICE_FLAGS,
    DEVICE_LISTEN_PORT, DEVICE_FWMARK, DEVICE_PEERS,
) = range(1, 9)  # fmt: skip
(
    PEER_PUBLIC_KEY, PEER_PSK, PEER_FLAGS, PEER_ENDPOINT, PEER_KEEPALIVE,
    PEER_LAST_HANDSHAKE, PEER_RX_BYTES, PEER_TX_BYTES, PEER_ALLOWED_IPS, PEER_PROTOCOL_VERSION,
) = range(1, 11)  # fmt: skip
ALLOWED_IP_FAMILY, ALLOWED_IP_ADDRESS, ALLOWED_IP_LENGTH = 1, 2, 3
REMOVE_ME, REPLACE_ALLOWED_IPS, UPDATE_ONLY = 1, 2, 4

MESSAGE_BYTES = 30 * 1024

_GENL = struct.Struct("=BBH")
_U16 = struct.Struct("=H")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_TIMESPEC = struct.Struct("=qq")
_SOCKADDR = {4: struct.Struct("=HH4s8x"), 16: struct.Struct("=HHI16sI")}
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}


# encoding


def get_device(interface: str) -> bytes:
    return _GENL.pack(GET_DEVICE, GENL_VERSION, 0) + _name(interface)


def set_device(interface: str, private_key: PrivateKey, listen_port: int) -> bytes:
    return b"".join(
        (
            _GENL.pack(SET_DEVICE, GENL_VERSION, 0),
            _name(interface),
            attribute(DEVICE_PRIVATE_KEY, private_key),
            attribute(DEVICE_LISTEN_PORT, _U16.pack(listen_port)),
            attribute(DEVICE_FWMARK, bytes(4)),
        )
    )


def _name(interface: str) -> bytes:
    return attribute(DEVICE_IFNAME, interface.encode() + b"\0")


def change_peers(interface: str, changes: Iterable[PeerChange], *, silently: bool = False) -> Iterator[bytes]:
    """The messages that carry out `changes` in order.

    A new peer with a keepalive interval begins its handshake at once. `silently` it does not, until it gets its
    interval by `set_keepalives`.
    """
    return _messages(interface, chain.from_iterable(map(_peer, map(_silent, changes) if silently else changes)))


def set_keepalives(interface: str, changes: Iterable[PeerChange]) -> Iterator[bytes]:
    """The messages that give new peers their keepalive interval, and nothing else."""
    new = (change for change in changes if isinstance(change, PutPeer) and change.is_new and change.keepalive)
    return _messages(interface, (_keepalive(change.public_key, change.keepalive) for change in new))


def restart_keepalives(interface: str, public_keys: Iterable[PublicKey], keepalive: int) -> Iterator[bytes]:
    """The messages after which each of these peers begins a handshake: its interval is new once more."""
    return _messages(interface, (_keepalive(key, interval) for key in public_keys for interval in (0, keepalive)))


def _messages(interface: str, peers: Iterable[bytes]) -> Iterator[bytes]:
    prefix = _GENL.pack(SET_DEVICE, GENL_VERSION, 0) + _name(interface)
    parts: list[bytes] = []
    size = 0
    for part in peers:
        if parts and size + len(part) > MESSAGE_BYTES:
            yield _message(prefix, parts, size)
            parts, size = [], 0
        parts.append(part)
        size += len(part)
    if parts:
        yield _message(prefix, parts, size)


def _message(prefix: bytes, parts: Iterable[bytes], size: int) -> bytes:
    return b"".join((prefix, ATTRIBUTE.pack(4 + size, DEVICE_PEERS | NESTED), *parts))


_KEY_HEADER = ATTRIBUTE.pack(4 + KEY_BYTES, PEER_PUBLIC_KEY)
_PSK_HEADER = ATTRIBUTE.pack(4 + KEY_BYTES, PEER_PSK)
_FLAGS = tuple(attribute(PEER_FLAGS, _U32.pack(flags)) for flags in range(8))
_ENDPOINT_HEADER = {length: ATTRIBUTE.pack(4 + form.size, PEER_ENDPOINT) for length, form in _SOCKADDR.items()}
_KEEPALIVE_HEADER = ATTRIBUTE.pack(4 + 2, PEER_KEEPALIVE)
_PADDED_U16 = struct.Struct("=Hxx")

# an allowed IP is the head for its family, the address, the tail for its length
_ALLOWED_IP_BYTES = {4: 28, 16: 40}
_ALLOWED_IP_HEAD = {
    length: b"".join(
        (
            ATTRIBUTE.pack(_ALLOWED_IP_BYTES[length], NESTED),
            attribute(ALLOWED_IP_FAMILY, _U16.pack(family)),
            ATTRIBUTE.pack(4 + length, ALLOWED_IP_ADDRESS),
        )
    )
    for length, family in _FAMILY.items()
}
_ALLOWED_IP_TAIL = tuple(attribute(ALLOWED_IP_LENGTH, bytes([length])) for length in range(129))


# the usual new peer: key, flags, PSK, endpoint, keepalive, allowed IPs, each headed by its length and type
_USUAL = struct.Struct("=I I32s II I32s IHH4s8x IHxx I IIHxxI4sIBxxx".replace(" ", ""))


def _header(size: int, kind: int) -> int:
    """The header of an attribute with `size` bytes in it, as the number it is when read at once."""
    return int(_U32.unpack(ATTRIBUTE.pack(4 + size, kind))[0])


_USUAL_PEER = _header(_USUAL.size - 4, NESTED)
_USUAL_KEY, _USUAL_FLAGS = _header(KEY_BYTES, PEER_PUBLIC_KEY), _header(4, PEER_FLAGS)
_USUAL_PSK, _USUAL_ENDPOINT = _header(KEY_BYTES, PEER_PSK), _header(16, PEER_ENDPOINT)
_USUAL_KEEPALIVE, _USUAL_ALLOWED_IPS = _header(2, PEER_KEEPALIVE), _header(28, PEER_ALLOWED_IPS | NESTED)
_USUAL_ALLOWED_IP, _USUAL_FAMILY = _header(24, NESTED), _header(2, ALLOWED_IP_FAMILY)
_USUAL_ADDRESS, _USUAL_LENGTH = _header(4, ALLOWED_IP_ADDRESS), _header(1, ALLOWED_IP_LENGTH)


_KEEPALIVE = struct.Struct("=I I32s II IHxx".replace(" ", ""))
_KEEPALIVE_PEER = _header(_KEEPALIVE.size - 4, NESTED)


def _keepalive(public_key: PublicKey, keepalive: int | None) -> bytes:
    return _KEEPALIVE.pack(
        _KEEPALIVE_PEER, _USUAL_KEY, public_key, _USUAL_FLAGS, UPDATE_ONLY, _USUAL_KEEPALIVE, keepalive
    )  # fmt: skip


def _silent(change: PeerChange) -> PeerChange:
    if isinstance(change, RemovePeer) or not change.is_new:
        return change
    peer_id, key, is_new, psk, endpoint, _, allowed_ips, fields = change
    return PutPeer(peer_id, key, is_new, psk, endpoint, 0, allowed_ips, fields)


def _peer(change: PeerChange) -> Iterable[bytes]:
    """A peer as one nested attribute, or several of about a message each when its allowed IPs are that many."""
    if isinstance(change, RemovePeer):
        return (_nested((_KEY_HEADER, change.public_key, _FLAGS[REMOVE_ME])),)
    _, key, is_new, psk, endpoint, keepalive, allowed_ips, _ = change
    if (
        is_new
        and psk is not None
        and keepalive is not None
        and endpoint is not None
        and allowed_ips is not None
        and len(allowed_ips) == 1
        and len(packed := allowed_ips[0][0]) == len(endpoint[0]) == 4
    ):
        return (
            _USUAL.pack(
                _USUAL_PEER, _USUAL_KEY, key, _USUAL_FLAGS, REPLACE_ALLOWED_IPS, _USUAL_PSK, psk,
                _USUAL_ENDPOINT, socket.AF_INET, socket.htons(endpoint[1]), endpoint[0], _USUAL_KEEPALIVE, keepalive,
                _USUAL_ALLOWED_IPS, _USUAL_ALLOWED_IP, _USUAL_FAMILY, socket.AF_INET, _USUAL_ADDRESS, packed,
                _USUAL_LENGTH, allowed_ips[0][1],
            ),
        )  # fmt: skip
    return _any_peer(change)


def _any_peer(change: PutPeer) -> Iterator[bytes]:
    _, key, is_new, psk, endpoint, keepalive, allowed_ips, _ = change
    flags = 0 if is_new else UPDATE_ONLY
    if allowed_ips is not None:
        flags |= REPLACE_ALLOWED_IPS
    parts = [_KEY_HEADER, key, _FLAGS[flags]]
    if psk is not None:
        parts += (_PSK_HEADER, psk)
    if endpoint is not None:
        parts += (_ENDPOINT_HEADER[len(endpoint.packed)], _sockaddr(endpoint))
    if keepalive is not None:
        parts += (_KEEPALIVE_HEADER, _PADDED_U16.pack(keepalive))
    for chunk in _chunks(allowed_ips or ()):
        size = 0
        ips: list[bytes] = []
        for packed, length in chunk:
            ips += (_ALLOWED_IP_HEAD[len(packed)], packed, _ALLOWED_IP_TAIL[length])
            size += _ALLOWED_IP_BYTES[len(packed)]
        if ips:
            parts += (ATTRIBUTE.pack(4 + size, PEER_ALLOWED_IPS | NESTED), *ips)
        yield _nested(parts)
        parts = [_KEY_HEADER, key, _FLAGS[UPDATE_ONLY]]  # a second piece adds to the first


_IPS_IN_A_MESSAGE = (MESSAGE_BYTES - 256) // max(_ALLOWED_IP_BYTES.values())


def _chunks(allowed_ips: Sequence[Prefix]) -> Iterator[Sequence[Prefix]]:
    """At least one, so that a peer without allowed IPs is written too."""
    if len(allowed_ips) <= _IPS_IN_A_MESSAGE:
        yield allowed_ips
        return
    for start in range(0, len(allowed_ips), _IPS_IN_A_MESSAGE):
        yield allowed_ips[start : start + _IPS_IN_A_MESSAGE]


def _nested(parts: Iterable[bytes]) -> bytes:
    body = b"".join(parts)
    return ATTRIBUTE.pack(4 + len(body), NESTED) + body


def _sockaddr(endpoint: Endpoint) -> bytes:
    packed, port = endpoint
    if len(packed) == 4:
        return _SOCKADDR[4].pack(socket.AF_INET, socket.htons(port), packed)
    return _SOCKADDR[16].pack(socket.AF_INET6, socket.htons(port), 0, packed, 0)


# decoding

# How wg_get_device_dump() of the kernel begins a peer; endpoint and allowed IPs follow.
_PEER_HEAD = struct.Struct("=I32s I32s Iqq IHxx IQ IQ II".replace(" ", ""))
_PEER_HEAD_HEADERS = (
    _header(KEY_BYTES, PEER_PUBLIC_KEY),
    _header(KEY_BYTES, PEER_PSK),
    _header(16, PEER_LAST_HANDSHAKE),
    _header(2, PEER_KEEPALIVE),
    _header(8, PEER_TX_BYTES),
    _header(8, PEER_RX_BYTES),
    _header(4, PEER_PROTOCOL_VERSION),
)

_ALLOWED_IP = {length: struct.Struct(f"=IIBxxxIHxxI{length}s") for length in _FAMILY}
_ALLOWED_IP_HEADERS = {
    length: (
        _header(form.size - 4, NESTED),
        _header(1, ALLOWED_IP_LENGTH),
        _header(2, ALLOWED_IP_FAMILY),
        _header(length, ALLOWED_IP_ADDRESS),
    )
    for length, form in _ALLOWED_IP.items()
}
_new = tuple.__new__  # a NamedTuple's own constructor is a Python function


def read_dump(payloads: Iterable[bytes]) -> Device | None:
    """None for an empty dump. Raises ValueError (or struct.error) when it is no dump of a WireGuard device."""
    private_key: PrivateKey | None = None
    listen_port = fwmark = 0
    peers: dict[bytes, DevicePeer] = {}
    seen = False
    for payload in payloads:
        seen = True
        for kind, start, end in attributes(payload, _GENL.size, len(payload)):
            if kind == DEVICE_PEERS:
                _read_peers(payload, start, end, peers)
            elif kind == DEVICE_PRIVATE_KEY:
                if end - start != KEY_BYTES:
                    raise ValueError("private key of another length")
                if payload[start:end] != NO_PRESHARED_KEY:
                    private_key = PrivateKey(payload[start:end])
            elif kind == DEVICE_LISTEN_PORT:
                (listen_port,) = _U16.unpack_from(payload, start)
            elif kind == DEVICE_FWMARK:
                (fwmark,) = _U32.unpack_from(payload, start)
    return Device(private_key, listen_port, fwmark, peers) if seen else None


def _read_peers(data: bytes, start: int, end: int, peers: dict[bytes, DevicePeer]) -> None:
    while start + 4 <= end:
        size, _ = ATTRIBUTE.unpack_from(data, start)
        stop = start + size
        if size < 4 or stop > end:
            raise ValueError("peer overruns its message")
        at = start + 4 + _PEER_HEAD.size
        if at <= stop:
            (
                a, public_key, b, psk, c, seconds, nanoseconds, d, keepalive, e, tx_bytes, f, rx_bytes, g, _,
            ) = _PEER_HEAD.unpack_from(data, start + 4)  # fmt: skip
            if (a, b, c, d, e, f, g) == _PEER_HEAD_HEADERS:
                endpoint, allowed_ips = _read_peer_tail(data[at:stop])
                handshake = seconds + nanoseconds / 1e9 if nanoseconds else seconds
                peers[public_key] = _new(
                    DevicePeer, (public_key, psk, endpoint, keepalive, handshake, rx_bytes, tx_bytes, allowed_ips)
                )
                start = stop + 3 & ~3
                continue
        peer = _read_peer(data, start + 4, stop)
        held = peers.get(peer.public_key)
        if held is not None:  # continued from the message before, with nothing but more allowed IPs
            peer = held._replace(allowed_ips=held.allowed_ips + peer.allowed_ips)
        peers[peer.public_key] = peer
        start = stop + 3 & ~3


@lru_cache(maxsize=1 << 14)  # from one look to the next hardly any of these bytes change
def _read_peer_tail(data: bytes) -> tuple[Endpoint | None, tuple[Prefix, ...]]:
    endpoint: Endpoint | None = None
    allowed_ips: tuple[Prefix, ...] = ()
    for kind, at, stop in attributes(data, 0, len(data)):
        if kind == PEER_ENDPOINT:
            endpoint = _read_sockaddr(data, at, stop)
        elif kind == PEER_ALLOWED_IPS:
            allowed_ips = _read_allowed_ips(data, at, stop)
    return endpoint, allowed_ips


def _read_peer(data: bytes, start: int, end: int) -> DevicePeer:
    public_key = b""
    psk: bytes = NO_PRESHARED_KEY
    endpoint: Endpoint | None = None
    keepalive = rx_bytes = tx_bytes = 0
    last_handshake = 0.0
    allowed_ips: tuple[Prefix, ...] = ()
    for kind, at, stop in attributes(data, start, end):
        if kind == PEER_PUBLIC_KEY:
            public_key = data[at:stop]
        elif kind == PEER_PSK:
            psk = data[at:stop]
        elif kind == PEER_ENDPOINT:
            endpoint = _read_sockaddr(data, at, stop)
        elif kind == PEER_KEEPALIVE:
            (keepalive,) = _U16.unpack_from(data, at)
        elif kind == PEER_LAST_HANDSHAKE:
            seconds, nanoseconds = _TIMESPEC.unpack_from(data, at)
            last_handshake = seconds + nanoseconds / 1e9
        elif kind == PEER_RX_BYTES:
            (rx_bytes,) = _U64.unpack_from(data, at)
        elif kind == PEER_TX_BYTES:
            (tx_bytes,) = _U64.unpack_from(data, at)
        elif kind == PEER_ALLOWED_IPS:
            allowed_ips = _read_allowed_ips(data, at, stop)
    if len(public_key) != KEY_BYTES or len(psk) != KEY_BYTES:
        raise ValueError("peer without a public key, or with a preshared key of another length")
    return DevicePeer(public_key, psk, endpoint, keepalive, last_handshake, rx_bytes, tx_bytes, allowed_ips)


def _read_sockaddr(data: bytes, start: int, end: int) -> Endpoint | None:
    if end - start == _SOCKADDR[4].size:
        _, port, packed = _SOCKADDR[4].unpack_from(data, start)
    elif end - start == _SOCKADDR[16].size:
        _, port, _, packed, _ = _SOCKADDR[16].unpack_from(data, start)
    else:
        return None
    return Endpoint(packed, socket.ntohs(port))


def _read_allowed_ips(data: bytes, start: int, end: int) -> tuple[Prefix, ...]:
    found: list[Prefix] = []
    while start + 4 <= end:
        size, _ = ATTRIBUTE.unpack_from(data, start)
        if size < 4 or start + size > end:
            raise ValueError("allowed IP overruns its peer")
        length = size - 24  # of the address, if this one is written as kernels do
        if length in _ALLOWED_IP:
            a, b, bits, c, _, d, packed = _ALLOWED_IP[length].unpack_from(data, start)
            if (a, b, c, d) == _ALLOWED_IP_HEADERS[length] and bits <= length * 8:
                found.append(_new(Prefix, (packed, bits)))
                start += size
                continue
        found.append(_read_allowed_ip(data, start + 4, start + size))
        start += size + 3 & ~3
    return tuple(found)


def _read_allowed_ip(data: bytes, start: int, end: int) -> Prefix:
    packed, length = b"", -1
    for kind, at, stop in attributes(data, start, end):
        if kind == ALLOWED_IP_ADDRESS:
            packed = data[at:stop]
        elif kind == ALLOWED_IP_LENGTH and at < stop:
            length = data[at]
    if len(packed) not in _FAMILY or not 0 <= length <= len(packed) * 8:
        raise ValueError("allowed IP without an address, or with a length that it cannot have")
    return Prefix(packed, length)
