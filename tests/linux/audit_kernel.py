"""The kernel's audit system, for tests that need real records: switched on, told things, put back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from plexd.errors import KernelError
from plexd.linux.audit import NETLINK_AUDIT, AuditStream

AUDIT_GET, AUDIT_SET, AUDIT_TRUSTED_APP = 1000, 1001, 1121
NLM_F_REQUEST, NLM_F_ACK = 1, 4
STATUS = struct.Struct("=11I")  # mask, enabled, failure, pid, rate and backlog limit, lost, backlog, …
MASK_ENABLED = 0x1
REFUSED = {errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ECONNREFUSED}


class AuditKernel:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sequence = 0

    def say(self, text: str, number: int = AUDIT_TRUSTED_APP) -> None:
        """Have the kernel make a record of what a program says; it stands alone."""
        self._ask(number, text.encode() + b"\0")

    def status(self) -> tuple[int, ...]:
        answer = self._ask(AUDIT_GET, b"", AUDIT_GET)
        return STATUS.unpack(answer[: STATUS.size].ljust(STATUS.size, b"\0"))

    def switch(self, enabled: int) -> None:
        self._ask(AUDIT_SET, STATUS.pack(MASK_ENABLED, enabled, *[0] * 9))

    def _ask(self, number: int, payload: bytes, wanted: int = 0) -> bytes:
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(payload), number, NLM_F_REQUEST | NLM_F_ACK, self._sequence, 0)
        self._socket.send(header + payload)
        found, acknowledged = b"", False
        while not acknowledged or (wanted and not found):
            data = self._socket.recv(1 << 16)
            kind, sequence = struct.unpack_from("=HxxI", data, 4)
            if sequence != self._sequence:
                continue
            if kind == 2:
                (code,) = struct.unpack_from("=i", data, 16)
                if code:
                    raise OSError(-code, os.strerror(-code))
                acknowledged = True
            elif kind == wanted:
                found = data[16:]
        return found


@contextlib.contextmanager
def audit_kernel() -> Iterator[AuditKernel]:
    """Skips where records cannot be made and heard. The switch is one for the whole machine, so one test has it."""
    with contextlib.ExitStack() as undo:
        try:
            lock = undo.enter_context(Path(tempfile.gettempdir(), "plexd-audit-kernel.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            sock = undo.enter_context(
                socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_AUDIT)
            )
            sock.settimeout(20)
            sock.bind((0, 0))
            kernel = AuditKernel(sock)
            undo.callback(kernel.switch, kernel.status()[1])
            kernel.switch(1)
        except OSError as exc:
            if exc.errno not in REFUSED:
                raise
            pytest.skip(f"no audit records can be made here: {exc.strerror}")
        yield kernel


def can_listen() -> str:
    """Why the kernel's stream cannot be heard here; empty if it can."""
    try:
        stream = AuditStream()
    except KernelError as exc:
        return str(exc)
    stream.close()
    return ""
