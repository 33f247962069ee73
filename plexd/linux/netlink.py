"""Netlink for what comes in bulk: many packed messages in one send, whole dumps as bytes.

pyroute2 makes an object of every attribute, which is right for one link and 20 times too slow for ten thousand peers.
Here a message is bytes from the start; what the bytes mean is decided in the pure modules beside this one.

The calls block, because the kernel does the work inside `send` (a Diffie-Hellman product for each new peer): run them
in a thread. A socket serves one call, so that a call given up half-way leaves no stale answers to the next.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

TIMEOUT_SECONDS = 5.0
RECEIVE_BYTES = 1 << 17  # the kernel fills at most 32 KiB of a dump at a time, a little more for one big message
ASKED_AT_ONCE = 32  # their answers fit too, at the 4 KiB that each may take up
IN_FLIGHT = 128  # messages in one send: their error answers fit into the receive buffer
SEND_BYTES = 1 << 15  # of messages in one send: far less than what a socket may have under way
DUMP_TRIES = 3

NETLINK_ROUTE, NETLINK_GENERIC = 0, 16  # typeshed lacks the second

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLM_F_DUMP, NLM_F_DUMP_INTR = 0x300, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400

SOL_NETLINK, NETLINK_CAP_ACK = 270, 10
SO_SNDBUFFORCE = 32  # not in the socket module

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
ATTRIBUTE = struct.Struct("=HH")  # length with this header, type
TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
NESTED = 0x8000
_ERRNO = struct.Struct("=i")


class Message(NamedTuple):
    """A request without its header, which is put in front when it is sent."""

    type: int
    flags: int
    payload: bytes | bytearray


class DumpInterrupted(Exception):
    """What is dumped changed meanwhile; the answer may have gaps."""


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def attributes(data: bytes | memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The attributes in data[start:end]: type without its flags, and where the payload begins and ends."""
    while start + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            raise ValueError("netlink attribute overruns its message")
        yield kind & TYPE_MASK, start + 4, start + length
        start += length + 3 & ~3


