"""Serves HTTP on a TCP address of this host: the node API for callers with the token, and the probes."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from plexd.errors import ListenerError
from plexd.log import get_logger
from plexd.serving import HttpServer

log = get_logger("api")

BACKLOG = 128
REOPEN_SECONDS = 60.0


class TcpListener:
    """Serves `address`, host and port; `open` takes it, `run` serves it. `key` names it in the configuration."""

    def __init__(self, name: str, key: str, address: tuple[str, int], server: HttpServer) -> None:
        self.name = name
        self._key = key
        self._address = address
        self._server = server
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Take the address; callers wait until `run`. Raises ListenerError when it cannot be had."""
        host, port = self._address
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
            with contextlib.ExitStack() as undo:
                sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                sock.listen(BACKLOG)
                undo.pop_all()
        except OSError as exc:
            raise ListenerError(f"cannot listen on {host} port {port}: {exc.strerror}; set {self._key}") from exc
        self._socket = sock
        log.info("listening", address=host, port=sock.getsockname()[1], purpose=self.name)

    def close(self) -> None:
        """Give the address back; giving back what is gone is fine."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def port(self) -> int:
        """The one that was taken, while it is."""
        return int(self._socket.getsockname()[1]) if self._socket is not None else 0

    async def run(self) -> None:
        while self._socket is None:  # a failure took it
            try:
                self.open()
            except ListenerError as exc:  # nothing that a daemon at work should end for
                log.error("address not taken again", error=str(exc), next_try_seconds=REOPEN_SECONDS)
                await asyncio.sleep(REOPEN_SECONDS)
        try:
            await self._server.serve(self._socket)
        finally:
            self.close()
