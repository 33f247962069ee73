"""A uvicorn server that lends its sockets to faults, and that can be gone and come back on the same address."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from plexd.errors import ConfigError
from plexd.lab.tls import TlsPaths


class _Protocol(H11Protocol):
    """Hands the application its transport, so that a fault can cut the connection under an answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    def drop_connections(self) -> None:
        """Stops listening and cuts every connection at once; `should_exit` then ends the server."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.should_exit = True


class Listener:
    """Serves `app` on a socket that `bind` makes anew at each start."""

    def __init__(self, app: ASGIApp, bind: Callable[[], socket.socket], tls: TlsPaths | None = None) -> None:
        self._app = app
        self._bind = bind
        self._tls = tls
        self._running: tuple[_Server, asyncio.Task[None]] | None = None

    @property
    def listening(self) -> bool:
        return self._running is not None

    async def start(self) -> None:
        """Listens; does nothing while it does already. ConfigError when the address can't be had."""
        if self._running is not None:
            return
        config = uvicorn.Config(
            self._app, http=_Protocol, ws="none", lifespan="off", log_config=None, log_level="error",
            access_log=False, date_header=False, server_header=False, timeout_graceful_shutdown=2,
            ssl_certfile=self._tls.certificate_file if self._tls else None,
            ssl_keyfile=self._tls.key_file if self._tls else None,
        )  # fmt: skip
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[self._bind()]))
        await server.listening.wait()
        self._running = (server, task)

    async def stop(self) -> None:
        """Gone as after a crash: nobody is served to the end. `start` brings it back."""
        if self._running is None:
            return
        server, task = self._running
        self._running = None
        server.drop_connections()
        await task


def bind_tcp(host: str, port: int) -> socket.socket:
    """ConfigError with what to do when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as exc:
        sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {exc.strerror}; stop the program that has it or choose another --listen"
        ) from exc
    return sock


def bind_unix(path: Path) -> socket.socket:
    """A socket only its owner can use; one that a dead process left behind is replaced."""
    fresh = path.with_name(f"{path.name}.new")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _answers(path) or (path.exists() and not path.is_socket()):
            raise FileExistsError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        fresh.unlink(missing_ok=True)
        sock.bind(str(fresh))
        fresh.chmod(0o600)
        sock.listen()
        fresh.rename(path)  # whoever sees it can connect
    except OSError as exc:
        sock.close()
        raise ConfigError(
            f"cannot listen on {path}: {exc.strerror}; stop the program that has it or choose another --admin-socket"
        ) from exc
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
