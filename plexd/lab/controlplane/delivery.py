"""How answers reach the socket, whole or spoiled as a fault wants it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import struct
import zlib
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

from plexd.lab.controlplane.faults import BOMB_BYTES, RESPONSE_LIMIT, Effect, Fault

GZIP_ABOVE = 1024
_BLOCK = bytes(b" " * 1024 * 1024)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Exchange:
    """One request being answered: the ASGI channel and the socket under it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._transport: asyncio.Transport = scope["state"]["transport"]
        self._send = send
        self._gone = asyncio.create_task(_wait_disconnected(receive))

    async def close(self) -> None:
        """Ends the watch over the connection; the connection itself belongs to the server."""
        self._gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._gone

    @property
    def gone(self) -> bool:
        """Whether the other side, or this one, has closed the connection."""
        return self._gone.done()

    async def wait(self, work: Awaitable[object], timeout: float | None = None) -> None:
        """Until `work` is done, the connection is gone or `timeout` seconds have passed; `work` is cancelled then."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()

    async def head(self, status: int, headers: Mapping[str, str]) -> None:
        pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def body(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def cut(self) -> None:
        """Sends what is buffered and closes, wherever the answer stands."""
        self._transport.close()
        await self._gone

    async def reset(self) -> None:
        """Closes so that the other side sees a reset connection."""
        raw: socket.socket = self._transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
        await self._gone


async def deliver(exchange: Exchange, answer: Answer, fault: Fault | None, *, gzip_accepted: bool) -> None:
    """Sends `answer` as `fault` lets it through."""
    effect = fault.effect if fault is not None else Effect.NONE
    headers = dict(answer.headers)
    match effect:
        case Effect.DISCONNECT:
            await exchange.reset()
        case Effect.CUT:
            await exchange.head(answer.status, headers | {"content-length": str(max(2, len(answer.body)))})
            await exchange.body(answer.body[: max(1, len(answer.body) // 2)], more=True)
            await exchange.cut()
        case Effect.TRUNCATE:
            await _whole(exchange, answer.status, headers, answer.body[: len(answer.body) // 2])
        case Effect.END:
            await _whole(exchange, answer.status, headers, b"")
        case Effect.OVERSIZED:
            size = (fault and fault.size) or RESPONSE_LIMIT + 1
            await _whole(exchange, answer.status, headers, answer.body.ljust(size))
        case Effect.GZIP_BOMB:
            size = (fault and fault.size) or BOMB_BYTES
            bomb = await asyncio.to_thread(_bomb, answer.body, size)
            await _whole(exchange, answer.status, headers | {"content-encoding": "gzip"}, bomb)
        case _ if gzip_accepted and effect is Effect.NONE and len(answer.body) > GZIP_ABOVE:
            packed = gzip.compress(answer.body, compresslevel=1)
            await _whole(exchange, answer.status, headers | {"content-encoding": "gzip"}, packed)
        case _:
            await _whole(exchange, answer.status, headers, answer.body)


async def _whole(exchange: Exchange, status: int, headers: dict[str, str], body: bytes) -> None:
    await exchange.head(status, headers if status == 204 else headers | {"content-length": str(len(body))})
    await exchange.body(body, more=False)


def _bomb(body: bytes, size: int) -> bytes:
    compressor = zlib.compressobj(level=9, wbits=31)
    parts = [compressor.compress(body)]
    left = size - len(body)
    while left > 0:
        parts.append(compressor.compress(_BLOCK[:left]))
        left -= len(_BLOCK)
    return b"".join([*parts, compressor.flush()])


async def _wait_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
