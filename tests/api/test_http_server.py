"""HTTP over a real Unix socket: what well-behaved, slow, silent and hostile callers get."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from plexd.api import http_server
from plexd.api.http_server import HttpServer, Limits, Request, Response

LIMITS = Limits()
MAX_BODY_BYTES, MAX_CONNECTIONS = LIMITS.body_bytes, LIMITS.connections
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def refuse(status: int, code: str, sentence: str) -> Response:
    return Response(status, json.dumps({"error": sentence, "code": code}).encode())


async def echo(request: Request) -> Response:
    """What arrived."""
    return Response(
        200,
        json.dumps(
            {
                "method": request.method,
                "path": request.path,
                "query": request.query,
                "tags": request.header("if-match"),
                "uid": request.caller.uid if request.caller is not None else None,
                "body": len(request.body),
            }
        ).encode(),
        (("X-Extra", "yes"),),
    )


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, has_body: bool = True) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers["content-length"])) if has_body else b""
        return int(head[0].split()[1]), headers, body

    async def is_closed(self) -> bool:
        """Waits for the server to hang up; what it still says counts as alive."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


Connect = Callable[[], Awaitable[Client]]


@asynccontextmanager
async def served(
    path: Path,
    respond: http_server.Respond = echo,
    limits: Limits = LIMITS,
    admit: http_server.Admit = http_server.admit_everybody,
) -> AsyncIterator[tuple[Connect, asyncio.Task[None]]]:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(256)
    sock.setblocking(False)
    server = asyncio.create_task(HttpServer(respond, refuse, limits, admit).serve(sock))
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_unix_connection(str(path))))
        return clients[-1]

    try:
        async with asyncio.timeout(60):
            yield connect, server
    finally:
        server.cancel()
        await asyncio.wait([server])
        for client in clients:
            client.writer.close()


def play(
    path: Path,
    scene: Callable[[Connect], Awaitable[None]],
    respond: http_server.Respond = echo,
    limits: Limits = LIMITS,
) -> None:
    async def main() -> None:
        async with served(path / "s", respond, limits) as (connect, _):
            await scene(connect)

    asyncio.run(main())


