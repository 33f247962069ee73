"""Round trip times by ICMP echo through the mesh interface: many peers at once over one socket a family.

Datagram ICMP sockets first, which the kernel may offer without any capability, raw ones second. A time is taken right
before a packet is handed to the kernel and right after its answer was taken from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plexd.errors import NotPermitted
from plexd.mesh.address import format_ip

AT_ONCE = 64  # peers
SPACING_SECONDS = 0.2
TIMEOUT_SECONDS = 2.0
TAG_BYTES = 8
RECEIVE_BYTES = 512

ECHO_REQUEST = {socket.AF_INET: 8, socket.AF_INET6: 128}
ECHO_REPLY = {socket.AF_INET: 0, socket.AF_INET6: 129}
_PROTOCOL = {socket.AF_INET: socket.IPPROTO_ICMP, socket.AF_INET6: socket.IPPROTO_ICMPV6}
_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence
_SOL_RAW = 255  # Python has no name for it
_ICMP_FILTER = 1
_ICMP6_FILTER = 1


def seconds_for(peers: int, probes: int) -> float:
    """How long probing so many peers takes at most."""
    rounds = -(-peers // AT_ONCE)
    return rounds * ((probes - 1) * SPACING_SECONDS + TIMEOUT_SECONDS)


@dataclass(slots=True)
class Echoes:
    """Of one peer: how many probes were sent, and the round trip of each answer in nanoseconds."""

    sent: int = 0
    rtts: list[int] = field(default_factory=list)


async def probe(interface: str, own: Sequence[bytes], peers: Mapping[str, bytes], probes: int) -> dict[str, Echoes]:
    """Send `probes` echo requests to each peer and collect the answers. `own` are this node's mesh addresses.

    A peer without an address of the same family here is left out. Raises NotPermitted when no ICMP socket may be
    opened, OSError when the interface is not there.
    """
    found: dict[str, Echoes] = {}
    with contextlib.ExitStack() as opened:
        sockets: dict[int, _EchoSocket] = {}
        for address in own:
            family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
            if family not in sockets and any(len(packed) == len(address) for packed in peers.values()):
                sockets[family] = opened.enter_context(_EchoSocket(family, interface, address))
        targets = [
            (peer, packed, sockets[family])
            for peer, packed in peers.items()
            if (family := socket.AF_INET if len(packed) == 4 else socket.AF_INET6) in sockets
        ]
        for start in range(0, len(targets), AT_ONCE):
            found |= await _round(targets[start : start + AT_ONCE], probes)
    return found


async def _round(targets: Sequence[tuple[str, bytes, _EchoSocket]], probes: int) -> dict[str, Echoes]:
    echoes = {peer: Echoes() for peer, _, _ in targets}
    for number in range(probes):
        if number:
            await asyncio.sleep(SPACING_SECONDS)
        for peer, packed, sock in targets:
            sock.send(packed, echoes[peer])
            await asyncio.sleep(0)  # answers to the first are read before the last is sent
    waiting = [asyncio.create_task(sock.all_answered.wait()) for sock in {sock for _, _, sock in targets}]
    try:
        await asyncio.wait(waiting, timeout=TIMEOUT_SECONDS)
    finally:
        for task in waiting:
            task.cancel()
        for sock in {sock for _, _, sock in targets}:
            sock.forget()
    return echoes


@dataclass(slots=True)
class _Flight:
    address: bytes
    echoes: Echoes
    sent_at: int  # monotonic nanoseconds


class _EchoSocket:
    """One ICMP socket, bound to the interface and our address on it."""

    def __init__(self, family: socket.AddressFamily, interface: str, address: bytes) -> None:
        self.all_answered = asyncio.Event()
        self.all_answered.set()
        self._family = family
        self._tag = secrets.token_bytes(TAG_BYTES)
        self._sequence = 0
        self._in_flight: dict[int, _Flight] = {}
        self._sock, self._is_raw = _open(family)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
            self._sock.bind((format_ip(address), 0))
            # a datagram socket has its identifier from the kernel, which also lets only its own answers in
            self._identifier = secrets.randbelow(1 << 16) if self._is_raw else self._sock.getsockname()[1]
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> _EchoSocket:
        asyncio.get_running_loop().add_reader(self._sock, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def send(self, address: bytes, echoes: Echoes) -> None:
        """What the kernel refuses to send, as for a peer without an endpoint, is a probe without an answer."""
        sequence = self._sequence = (self._sequence + 1) & 0xFFFF
        packet = _HEADER.pack(ECHO_REQUEST[self._family], 0, 0, self._identifier, sequence) + self._tag
        if self._is_raw and self._family == socket.AF_INET:
            packet = packet[:2] + checksum(packet).to_bytes(2, "big") + packet[4:]
        echoes.sent += 1
        self._in_flight[sequence] = flight = _Flight(address, echoes, time.monotonic_ns())
        self.all_answered.clear()
        try:
            self._sock.sendto(packet, (format_ip(address), 0))
        except OSError:
            if self._in_flight.get(sequence) is flight:
                del self._in_flight[sequence]
            self._settle()

    def forget(self) -> None:
        """Answers from now on come too late."""
        self._in_flight.clear()

    def _receive(self) -> None:
        while True:
            try:
                data, source = self._sock.recvfrom(RECEIVE_BYTES)
                now = time.monotonic_ns()
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP error for an earlier packet; the probe stays without an answer
                continue
            self._take(data, source[0], now)

    def _take(self, data: bytes, source: str, now: int) -> None:
        if self._is_raw and self._family == socket.AF_INET:
            data = data[(data[0] & 15) * 4 :]
        if len(data) < _HEADER.size + TAG_BYTES:
            return
        kind, _, _, identifier, sequence = _HEADER.unpack_from(data)
        flight = self._in_flight.get(sequence)
        if (
            kind != ECHO_REPLY[self._family]
            or identifier != self._identifier
            or data[_HEADER.size : _HEADER.size + TAG_BYTES] != self._tag
            or flight is None
            or format_ip(flight.address) != source.partition("%")[0]
        ):
            return
        del self._in_flight[sequence]
        if now - flight.sent_at <= TIMEOUT_SECONDS * 1e9:
            flight.echoes.rtts.append(now - flight.sent_at)
        self._settle()

    def _settle(self) -> None:
        if not self._in_flight:
            self.all_answered.set()


def _open(family: socket.AddressFamily) -> tuple[socket.socket, bool]:
    """The socket, and whether it is a raw one."""
    flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with contextlib.suppress(OSError):
        return socket.socket(family, socket.SOCK_DGRAM | flags, _PROTOCOL[family]), False
    try:
        sock = socket.socket(family, socket.SOCK_RAW | flags, _PROTOCOL[family])
    except OSError as exc:
        raise NotPermitted(f"no ICMP socket may be opened: {os.strerror(exc.errno or 0)}") from exc
    # set bits are kept out: everything but echo replies
    if family == socket.AF_INET:
        sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", 0xFFFFFFFF ^ (1 << ECHO_REPLY[family])))
    else:
        words = [0xFFFFFFFF] * 8
        words[ECHO_REPLY[family] >> 5] ^= 1 << (ECHO_REPLY[family] & 31)
        sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *words))
    return sock, True


def checksum(packet: bytes) -> int:
    """The Internet checksum of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
