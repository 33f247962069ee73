"""The kernel's audit stream: what it multicasts to whoever listens, as read-only copies of what auditd gets.

Listening neither takes the place of auditd nor changes a rule. It is best effort: a listener that is too slow misses
records, and is told that it did, not how many.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import deque
from pathlib import Path
from typing import Self

from plexd.errors import KernelError, NotPermitted

NETLINK_AUDIT = 9
AUDIT_NLGRP_READLOG = 1
BUFFER_BYTES = 8 << 20
DATAGRAM_BYTES = 1 << 16  # a record has at most 8970 bytes of text
QUEUE_DATAGRAMS = 8192
BURST = 64  # datagrams in one go before others have their turn

SO_RCVBUFFORCE = 33

# The kernel multicasts in the initial network namespace only, but lets anyone bind. This knob exists nowhere else.
INITIAL_NAMESPACE_KNOB = Path("/proc/sys/net/core/netdev_budget")


class Overrun:
    """Stands where the kernel dropped records, nobody knows how many."""


class AuditStream:
    """Open from the first moment on: what comes before `read` is kept, 8 MiB in the kernel and 8192 records here."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES) -> None:
        """Raises KernelError where there is nothing to hear, NotPermitted without the capability."""
        if not INITIAL_NAMESPACE_KNOB.exists():
            raise KernelError("audit records are sent in the host's network namespace only")
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_AUDIT
            )
        except OSError as exc:
            raise KernelError(f"no audit socket here: {exc.strerror}") from exc
        try:
            self._socket.bind((0, 1 << (AUDIT_NLGRP_READLOG - 1)))
        except OSError as exc:
            self._socket.close()
            if exc.errno == errno.EPERM:
                raise NotPermitted("no permission to read audit records: run as root or grant CAP_AUDIT_READ") from exc
            raise KernelError(f"the audit stream cannot be joined: {exc.strerror}") from exc
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
        except OSError:  # no CAP_NET_ADMIN: as much as anyone may have
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self._queue: deque[bytes | Overrun] = deque()
        self._arrived = asyncio.Event()
        self._is_listening = False
        self._is_overrun = False

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._pause()
        self.close()

    def close(self) -> None:
        self._socket.close()

    async def read(self) -> list[bytes | Overrun]:
        """What has arrived, at least one datagram with its netlink header, in order. Raises OSError."""
        while not self._queue:
            self._arrived.clear()
            self._listen()
            await self._arrived.wait()
        found = [self._queue.popleft() for _ in range(min(BURST, len(self._queue)))]
        self._listen()
        return found

    def _listen(self) -> None:
        if not self._is_listening:
            self._is_listening = True
            asyncio.get_running_loop().add_reader(self._socket, self._receive)

    def _pause(self) -> None:
        if self._is_listening:
            self._is_listening = False
            asyncio.get_running_loop().remove_reader(self._socket)

    def _receive(self) -> None:
        """Only moves datagrams: whatever takes longer would let the kernel's buffer overflow."""
        for _ in range(BURST):
            if len(self._queue) >= QUEUE_DATAGRAMS:
                self._pause()  # from here on the kernel keeps them, and says so when it can't
                break
            try:
                data, (port, _groups) = self._socket.recvfrom(DATAGRAM_BYTES)
            except BlockingIOError:
                if self._is_overrun:
                    self._is_overrun = False
                    self._queue.append(Overrun())
                break
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
                # told at once, but what is in the buffer is older: the kernel drops until that is empty
                self._is_overrun = True
                continue
            if port == 0:  # from the kernel, not from another program
                self._queue.append(data)
        if self._queue:
            self._arrived.set()
