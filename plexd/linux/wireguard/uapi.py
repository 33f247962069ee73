"""The text protocol of WireGuard programs in user space (wireguard.com/xplatform), written and read. Pure."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator, Sequence

from plexd.mesh.address import Endpoint, Prefix, format_ip
from plexd.mesh.changes import PeerChange, RemovePeer
from plexd.mesh.keys import KEY_BYTES, NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.observed import Device, DevicePeer

GET = b"get=1\n\n"
MAX_ERRNO = 4095  # of the kernel
U16, U32, U64 = 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1
MAX_SECONDS, MAX_NANOSECONDS = (1 << 63) // 10**9, 10**9 - 1  # of a time that is 63 bits of nanoseconds there
PEERS_AT_ONCE = 256  # in one `set`: a few milliseconds of encoding


def set_device(private_key: PrivateKey, listen_port: int) -> bytes:
    return f"set=1\nprivate_key={private_key.hex()}\nlisten_port={listen_port}\nfwmark=0\n\n".encode()


def change_peers(changes: Sequence[PeerChange]) -> Iterator[bytes]:
    """The `set` operations that carry out `changes` in order."""
    for start in range(0, len(changes), PEERS_AT_ONCE):
        lines = ["set=1"]
        for change in changes[start : start + PEERS_AT_ONCE]:
            lines += _peer(change)
        yield ("\n".join(lines) + "\n\n").encode()


def restart_keepalives(public_keys: Sequence[PublicKey], keepalive: int) -> Iterator[bytes]:
    """The `set` operations after which each of these peers begins a handshake: its interval is new once more."""
    for start in range(0, len(public_keys), PEERS_AT_ONCE):
        lines = ["set=1"]
        for public_key in public_keys[start : start + PEERS_AT_ONCE]:
            lines += (f"public_key={public_key.hex()}", "update_only=true")
            lines += (f"persistent_keepalive_interval={interval}" for interval in (0, keepalive))
        yield ("\n".join(lines) + "\n\n").encode()


def _peer(change: PeerChange) -> Iterator[str]:
    yield f"public_key={change.public_key.hex()}"
    if isinstance(change, RemovePeer):
        yield "remove=true"
        return
    if not change.is_new:
        yield "update_only=true"  # before anything else, or the peer is made first
    if change.psk is not None:
        yield f"preshared_key={change.psk.hex()}"
    if change.endpoint is not None:
        yield f"endpoint={change.endpoint}"
    if change.keepalive is not None:
        yield f"persistent_keepalive_interval={change.keepalive}"
    if change.allowed_ips is not None:
        yield "replace_allowed_ips=true"
        for packed, length in change.allowed_ips:
            yield f"allowed_ip={format_ip(packed)}/{length}"


def errno_of(answer: str) -> int:
    """0 when it was done. Raises ValueError when the answer does not end as one does."""
    last = answer.rstrip("\n").rpartition("\n")[2]
    name, _, value = last.partition("=")
    if name != "errno":
        raise ValueError("answer does not end with errno")
    return _number(value.removeprefix("-"), MAX_ERRNO)  # wireguard-go writes it negative


class _Peer:
    """A peer while its lines come in."""

    __slots__ = ("allowed_ips", "endpoint", "keepalive", "nanoseconds", "psk", "public_key", "rx", "seconds", "tx")

    def __init__(self, public_key: bytes) -> None:
        self.public_key = public_key
        self.psk: bytes = NO_PRESHARED_KEY
        self.endpoint: Endpoint | None = None
        self.keepalive = self.seconds = self.nanoseconds = self.rx = self.tx = 0
        self.allowed_ips: list[Prefix] = []

    def finish(self) -> DevicePeer:
        return DevicePeer(
            self.public_key,
            self.psk,
            self.endpoint,
            self.keepalive,
            self.seconds + self.nanoseconds / 1e9,
            self.rx,
            self.tx,
            tuple(self.allowed_ips),
        )


def read_device(answer: str) -> Device:
    """The answer to GET. Unknown names are skipped; ValueError when a known one has a value it cannot have."""
    private_key: PrivateKey | None = None
    listen_port = fwmark = 0
    peers: dict[bytes, DevicePeer] = {}
    peer: _Peer | None = None
    for line in io.StringIO(answer):  # not splitlines(): a call of 30 ms would let nobody else run
        name, _, value = line.rstrip("\n").partition("=")
        if name == "public_key":
            if peer is not None:
                peers[peer.public_key] = peer.finish()
            peer = _Peer(_key(value))
        elif peer is None:
            match name:
                case "private_key":
                    private_key = PrivateKey(_key(value))
                case "listen_port":
                    listen_port = _number(value, U16)
                case "fwmark":
                    fwmark = _number(value, U32)
        else:
            _read_peer_line(peer, name, value)
    if peer is not None:
        peers[peer.public_key] = peer.finish()
    if private_key is not None and not any(private_key):  # all zero: none set
        private_key = None
    return Device(private_key, listen_port, fwmark, peers)


def _read_peer_line(peer: _Peer, name: str, value: str) -> None:
    match name:
        case "preshared_key":
            peer.psk = _key(value)
        case "endpoint":
            peer.endpoint = _endpoint(value)
        case "persistent_keepalive_interval":
            peer.keepalive = _number(value, U16)
        case "last_handshake_time_sec":
            peer.seconds = _number(value, MAX_SECONDS)
        case "last_handshake_time_nsec":
            peer.nanoseconds = _number(value, MAX_NANOSECONDS)
        case "rx_bytes":
            peer.rx = _number(value, U64)
        case "tx_bytes":
            peer.tx = _number(value, U64)
        case "allowed_ip":
            address, _, length = value.partition("/")
            packed = _packed(address)
            peer.allowed_ips.append(Prefix(packed, _number(length, len(packed) * 8)))


def _endpoint(value: str) -> Endpoint:
    host, _, port = value.rpartition(":")
    return Endpoint(_packed(host.strip("[]").partition("%")[0]), _number(port, U16))


def _key(text: str) -> bytes:
    key = bytes.fromhex(text)
    if len(key) != KEY_BYTES:
        raise ValueError("not a key")
    return key


def _number(text: str, most: int) -> int:
    number = int(text)
    if not 0 <= number <= most:
        raise ValueError("a number out of range")
    return number


def _packed(text: str) -> bytes:
    """inet_pton, because a dump has thousands of these and ipaddress takes ten times as long."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except OSError:
        raise ValueError("not an IP address") from None
