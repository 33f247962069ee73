"""WireGuard in the kernel, `plexd/linux/netlink.py` and `wireguard/messages.py`: a look can be written back as it is.

The input is what a socket receives: netlink messages, one after the other.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace

from plexd.linux.netlink import attribute, split
from plexd.linux.wireguard import messages
from plexd.mesh.address import Prefix
from plexd.mesh.changes import PutPeer
from plexd.mesh.keys import KEY_BYTES, PresharedKey, PublicKey
from plexd.mesh.observed import Device, DevicePeer
from tests.linux.devices import dump_allowed_ip, dump_message, dump_peer, nested

REFUSALS = (ValueError, struct.error)
WORDS = (
    attribute(messages.PEER_PUBLIC_KEY, bytes(range(32))),
    attribute(messages.PEER_PSK, bytes(range(32))),
    attribute(messages.PEER_ENDPOINT, b"\2\0\xca\x6c" + bytes(12)),
    attribute(messages.PEER_ENDPOINT, b"\x0a\0\xca\x6c" + bytes(24)),
    attribute(messages.PEER_KEEPALIVE, b"\x19\0"),
    attribute(messages.PEER_LAST_HANDSHAKE, struct.pack("=qq", 1_772_356_500, 500_000_000)),
    attribute(messages.PEER_RX_BYTES, bytes(8)),
    dump_allowed_ip(Prefix.parse("10.99.0.7"), None),
    dump_allowed_ip(Prefix.parse("fd00:99::/64"), None),
)
LATEST_SECONDS = 2.0**40


def check(data: bytes) -> None:
    payloads: list[bytes] = []
    with contextlib.suppress(OSError):  # whatever came before counts
        payloads.extend(data[start:end] for _, _, _, start, end in split(data))
    try:
        device = messages.read_dump(payloads)
    except REFUSALS:
        return
    if device is None:
        assert not payloads
        return
    assert device.private_key is None or len(device.private_key) == KEY_BYTES
    peers = [peer._replace(last_handshake=plain(peer.last_handshake)) for peer in device.peers.values()]
    device = Device(device.private_key, device.listen_port, device.fwmark, {peer.public_key: peer for peer in peers})
    assert messages.read_dump([dump_of(device)]) == device
    assert messages.read_dump(cut(device)) == device
    # what is there is what a change could have put there
    changes = [put(peer) for peer in peers]
    written = messages.read_dump(messages.change_peers("plexd0", changes))
    assert [put(peer) for peer in (written.peers.values() if written else ())] == changes


def plain(handshake: float) -> float:
    """To the quarter of a second: a float loses nanoseconds, and no kernel gives a thousand million of them."""
    return int(handshake * 4) / 4 if 0 <= handshake < LATEST_SECONDS else 0.0


def dump_of(device: Device) -> bytes:
    return dump_message(
        map(dump_peer, device.peers.values()),
        *([attribute(messages.DEVICE_PRIVATE_KEY, device.private_key)] if device.private_key else []),
        attribute(messages.DEVICE_LISTEN_PORT, struct.pack("=H", device.listen_port)),
        attribute(messages.DEVICE_FWMARK, struct.pack("=I", device.fwmark)),
    )


def cut(device: Device) -> list[bytes]:
    """In messages as the kernel ends them when they are full: amid the allowed IPs of a peer, which then goes on."""
    sent = [dump_of(replace(device, peers={}))]
    for peer in device.peers.values():
        middle = len(peer.allowed_ips) // 2
        sent.append(dump_message([dump_peer(peer._replace(allowed_ips=peer.allowed_ips[:middle]))]))
        rest = [dump_allowed_ip(prefix, None) for prefix in peer.allowed_ips[middle:]]
        key = attribute(messages.PEER_PUBLIC_KEY, peer.public_key)
        sent.append(dump_message([nested(0, [key, nested(messages.PEER_ALLOWED_IPS, rest)])]))
    return sent


def put(peer: DevicePeer) -> PutPeer:
    assert len(peer.public_key) == len(peer.psk) == KEY_BYTES
    return PutPeer(
        "",
        PublicKey(peer.public_key),
        True,
        PresharedKey(peer.psk),
        peer.endpoint,
        peer.keepalive,
        peer.allowed_ips,
        (),
    )
