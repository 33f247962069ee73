"""HTTP/1.1 for callers on this host: h11 on an asyncio server, so that no slow or silent one holds up the others.

A request is read whole, answered whole, and the connection kept for the next one (node API, section 1.2).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate

import h11

from plexd.linux.unix_socket import Credentials, peer_credentials
from plexd.log import get_logger

log = get_logger("api")

HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
IDLE_SECONDS = 60.0
ANSWER_SECONDS = 30.0  # for the caller to take it
STOP_SECONDS = 4.0  # for running requests at the end; whoever stops the server waits 5
MAX_CONNECTIONS = 128
MAX_HEAD_BYTES = READ_BYTES = 16 << 10  # h11 judges by what it was given without finding an end
MAX_BODY_BYTES = 1 << 20
JSON = "application/json; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    """`path` is without the query, and still percent-encoded."""

    method: str
    path: str
    caller: Credentials
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """`body` is JSON."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class _TooLarge(Exception):
    pass


@dataclass(slots=True, eq=False)
class _Connection:
    """`is_busy` from the first byte of a request to the last of its answer."""

    task: asyncio.Task[None] = field(init=False)
    is_busy: bool = False


Respond = Callable[[Request], Awaitable[Response]]
Refuse = Callable[[int, str, str], Response]


class HttpServer:
    """`respond` answers requests and raises nothing; `refuse` words an error: status, code, sentence."""

    def __init__(self, respond: Respond, refuse: Refuse) -> None:
        self._respond = respond
        self._refuse = refuse
        self._connections: set[_Connection] = set()
        self._is_stopping = False

    async def serve(self, listening: socket.socket) -> None:
        """Serve until cancelled; then accept nobody, let running requests finish for a moment, and close."""
        self._is_stopping = False
        server = await asyncio.start_unix_server(self._accept, sock=listening, limit=READ_BYTES)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._is_stopping = True
            server.close()
            await self._finish()

    async def _finish(self) -> None:
        for connection in self._connections:
            if not connection.is_busy:
                connection.task.cancel()
        tasks = {connection.task for connection in self._connections}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=STOP_SECONDS)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("connection refused", reason="too many at once", limit=MAX_CONNECTIONS)
            writer.transport.abort()
            return
        try:
            caller = peer_credentials(writer.get_extra_info("socket"))
        except OSError as exc:
            log.warning("connection refused", reason="nobody knows who it is", error=str(exc))
            writer.transport.abort()
            return
        writer.transport.set_write_buffer_limits(high=0)  # drained means that the kernel has it all
        connection = _Connection()
        connection.task = asyncio.create_task(self._talk(reader, writer, caller, connection), name="api connection")
        self._connections.add(connection)

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: Credentials, connection: _Connection
    ) -> None:
        try:
            await self._converse(reader, writer, caller, connection)
        except (OSError, TimeoutError) as exc:
            log.debug("connection ended early", error=str(exc) or "too slow")
        finally:
            self._connections.discard(connection)
            writer.transport.abort()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: Credentials, connection: _Connection
    ) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        patience = HEAD_SECONDS  # a new connection is expected to say something
        while not self._is_stopping:
            if not http.trailing_data[0]:
                async with asyncio.timeout(patience):
                    http.receive_data(await reader.read(READ_BYTES))
            connection.is_busy = True
            if not await self._exchange(http, reader, writer, caller):
                return
            connection.is_busy = False
            http.start_next_cycle()
            patience = IDLE_SECONDS

    async def _exchange(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: Credentials
    ) -> bool:
        """One request and its answer; whether the connection can take another."""
        started = time.monotonic()
        method = path = ""
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                head = await _next_event(http, reader)
            if not isinstance(head, h11.Request):
                return False  # the caller is done
            method, path = head.method.decode(), head.target.decode().partition("?")[0]
            if http.they_are_waiting_for_100_continue:
                writer.write(http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read_body(http, reader)
            response = await self._respond(Request(method, path, caller, body))
        except h11.RemoteProtocolError as exc:
            response = self._refuse(exc.error_status_hint, "bad_request", f"this is not HTTP/1.1: {exc}")
        except _TooLarge:
            response = self._refuse(413, "body_too_large", f"a body has at most {MAX_BODY_BYTES} bytes")
        is_last = self._is_stopping or http.their_state is not h11.DONE
        writer.write(_encode(http, response, has_body=method != "HEAD", is_last=is_last))
        async with asyncio.timeout(ANSWER_SECONDS):
            await writer.drain()
        log.debug(
            "request answered",
            method=method,
            path=path,
            status=response.status,
            bytes=len(response.body),
            uid=caller.uid,
            duration_seconds=round(time.monotonic() - started, 4),
        )
        return http.our_state is h11.DONE and http.their_state is h11.DONE


async def _next_event(http: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await reader.read(READ_BYTES))
    return event


async def _read_body(http: h11.Connection, reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while isinstance(event := await _next_event(http, reader), h11.Data):
        body += event.data
        if len(body) > MAX_BODY_BYTES:
            raise _TooLarge
    return bytes(body)


def _encode(http: h11.Connection, response: Response, *, has_body: bool, is_last: bool) -> bytes:
    headers = [
        ("Date", formatdate(usegmt=True)),
        ("Content-Type", JSON),
        ("Content-Length", str(len(response.body))),
        ("Cache-Control", "no-store"),
        *response.headers,
        *([("Connection", "close")] if is_last else []),
    ]
    events = [h11.Response(status_code=response.status, headers=headers), h11.EndOfMessage()]
    if has_body:
        events.insert(1, h11.Data(data=response.body))
    return b"".join(http.send(event) or b"" for event in events)
