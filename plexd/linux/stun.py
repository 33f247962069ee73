"""Asks STUN servers from the WireGuard port.

The kernel's WireGuard holds that port, and a second socket cannot have it; a NAT mapping of any other port is of no
use to peers. So the packets leave through a raw socket with a UDP header written here, and a packet filter in the
kernel picks the answers out of the traffic to the port. WireGuard gets a copy of them and drops it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Protocol, Self

from plexd.errors import NotPermitted, StunError, WireError
from plexd.mesh.address import Endpoint, format_ip
from plexd.wire import stun

RESEND_AT_SECONDS = (0.5, 1.5, 3.5)
RECEIVE_BYTES = 2048

SO_ATTACH_FILTER = 26
IPV6_CHECKSUM_OFFSET = 6  # of the checksum in the UDP header: the kernel fills it in and checks it
UDP_HEADER = struct.Struct("!HHHH")  # source port, destination port, length with this header, checksum

_INSTRUCTION = struct.Struct("=HBBI")  # classic BPF: code, jump if true, jump if false, operand
_LD_HALF, _LD_WORD = 0x28, 0x20  # from a fixed place
_LD_HALF_AT_X, _LD_WORD_AT_X = 0x48, 0x40
_LDX_IP_HEADER_LENGTH = 0xB1
_JUMP_IF_EQUAL, _RETURN = 0x15, 0x06
_WHOLE = 0x40000


class Channel(Protocol):
    """A way from the listen port to one server. `sock` does not block; the methods raise OSError."""

    sock: socket.socket

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def send(self, payload: bytes) -> None: ...

    def payload(self, data: bytes, source: str) -> bytes | None:
        """The UDP payload of what was received from the address `source`, None when the server did not send it."""


class StunClient:
    """Asks from UDP port `listen_port`; `open_channel` decides how."""

    def __init__(self, listen_port: int, open_channel: Callable[[int, Endpoint], Channel] | None = None) -> None:
        self._listen_port = listen_port
        self._open_channel = open_channel or RawChannel

    async def ask(self, server: Endpoint, timeout: float) -> Endpoint:
        """The address and port that the server sees us at; `timeout` is in seconds, repetitions included.

        Raises StunError when it gives none, NotPermitted without the capability for raw sockets.
        """
        transaction = secrets.token_bytes(stun.TRANSACTION_BYTES)
        started = asyncio.get_running_loop().time()
        waits = [seconds for seconds in RESEND_AT_SECONDS if seconds < timeout] + [timeout]
        try:
            with self._open_channel(self._listen_port, server) as channel:
                for seconds in waits:
                    channel.send(stun.binding_request(transaction))
                    seen = await _answer(channel, transaction, started + seconds)
                    if seen is not None:
                        return seen
        except OSError as exc:
            raise StunError(os.strerror(exc.errno) if exc.errno else str(exc)) from exc
        except WireError as exc:
            raise StunError(str(exc)) from exc
        raise StunError(f"no answer within {timeout:g} s")


async def _answer(channel: Channel, transaction: bytes, until: float) -> Endpoint | None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(until) as limit:
            while True:
                data, source = await loop.sock_recvfrom(channel.sock, RECEIVE_BYTES)
                payload = channel.payload(data, source[0])
                seen = stun.read_answer(payload, transaction) if payload is not None else None
                if seen is not None:
                    return seen
    except TimeoutError:
        if limit.expired():
            return None
        raise  # ETIMEDOUT of the socket


class RawChannel:
    """A raw socket. Raises NotPermitted when it may not be made."""

    def __init__(self, listen_port: int, server: Endpoint) -> None:
        self._listen_port = listen_port
        self._server = server
        self._is_ipv6 = len(server.packed) == 16
        family = socket.AF_INET6 if self._is_ipv6 else socket.AF_INET
        try:
            self.sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_UDP)
        except PermissionError as exc:
            raise NotPermitted("no permission for a raw socket: run as root or grant CAP_NET_RAW") from exc
        try:
            _attach(self.sock, answer_filter(listen_port, is_ipv6=self._is_ipv6))
            if self._is_ipv6:
                self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, IPV6_CHECKSUM_OFFSET)
            self.sock.connect((format_ip(server.packed), 0))
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, payload: bytes) -> None:
        length = UDP_HEADER.size + len(payload)
        # on IPv4 a checksum of 0 means that there is none
        self.sock.send(UDP_HEADER.pack(self._listen_port, self._server.port, length, 0) + payload)

    def payload(self, data: bytes, source: str) -> bytes | None:
        """What came before the filter was attached is judged here like the rest."""
        if source != format_ip(self._server.packed):
            return None
        datagram = data if self._is_ipv6 else data[(data[0] & 15) * 4 :]
        if len(datagram) < UDP_HEADER.size:
            return None
        source_port, destination_port, length, _ = UDP_HEADER.unpack_from(datagram)
        if (source_port, destination_port) != (self._server.port, self._listen_port):
            return None
        return datagram[UDP_HEADER.size : length]


class PlainChannel:
    """An ordinary UDP socket, for a port that nothing holds."""

    def __init__(self, listen_port: int, server: Endpoint) -> None:
        is_ipv6 = len(server.packed) == 16
        self.sock = socket.socket(
            socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        )
        try:
            if is_ipv6:
                self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self.sock.bind(("", listen_port))
            self.sock.connect((format_ip(server.packed), server.port))  # the kernel lets nobody else in
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, payload: bytes) -> None:
        self.sock.send(payload)

    def payload(self, data: bytes, source: str) -> bytes | None:  # noqa: ARG002
        return data


def answer_filter(listen_port: int, *, is_ipv6: bool) -> bytes:
    """A classic BPF program that passes UDP to `listen_port` whose payload has STUN's cookie at its place.

    On a raw IPv4 socket the data begins with the IP header, on a raw IPv6 socket with the UDP header.
    """
    cookie_at = UDP_HEADER.size + 4
    load = (
        [(_LD_HALF, 0, 0, 2), (_LD_WORD, 0, 0, cookie_at)]
        if is_ipv6
        else [(_LD_HALF_AT_X, 0, 0, 2), (_LD_WORD_AT_X, 0, 0, cookie_at)]
    )
    program = [
        *([] if is_ipv6 else [(_LDX_IP_HEADER_LENGTH, 0, 0, 0)]),
        load[0],
        (_JUMP_IF_EQUAL, 0, 3, listen_port),
        load[1],
        (_JUMP_IF_EQUAL, 0, 1, stun.COOKIE),
        (_RETURN, 0, 0, _WHOLE),
        (_RETURN, 0, 0, 0),
    ]
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _attach(sock: socket.socket, program: bytes) -> None:
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, and where they are
    described = struct.pack("@HP", len(program) // _INSTRUCTION.size, ctypes.addressof(instructions))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)
