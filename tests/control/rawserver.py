"""An HTTP/1.1 server that sends exactly the bytes a test wants, over real sockets, and remembers what it received."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from plexd.control import ControlPlane, tls_context

NODE_ID = "n_7f3a"
NODE_KEY = "bm9kZS1rZXktYnl0ZXMtMzItbG9uZy1leGFjdGx5ISE="


@dataclass(frozen=True)
class Received:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        encoded = self.headers.get("content-encoding") == "gzip"
        return json.loads(gzip.decompress(self.body) if encoded else self.body)

    @property
    def bearer(self) -> str:
        return self.headers["authorization"].removeprefix("Bearer ")


class Cut(Exception):
    """Raised by a handler to close the connection."""


Handler = Callable[[Received, asyncio.StreamWriter], Awaitable[bytes]]


def answer(status: int = 200, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    fields = {"Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body


class RawServer:
    """`handler` is given each request and returns the bytes of the answer, or writes some of them itself."""

    def __init__(self, handler: Handler | bytes) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self.port = 0
        self.handler = handler
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(
        self, context: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
    ) -> AsyncIterator[RawServer]:
        server = await asyncio.start_server(self._serve, host, port, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    async def until_received(self, count: int) -> None:
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(lambda: len(self.received) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                request = await _read_request(reader)
                async with self._news:
                    self.received.append(request)
                    self._news.notify_all()
                if isinstance(self.handler, bytes):
                    writer.write(self.handler)
                else:
                    writer.write(await self.handler(request, writer))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError, Cut, asyncio.CancelledError):
            pass  # the client is gone, or the test wants it to be
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()
            self._tasks.discard(task)


async def _read_request(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("utf-8")
    first, *lines = head.split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, target, headers, body)


class Client:
    """A ControlPlane with an identity that a test can change, and what it reported."""

    def __init__(self, api: str, context: ssl.SSLContext | None = None, **options: Any) -> None:
        self.key = SecretStr(NODE_KEY)
        self.node_id = NODE_ID
        self.refused: list[SecretStr] = []
        self.offsets: list[float] = []
        self.plane = ControlPlane(api, context or tls_context(), **options)
        self.plane.use_identity(lambda: self.node_id, lambda: self.key, self.refused.append)
        self.plane.on_clock_offset = self.offsets.append


@contextlib.asynccontextmanager
async def client_of(server: RawServer, prefix: str = "") -> AsyncIterator[Client]:
    client = Client(f"http://127.0.0.1:{server.port}{prefix}")
    try:
        yield client
    finally:
        await client.plane.close()


def run_against(handler: Handler | bytes, test: Callable[[Client, RawServer], Awaitable[None]]) -> None:
    async def main() -> None:
        async with RawServer(handler).running() as server, client_of(server) as client:
            await test(client, server)

    asyncio.run(main())