class NetlinkSocket:
    """A socket of one netlink protocol, for one call, in a thread. Every method raises OSError."""

    def __init__(self, protocol: int) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = itertools.count(1)
        try:
            self._sock.settimeout(TIMEOUT_SECONDS)
            self._sock.bind((0, 0))
            # an error answer would carry the whole refused message back, 30 KiB of keys among it
            self._sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, messages: Sequence[Message], *, at_once: bool = False) -> list[int]:
        """Have the kernel carry out `messages` in order; for each 0 or the errno it was refused with.

        One refused message does not keep the rest from being tried. `at_once` they go in one system call, for which
        there must not be more than some dozen.
        """
        results = [0] * len(messages)
        if at_once and messages:
            total = sum(HEADER.size + len(message.payload) for message in messages)
            self._sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * total)
            self._send_some(messages, 0, len(messages), results)
            return results
        start = size = 0
        for position, message in enumerate(messages):
            size += len(message.payload)
            if position > start and (size > SEND_BYTES or position - start == IN_FLIGHT):
                self._send_some(messages, start, position, results)
                start, size = position, len(message.payload)
        if messages:
            self._send_some(messages, start, len(messages), results)
        return results

    def _send_some(self, messages: Sequence[Message], start: int, end: int, results: list[int]) -> None:
        positions: dict[int, int] = {}
        parts: list[bytes | bytearray] = []
        for position in range(start, end):
            kind, flags, payload = messages[position]
            sequence = next(self._sequence)
            positions[sequence] = position
            # errors are always answered; success only of the last one, which tells that all are done
            flags |= NLM_F_REQUEST | (NLM_F_ACK if position == end - 1 else 0)
            parts += (HEADER.pack(HEADER.size + len(payload), kind, flags, sequence, 0), payload)
        last = sequence
        self._sock.sendmsg(parts)
        while True:
            data = self._receive()
            for kind, _, sequence, offset, _ in split(data):
                if kind == NLMSG_ERROR and sequence in positions:
                    results[positions[sequence]] = -_ERRNO.unpack_from(data, offset)[0]
                    if sequence == last:
                        return

    def transact(self, begin: Message, messages: Sequence[Message], end: Message) -> int:
        """Have the kernel carry out all of `messages` or none; 0, or the errno it refused them with.

        What goes around them is answered only when there is something wrong with all of it.
        """
        parts: list[bytes | bytearray] = []
        sequences: list[int] = []
        for kind, flags, payload in (begin, *messages, end):
            sequences.append(next(self._sequence))
            answer = NLM_F_ACK if len(sequences) == len(messages) + 1 else 0
            size = HEADER.size + len(payload)
            parts += (HEADER.pack(size, kind, flags | NLM_F_REQUEST | answer, sequences[-1], 0), payload)
        self._sock.sendmsg(parts)
        refused = 0
        while True:
            data = self._receive()
            for kind, _, sequence, offset, _ in split(data):
                if kind == NLMSG_ERROR and sequence in sequences:
                    refused = refused or -_ERRNO.unpack_from(data, offset)[0]
                    if sequence in {sequences[0], sequences[-2]}:
                        return refused

    def dump(self, request: Message) -> list[bytes]:
        """The payloads of everything the kernel answers with; repeated if it changed meanwhile."""
        for _ in range(DUMP_TRIES - 1):
            try:
                return self._dump(request)
            except DumpInterrupted:
                continue
        try:
            return self._dump(request)
        except DumpInterrupted as exc:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from exc

    def _dump(self, request: Message) -> list[bytes]:
        return self._ask(request, NLM_F_DUMP)

    def get(self, request: Message) -> list[bytes]:
        """The payload of the one answer to a request that is no dump."""
        return self._ask(request, NLM_F_ACK)

    def get_each(self, requests: Sequence[Message]) -> list[bytes | None]:
        """The same for many requests; None where one was refused."""
        answers: list[bytes | None] = [None] * len(requests)
        for start in range(0, len(requests), ASKED_AT_ONCE):
            positions: dict[int, int] = {}
            parts: list[bytes | bytearray] = []
            for position in range(start, min(start + ASKED_AT_ONCE, len(requests))):
                kind, flags, payload = requests[position]
                sequence = next(self._sequence)
                positions[sequence] = position
                parts += (HEADER.pack(HEADER.size + len(payload), kind, flags | NLM_F_REQUEST, sequence, 0), payload)
            self._sock.sendmsg(parts)
            while positions:
                data = self._receive()
                for kind, _, sequence, offset, end in split(data):
                    at = positions.pop(sequence, None)
                    if at is not None and kind != NLMSG_ERROR:
                        answers[at] = data[offset:end]
        return answers

    def _ask(self, request: Message, flags: int) -> list[bytes]:
        sequence = next(self._sequence)
        size = HEADER.size + len(request.payload)
        header = HEADER.pack(size, request.type, request.flags | flags | NLM_F_REQUEST, sequence, 0)
        self._sock.sendmsg((header, request.payload))
        payloads: list[bytes] = []
        interrupted = False
        while True:
            data = self._receive()
            for kind, answer_flags, answered, offset, end in split(data):
                if answered != sequence:
                    continue
                interrupted = interrupted or bool(answer_flags & NLM_F_DUMP_INTR)
                if kind not in {NLMSG_DONE, NLMSG_ERROR}:
                    payloads.append(data[offset:end])
                    continue
                code = -_ERRNO.unpack_from(data, offset)[0]
                if code > 0:
                    raise OSError(code, os.strerror(code))
                if interrupted:
                    raise DumpInterrupted
                return payloads

    def _receive(self) -> bytes:
        data, _, flags, _ = self._sock.recvmsg(RECEIVE_BYTES)
        if flags & socket.MSG_TRUNC:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return data


def split(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Type, flags, sequence number, and where the payload begins and ends."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        yield kind, flags, sequence, offset + HEADER.size, offset + length
        offset += length + 3 & ~3
