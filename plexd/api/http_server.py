"""HTTP/1.1 for callers on this host: h11 on an asyncio server, so that no slow or silent one holds up the others.

A request is read whole, answered whole, and the connection kept for the next one (docs/contract/node-api.md §1.2).
Whoever leaves before the answer has its work cancelled.
"""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from email.utils import formatdate

import h11

from plexd.linux.unix_socket import Credentials, peer_credentials
from plexd.log import get_logger

log = get_logger("api")

READ_BYTES = 16 << 10
JSON = "application/json; charset=utf-8"
BODILESS = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Limits:
    """What a listener grants its callers; times are in seconds.

    `idle` is between two requests, 0 ends the connection after the first; `answer` is for the caller to take it;
    `stop` is what running requests get at the end. Answers that nobody takes hold at most `unsent_bytes` together and
    one more. `makes_room`: the connection that has kept the server waiting for longest goes when one more comes than
    there may be; otherwise the new one is turned away.
    """

    head: float = 10.0
    body: float = 30.0
    idle: float = 60.0
    answer: float = 30.0
    stop: float = 5.0
    connections: int = 128
    head_bytes: int = 16 << 10
    body_bytes: int = 1 << 20
    unsent_bytes: int = 8 << 20
    makes_room: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """`path` is without the query, and still percent-encoded, as `query` is; names of `headers` are in lower case.

    `caller` is None where the kernel knows nobody: over TCP.
    """

    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    caller: Credentials | None
    body: bytes

    def header(self, name: str) -> tuple[str, ...]:
        """Every value that was sent under the lower-case `name`."""
        return tuple(value for known, value in self.headers if known == name)


@dataclass(frozen=True, slots=True)
class Response:
    """`body` is JSON, and empty where the status allows none."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class _TooLarge(Exception):
    pass


@dataclass(slots=True, eq=False)
class _Connection:
    """`is_busy` from the first byte of a request to the last of its answer, which `unsent` bytes wait for.

    `waiting_since` (monotonic): the caller is expected to say or to take something; None while it waits for us.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    caller: Credentials | None
    task: asyncio.Task[None] = field(init=False)
    is_busy: bool = False
    unsent: int = 0
    waiting_since: float | None = field(default_factory=time.monotonic)


Respond = Callable[[Request], Awaitable[Response]]
Admit = Callable[[Request], Awaitable[Response | None]]
Refuse = Callable[[int, str, str], Response]


async def admit_everybody(_: Request) -> Response | None:
    return None


