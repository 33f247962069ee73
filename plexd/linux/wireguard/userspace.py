"""A WireGuard program in user space, spoken to over its UAPI socket. The text is made in `uapi`."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence

from plexd.linux.wireguard import uapi
from plexd.linux.wireguard.program import Program
from plexd.mesh.changes import PeerChange
from plexd.mesh.keys import PrivateKey, PublicKey
from plexd.mesh.observed import Device
from plexd.runtime.threads import in_mesh_thread

TIMEOUT_SECONDS = 5.0
RECEIVE_BYTES = 1 << 16


class UserspaceDevice:
    """The device side of a TUN link. Whoever answers is watched by `program` from then on."""

    def __init__(self, program: Program) -> None:
        self.writes = 0
        self._program = program

    async def dump(self) -> Device | None:
        try:
            with self._connect() as sock:
                answer = await _ask(sock, uapi.GET)
        except (FileNotFoundError, ConnectionError):
            return None
        _judge(answer)
        try:
            return await in_mesh_thread(uapi.read_device, answer)
        except ValueError as exc:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO)) from exc

    async def set_device(self, private_key: PrivateKey, listen_port: int) -> None:
        self.writes += 1
        with self._connect() as sock:
            _judge(await _ask(sock, uapi.set_device(private_key, listen_port)))

    async def change_peers(self, changes: Sequence[PeerChange]) -> None:
        with self._connect() as sock:
            for request in uapi.change_peers(changes):
                self.writes += 1
                _judge(await _ask(sock, request))

    async def begin_handshakes(self) -> None:
        pass  # begun, as each peer was added

    async def renew_sessions(self, public_keys: Sequence[PublicKey], keepalive: int) -> None:
        with self._connect() as sock:
            for request in uapi.restart_keepalives(public_keys, keepalive):
                self.writes += 1
                _judge(await _ask(sock, request))

    def _connect(self) -> socket.socket:
        sock = self._program.connect()
        self._program.adopt(sock)
        return sock


async def _ask(sock: socket.socket, request: bytes) -> str:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await loop.sock_sendall(sock, request)
        answer = bytearray()
        while not answer.endswith(b"\n\n"):
            data = await loop.sock_recv(sock, RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            answer += data
    return answer.decode("ascii", "replace")


def _judge(answer: str) -> None:
    try:
        code = uapi.errno_of(answer)
    except ValueError as exc:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO)) from exc
    if code:
        raise OSError(code, os.strerror(code))
