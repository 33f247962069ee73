"""Where callers of the node API come in: opened before anything else, served as a service, closed last."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from plexd.api.http_server import HttpServer
from plexd.errors import ListenerError
from plexd.log import get_logger

log = get_logger("api")

REOPEN_SECONDS = 60.0


class Listening(Protocol):
    """A socket at which callers wait, until `close`."""

    @property
    def socket(self) -> socket.socket: ...

    def close(self) -> None: ...


class ListeningSocket:
    """`listen` raises ListenerError when it cannot."""

    def __init__(self, name: str, listen: Callable[[], Listening], server: HttpServer) -> None:
        self.name = name
        self._listen = listen
        self._server = server
        self._listening: Listening | None = None

    def open(self) -> None:
        """Callers wait until `run`. Raises ListenerError."""
        self._listening = self._listen()

    def close(self) -> None:
        """What is closed already is fine."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    async def run(self) -> None:
        while self._listening is None:  # a failure closed it
            try:
                self.open()
            except ListenerError as exc:  # nothing that a daemon at work should end for
                log.error("listener not opened again", error=str(exc), next_try_seconds=REOPEN_SECONDS)
                await asyncio.sleep(REOPEN_SECONDS)
        try:
            await self._server.serve(self._listening.socket)
        finally:
            self.close()