class HttpServer:
    """`respond` answers requests and raises nothing; `refuse` words an error: status, code, sentence.

    `admit` is asked before a body is read, by a request without it, and raises nothing: what is refused by then is
    not kept in memory for anybody.
    """

    def __init__(self, respond: Respond, refuse: Refuse, limits: Limits, admit: Admit = admit_everybody) -> None:
        self._respond = respond
        self._refuse = refuse
        self._limits = limits
        self._admit = admit
        self._connections: set[_Connection] = set()
        self._is_stopping = False

    async def serve(self, listening: socket.socket) -> None:
        """Serve until cancelled; then accept nobody, let running requests finish for a moment, and close."""
        self._is_stopping = False
        start = asyncio.start_unix_server if listening.family == socket.AF_UNIX else asyncio.start_server
        server = await start(self._accept, sock=listening, limit=READ_BYTES)
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
        _, late = await asyncio.wait(tasks, timeout=self._limits.stop)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        try:
            caller = peer_credentials(sock) if sock.family == socket.AF_UNIX else None
        except OSError as exc:
            log.warning("connection refused", reason="nobody knows who it is", error=str(exc))
            writer.transport.abort()
            return
        if len(self._connections) >= self._limits.connections and not self._make_room():
            log.warning("connection refused", reason="too many at once", limit=self._limits.connections)
            writer.transport.abort()
            return
        writer.transport.set_write_buffer_limits(high=0)  # drained means that the kernel has it all
        connection = _Connection(reader, writer, caller)
        connection.task = asyncio.create_task(self._talk(connection), name="api connection")
        self._connections.add(connection)

    def _make_room(self) -> bool:
        """Close the connection that has let us wait for longest: many silent callers must not keep a new one out."""
        return self._limits.makes_room and self._close_longest(self._connections)

    def _close_longest(self, connections: Iterable[_Connection]) -> bool:
        """Of those that let us wait; whether there is one."""
        waiting = [(c.waiting_since, id(c), c) for c in connections if c.waiting_since is not None]
        if not waiting:
            return False
        _, _, longest = min(waiting)
        longest.unsent = 0
        longest.task.cancel()
        self._connections.discard(longest)
        return True

    async def _talk(self, connection: _Connection) -> None:
        try:
            await self._converse(connection)
        except (OSError, TimeoutError) as exc:
            log.debug("connection ended early", error=str(exc) or "too slow")
        finally:
            self._connections.discard(connection)
            connection.writer.transport.abort()
            del connection.task  # or what a cancelled one was sending would lie here until garbage is collected

    async def _converse(self, connection: _Connection) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.head_bytes)
        patience = self._limits.head  # a new connection is expected to say something
        while not self._is_stopping:
            if not http.trailing_data[0]:
                async with asyncio.timeout(patience):
                    http.receive_data(await connection.reader.read(READ_BYTES))
            connection.is_busy = True
            if not await self._exchange(http, connection):
                return
            connection.is_busy = False
            connection.waiting_since = time.monotonic()
            http.start_next_cycle()
            patience = self._limits.idle

    async def _exchange(self, http: h11.Connection, connection: _Connection) -> bool:
        """One request and its answer; whether the connection can take another."""
        started = time.monotonic()
        reader, writer = connection.reader, connection.writer
        method = path = ""
        try:
            async with asyncio.timeout(self._limits.head):
                head = await _next_event(http, reader)
            if not isinstance(head, h11.Request):
                return False  # the caller is done
            if _size_of(head) > self._limits.head_bytes:
                raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
            method, (path, _, query) = head.method.decode(), head.target.decode().partition("?")
            headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers)
            request = Request(method, path, query, headers, connection.caller, b"")
            refusal = await self._admit(request) if _has_body(headers) else None
            if http.they_are_waiting_for_100_continue and refusal is None:
                writer.write(http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            if not http.they_are_waiting_for_100_continue:
                async with asyncio.timeout(self._limits.body):
                    body = await _read_body(http, reader, self._limits.body_bytes, is_kept=refusal is None)
                request = replace(request, body=body)
            connection.waiting_since = None
            response = refusal or await self._answer(http, connection, request)
        except h11.RemoteProtocolError as exc:
            response = self._refuse(exc.error_status_hint, "bad_request", f"this is not HTTP/1.1: {exc}")
        except _TooLarge:
            response = self._refuse(413, "body_too_large", f"a body has at most {self._limits.body_bytes} bytes")
        is_last = self._is_stopping or not self._limits.idle or http.their_state is not h11.DONE
        await self._send(connection, _encode(http, response, has_body=method != "HEAD", is_last=is_last))
        log.debug(
            "request answered",
            method=method,
            path=path,
            status=response.status,
            bytes=len(response.body),
            uid=connection.caller.uid if connection.caller is not None else None,
            duration_seconds=round(time.monotonic() - started, 4),
        )
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    def _make_memory(self, for_whom: _Connection) -> None:
        """Close the connection that has not taken its answer for longest when too much lies here for the others."""
        holding = [each for each in self._connections if each.unsent and each is not for_whom]
        if sum(each.unsent for each in holding) > self._limits.unsent_bytes:
            self._close_longest(holding)

    async def _send(self, connection: _Connection, answer: bytes) -> None:
        connection.unsent, connection.waiting_since = len(answer), time.monotonic()
        connection.writer.write(answer)
        try:
            self._make_memory(connection)
            async with asyncio.timeout(self._limits.answer):
                await connection.writer.drain()
        finally:
            connection.unsent = 0

    async def _answer(self, http: h11.Connection, connection: _Connection, request: Request) -> Response:
        """The response; ConnectionResetError when the caller leaves before there is one."""
        answering = asyncio.ensure_future(self._respond(request))
        hearing = asyncio.create_task(connection.reader.read(READ_BYTES))
        try:
            await asyncio.wait({answering, hearing}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not hearing.result() and _has_left(connection.writer.get_extra_info("socket")):
                raise ConnectionResetError("the caller left before its answer was there")
            response = await answering
        finally:
            for task in (answering, hearing):
                task.cancel()
            await asyncio.wait({answering, hearing})
        if not hearing.cancelled() and (early := hearing.result()):  # the next request
            http.receive_data(early)
        return response


def _has_left(sock: socket.socket) -> bool:
    """After the end of what it sends: whether the caller has closed altogether. Over TCP that cannot be told apart."""
    if sock.family != socket.AF_UNIX:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _size_of(head: h11.Request) -> int:
    return len(head.target) + sum(len(name) + len(value) for name, value in head.headers)


async def _next_event(http: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await reader.read(READ_BYTES))
    return event


def _has_body(headers: Iterable[tuple[str, str]]) -> bool:
    return any(name in {"content-length", "transfer-encoding"} and value != "0" for name, value in headers)


async def _read_body(http: h11.Connection, reader: asyncio.StreamReader, limit: int, *, is_kept: bool) -> bytes:
    """Empty unless `is_kept`: the request behind it can be answered all the same."""
    body, size = bytearray(), 0
    while isinstance(event := await _next_event(http, reader), h11.Data):
        size += len(event.data)
        if size > limit:
            raise _TooLarge
        if is_kept:
            body += event.data
    return bytes(body)


def _encode(http: h11.Connection, response: Response, *, has_body: bool, is_last: bool) -> bytes:
    described = (
        []
        if response.status in BODILESS
        else [
            ("Content-Type", JSON),
            ("Content-Length", str(len(response.body))),
        ]
    )
    headers = [
        ("Date", formatdate(usegmt=True)),
        *described,
        ("Cache-Control", "no-store"),
        *response.headers,
        *([("Connection", "close")] if is_last else []),
    ]
    events = [h11.Response(status_code=response.status, headers=headers), h11.EndOfMessage()]
    if has_body and described:
        events.insert(1, h11.Data(data=response.body))
    return b"".join(http.send(event) or b"" for event in events)
