"""Serves the node API on its Unix socket, to programs on this host."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from plexd.api.rights import READERS, SocketGate
from plexd.api.routes import Dispatcher, Route, refuse
from plexd.errors import ListenerError
from plexd.linux.unix_socket import SocketFile
from plexd.log import get_logger
from plexd.serving import HttpServer, Limits

log = get_logger("api")

REOPEN_SECONDS = 60.0


class LocalApi:
    """Serves the socket at `path`; `open` makes it, `run` serves it and removes it at the end."""

    name = "local api"

    def __init__(self, path: Path, routes: Iterable[Route], limits: Limits) -> None:
        self._path = path
        self._file: SocketFile | None = None
        self.gate = SocketGate()
        self._server = HttpServer(Dispatcher(routes, self.gate).respond, refuse, limits)

    def open(self) -> None:
        """Make the socket; callers wait until `run`. Raises ListenerError, also when another daemon has it."""
        self._file = SocketFile(self._path, self.gate.readers)
        if self.gate.readers is None:
            log.warning("socket is for root only", path=str(self._path), reason=f"this host has no group {READERS}")

    def close(self) -> None:
        """Remove the socket; what is removed already is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None

    async def run(self) -> None:
        while self._file is None:  # a failure took it
            try:
                self.open()
            except ListenerError as exc:  # nothing that a daemon at work should end for
                log.error("socket not opened again", error=str(exc), next_try_seconds=REOPEN_SECONDS)
                await asyncio.sleep(REOPEN_SECONDS)
        try:
            await self._server.serve(self._file.socket)
        finally:
            self.close()
