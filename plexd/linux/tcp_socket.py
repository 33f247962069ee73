"""A listening TCP socket on an address of this host."""

from __future__ import annotations

import contextlib
import socket

from plexd.errors import ListenerError
from plexd.log import get_logger

log = get_logger("api")

BACKLOG = 128


class TcpSocket:
    """Connections wait from now on."""

    def __init__(self, address: tuple[str, int], purpose: str, key: str) -> None:
        """`key` names the address in the configuration. Raises ListenerError when it cannot be had."""
        host, port = address
        try:
            family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            with contextlib.ExitStack() as undo:
                self.socket = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
                self.socket.setblocking(False)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.socket.bind(found)
                self.socket.listen(BACKLOG)
                undo.pop_all()
        except OSError as exc:
            raise ListenerError(f"cannot listen on {host} port {port}: {exc.strerror}; set {key}") from exc
        log.info("listening", address=host, port=self.socket.getsockname()[1], purpose=purpose)

    def close(self) -> None:
        self.socket.close()
