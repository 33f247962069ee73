"""A STUN server for the lab: tells whoever asks from which address and port the question came."""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import Any, Self, cast

from plexd.errors import ConfigError
from plexd.mesh.address import Endpoint, parse_ip
from plexd.wire.stun import binding_answer, read_request


class StunServer:
    """Answers while it is entered, or between `start` and `stop`. `port` 0 takes a free one and keeps it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._transport: asyncio.DatagramTransport | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def start(self) -> None:
        """ConfigError when the address is taken or not ours."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                _Responder, local_addr=(self.host, self.port), family=family
            )
        except OSError as exc:
            raise ConfigError(
                f"cannot answer STUN on {self}: {exc.strerror}; stop the program that has it or choose another --stun"
            ) from exc
        self.port = self._transport.get_extra_info("sockname")[1]

    async def stop(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None
            await asyncio.sleep(0)  # the socket is closed in the loop's next turn

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()


class _Responder(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # though it does not derive from that

    def datagram_received(self, data: bytes, source: tuple[Any, ...]) -> None:
        transaction = read_request(data)
        if transaction is not None:
            self._transport.sendto(binding_answer(transaction, Endpoint(parse_ip(source[0]), source[1])), source)