def test_answer_is_json_that_nobody_stores(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        await client.send(b"GET /v1/x%2Fy?since=3 HTTP/1.1\r\nHost: x\r\nIF-Match: 1\r\nif-match: 2\r\n\r\n")
        status, headers, body = await client.answer()
        assert status == 200
        assert headers["content-type"] == "application/json; charset=utf-8"
        assert headers["cache-control"] == "no-store"
        assert headers["x-extra"] == "yes"
        assert "date" in headers
        assert json.loads(body) == {
            "method": "GET",
            "path": "/v1/x%2Fy",
            "query": "since=3",
            "tags": ["1", "2"],
            "uid": os.geteuid(),
            "body": 0,
        }

    play(tmp_path, scene)


def test_connection_is_kept_also_for_requests_sent_ahead(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        for _ in range(3):
            await client.send(GET)
            assert (await client.answer())[0] == 200
        await client.send(GET * 5)
        for _ in range(5):
            assert (await client.answer())[0] == 200

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"]
)
def test_connection_ends_where_the_caller_wants_it(tmp_path: Path, request_: bytes) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        await client.send(request_)
        assert (await client.answer())[0] == 200
        assert await client.is_closed()

    play(tmp_path, scene)


def test_head_gets_no_body(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        await client.send(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, _ = await client.answer(has_body=False)
        assert status == 200
        assert int(headers["content-length"]) > 0
        await client.send(GET)
        assert (await client.answer())[0] == 200

    play(tmp_path, scene)


@pytest.mark.parametrize("size", [0, 1, 70_000, MAX_BODY_BYTES])
def test_body_up_to_a_mebibyte_is_read(tmp_path: Path, size: int) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        await client.send(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        assert json.loads((await client.answer())[2])["body"] == size

    play(tmp_path, scene)


@pytest.mark.parametrize("framing", [b"Content-Length: %d" % (MAX_BODY_BYTES + 1), b"Transfer-Encoding: chunked"])
def test_larger_body_is_413_and_not_kept(tmp_path: Path, framing: bytes) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        client.writer.write(b"PUT / HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % framing)
        size = MAX_BODY_BYTES + 1
        client.writer.write(b"%x\r\n" % size + bytes(size) if b"chunked" in framing else bytes(size))
        status, headers, body = await client.answer()
        assert (status, json.loads(body)["code"]) == (413, "body_too_large")
        assert headers["connection"] == "close"
        assert await client.is_closed()

    play(tmp_path, scene)


def test_caller_that_waits_for_100_continue_gets_it(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        await client.send(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await client.send(b"abc")
        assert json.loads((await client.answer())[2])["body"] == 3

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
    ],
)
def test_what_is_no_request_is_refused(tmp_path: Path, nonsense: bytes) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        client.writer.write(nonsense)
        status, _, body = await client.answer()
        assert status in {400, 431}
        assert json.loads(body)["code"] == "bad_request"
        assert await client.is_closed()
        other = await connect()
        await other.send(GET)
        assert (await other.answer())[0] == 200

    play(tmp_path, scene)


# time


def test_silent_and_slow_callers_are_cut_off_and_hold_up_nobody(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        silent, half_head, half_body, idle = [await connect() for _ in range(4)]
        await half_head.send(b"GET / HTTP/1.1\r\nHo")
        await half_body.send(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na")
        await idle.send(GET)
        assert (await idle.answer())[0] == 200
        for _ in range(20):
            client = await connect()
            await client.send(GET)
            assert (await client.answer())[0] == 200
        for client in (silent, half_head, half_body, idle):
            assert await client.is_closed()

    play(tmp_path, scene, limits=Limits(head=0.5, body=0.5, idle=0.5))


def test_head_that_trickles_in_is_cut_off_as_well(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        client = await connect()
        unsent = iter(b"GET / HTTP/1.1\r\nX: " + b"y" * 1000)

        async def trickle() -> None:
            for byte in unsent:
                await client.send(bytes([byte]))
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        assert await client.is_closed()
        assert next(unsent, None) is not None
        trickling.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):  # it may have met the closed end
            await trickling

    play(tmp_path, scene, limits=Limits(head=0.3))


def test_caller_that_takes_no_answer_is_cut_off(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def much(_: Request) -> Response:
        asked.set()
        return Response(200, bytes(8 << 20))

    async def scene(connect: Connect) -> None:
        client = await connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # the transport of a socket can
        await client.send(GET)
        await asked.wait()
        (connection,) = [task for task in asyncio.all_tasks() if task.get_name() == "api connection"]
        await asyncio.wait([connection])

    play(tmp_path, scene, much, Limits(answer=0.3))


async def a_mebibyte(_: Request) -> Response:
    return Response(200, bytes(1 << 20))


def connections() -> list[asyncio.Task[None]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "api connection"]


async def ask_and_take_nothing(connect: Connect) -> None:
    """The answer is on its way, and further than the kernel's buffer it does not get."""
    client = await connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # the transport of a socket can
    await client.send(GET)
    sock: socket.socket = client.writer.get_extra_info("socket")
    assert (await asyncio.to_thread(select.select, [sock.fileno()], [], [], 20))[0]


def test_callers_that_take_no_answer_keep_nobody_out(tmp_path: Path) -> None:
    async def respond(request: Request) -> Response:
        return await (a_mebibyte(request) if request.path == "/" else echo(request))

    async def scene(connect: Connect) -> None:
        for _ in range(3):
            await ask_and_take_nothing(connect)
        for _ in range(5):
            client = await connect()
            await client.send(GET.replace(b" / ", b" /echo "))
            assert (await client.answer())[0] == 200

    play(tmp_path, scene, respond, Limits(connections=3, answer=3600))


def test_answers_that_nobody_takes_fill_no_memory(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        for _ in range(20):
            await ask_and_take_nothing(connect)
        while len(held := connections()) > 5:
            await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
        client = await connect()
        await client.send(GET)
        assert len((await client.answer())[2]) == 1 << 20

    play(tmp_path, scene, a_mebibyte, Limits(unsent_bytes=4 << 20, answer=3600))


@pytest.mark.parametrize("expects", [b"", b"Expect: 100-continue\r\n"])
async def test_caller_who_is_refused_is_refused_before_its_body_is_kept(tmp_path: Path, expects: bytes) -> None:
    async def admit(request: Request) -> Response | None:
        assert request.body == b""
        return Response(401, b"{}") if request.path == "/secret" else None

    async with served(tmp_path / "s", admit=admit) as (connect, _):
        client = await connect()
        head = b"PUT /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n" + expects + b"\r\n"
        await client.send(head + (b"" if expects else bytes(70000)))
        assert (await client.answer())[0] == 401
        if expects:
            assert await client.is_closed()
        else:
            await client.send(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab")
            assert (await client.answer())[0] == 200


def test_limits_are_those_of_the_contract() -> None:
    assert (LIMITS.head, LIMITS.body, LIMITS.idle) == (10, 30, 60)
    assert (LIMITS.connections, LIMITS.body_bytes) == (128, 1 << 20)


def test_129th_connection_takes_the_place_of_the_one_that_was_silent_for_longest(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        clients = [await connect() for _ in range(MAX_CONNECTIONS)]
        for client in clients:
            await client.send(GET)
            assert (await client.answer())[0] == 200
        await clients[0].send(GET)
        assert (await clients[0].answer())[0] == 200
        late = await connect()
        await late.send(GET)
        assert (await late.answer())[0] == 200
        assert await clients[1].is_closed()
        for client in (clients[0], clients[2], clients[-1]):
            await client.send(GET)
            assert (await client.answer())[0] == 200

    play(tmp_path, scene)


def test_connection_too_many_is_closed_where_nobody_waits_to_be_heard(tmp_path: Path) -> None:
    release, working = asyncio.Event(), asyncio.Semaphore(0)

    async def slow(request: Request) -> Response:
        working.release()
        await release.wait()
        return await echo(request)

    async def scene(connect: Connect) -> None:
        clients = [await connect() for _ in range(3)]
        for client in clients:
            await client.send(GET)
            await working.acquire()
        with capture_logs() as records:
            assert await (await connect()).is_closed()
        assert [record["event"] for record in records] == ["connection refused"]
        release.set()
        for client in clients:
            assert (await client.answer())[0] == 200

    play(tmp_path, scene, slow, Limits(connections=3))


def test_listener_that_makes_no_room_closes_what_is_too_much(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        clients = [await connect() for _ in range(2)]
        for client in clients:
            await client.send(GET)
            assert (await client.answer())[0] == 200
        assert await (await connect()).is_closed()

    play(tmp_path, scene, limits=Limits(connections=2, makes_room=False))


# callers that leave


def test_caller_that_leaves_has_its_work_cancelled(tmp_path: Path) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def endless(_: Request) -> Response:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    async def scene(connect: Connect) -> None:
        client = await connect()
        await client.send(GET)
        await started.wait()
        client.writer.close()
        await cancelled.wait()

    play(tmp_path, scene, endless)


def test_caller_that_only_says_it_has_said_everything_gets_its_answer(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def slow(request: Request) -> Response:
        await release.wait()
        return await echo(request)

    async def scene(connect: Connect) -> None:
        client = await connect()
        await client.send(GET)
        client.writer.write_eof()
        asyncio.get_running_loop().call_later(0.05, release.set)
        assert (await client.answer())[0] == 200

    play(tmp_path, scene, slow)


def test_answers_without_a_body_have_none(tmp_path: Path) -> None:
    async def nothing(request: Request) -> Response:
        return Response(304 if request.path == "/known" else 204)

    async def scene(connect: Connect) -> None:
        client = await connect()
        for path, expected in ((b"/", 204), (b"/known", 304), (b"/", 204)):
            await client.send(b"DELETE %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            status, headers, _ = await client.answer(has_body=False)
            assert status == expected
            assert not {"content-type", "content-length", "transfer-encoding"} & set(headers)

    play(tmp_path, scene, nothing)


# the end


async def test_stop_lets_a_running_request_finish_and_drops_the_idle(tmp_path: Path) -> None:
    running, release = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> Response:
        if request.path == "/slow":
            running.set()
            await release.wait()
        return await echo(request)

    async with served(tmp_path / "s", slow) as (connect, server):
        busy, idle, silent = await connect(), await connect(), await connect()
        await idle.send(GET)
        await idle.answer()
        await busy.send(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await running.wait()
        server.cancel()
        assert await idle.is_closed()
        assert await silent.is_closed()
        with pytest.raises(ConnectionRefusedError):
            await connect()
        release.set()
        status, headers, _ = await busy.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await busy.is_closed()
        with pytest.raises(asyncio.CancelledError):
            await server


async def test_stop_waits_for_nobody_for_ever(tmp_path: Path) -> None:
    running = asyncio.Event()

    async def stuck(_: Request) -> Response:
        running.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with served(tmp_path / "s", stuck, Limits(stop=0.1)) as (connect, server):
        client = await connect()
        await client.send(GET)
        await running.wait()
        server.cancel()
        await asyncio.wait([server])
        assert await client.is_closed()


def test_caller_that_hangs_up_half_way_harms_nobody(tmp_path: Path) -> None:
    async def scene(connect: Connect) -> None:
        for part in (b"", b"GET", GET, b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"):
            client = await connect()
            await client.send(part)
            client.writer.close()
        client = await connect()
        await client.send(GET)
        assert (await client.answer())[0] == 200

    play(tmp_path, scene)
