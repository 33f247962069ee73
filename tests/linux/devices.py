"""A WireGuard device as those who hold it tell of it: the kernel in a dump, wireguard-go in its answer to `get`."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterable

from plexd.linux.netlink import NESTED, attribute
from plexd.linux.wireguard import messages
from plexd.mesh.address import Prefix, format_ip
from plexd.mesh.observed import Device, DevicePeer

# the dump, written an attribute at a time


def nested(kind: int, parts: Iterable[bytes]) -> bytes:
    return attribute(kind | NESTED, b"".join(parts))


def dump_allowed_ip(prefix: Prefix, shuffle: random.Random | None) -> bytes:
    parts = [
        attribute(messages.ALLOWED_IP_LENGTH, bytes((prefix.length,))),
        attribute(
            messages.ALLOWED_IP_FAMILY,
            struct.pack("=H", socket.AF_INET if len(prefix.packed) == 4 else socket.AF_INET6),
        ),
        attribute(messages.ALLOWED_IP_ADDRESS, prefix.packed),
    ]
    if shuffle is not None:
        shuffle.shuffle(parts)
    return nested(0, parts)


def dump_peer(peer: DevicePeer, shuffle: random.Random | None = None) -> bytes:
    """As the kernel writes it, or in any other order."""
    seconds = int(peer.last_handshake)
    nanoseconds = round((peer.last_handshake - seconds) * 1e9)
    parts = [
        attribute(messages.PEER_PUBLIC_KEY, peer.public_key),
        attribute(messages.PEER_PSK, peer.psk),
        attribute(messages.PEER_LAST_HANDSHAKE, struct.pack("=qq", seconds, nanoseconds)),
        attribute(messages.PEER_KEEPALIVE, struct.pack("=H", peer.keepalive)),
        attribute(messages.PEER_TX_BYTES, struct.pack("=Q", peer.tx_bytes)),
        attribute(messages.PEER_RX_BYTES, struct.pack("=Q", peer.rx_bytes)),
        attribute(messages.PEER_PROTOCOL_VERSION, struct.pack("=I", 1)),
    ]
    if peer.endpoint is not None:
        packed, port = peer.endpoint
        sockaddr = (
            struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, packed)
            if len(packed) == 4
            else struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16sI", port, 0, packed, 0)
        )
        parts.append(attribute(messages.PEER_ENDPOINT, sockaddr))
    parts.append(nested(messages.PEER_ALLOWED_IPS, [dump_allowed_ip(prefix, shuffle) for prefix in peer.allowed_ips]))
    if shuffle is not None:
        shuffle.shuffle(parts)
    return nested(0, parts)


def dump_message(peers: Iterable[bytes], *device: bytes) -> bytes:
    return b"".join((struct.pack("=BBH", 0, 1, 0), *device, nested(messages.DEVICE_PEERS, peers)))


# the answer


def answer_with(device: Device) -> str:
    lines = [f"private_key={device.private_key.hex()}"] if device.private_key is not None else []
    lines += [f"listen_port={device.listen_port}", f"fwmark={device.fwmark}"]
    for peer in device.peers.values():
        seconds = int(peer.last_handshake)
        lines += [f"public_key={peer.public_key.hex()}", f"preshared_key={peer.psk.hex()}", "protocol_version=1"]
        lines += [f"endpoint={peer.endpoint}"] if peer.endpoint is not None else []
        lines += [
            f"last_handshake_time_sec={seconds}",
            f"last_handshake_time_nsec={round((peer.last_handshake - seconds) * 1e9)}",
            f"tx_bytes={peer.tx_bytes}",
            f"rx_bytes={peer.rx_bytes}",
            f"persistent_keepalive_interval={peer.keepalive}",
        ]
        lines += [f"allowed_ip={format_ip(packed)}/{length}" for packed, length in peer.allowed_ips]
    return "\n".join([*lines, "errno=0", "", ""])
