"""The event stream's connection over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from pydantic import SecretStr

from plexd import errors
from plexd.control import exchange
from tests.control.rawserver import NODE_KEY, Client, Cut, Handler, RawServer, Received, answer, run_against

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def streaming(*parts: bytes, end: bool = False) -> Handler:
    """Sends the parts, then either ends the stream or says nothing more."""

    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD + b"".join(map(chunk, parts)))
        await writer.drain()
        if end:
            return b"0\r\n\r\n"
        await asyncio.Event().wait()
        return b""

    return handler


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in chunks])


def test_stream_is_asked_for_as_the_contract_says() -> None:
    async def test(client: Client, server: RawServer) -> None:
        async with client.plane.events(None) as chunks:
            assert await collect(chunks) == b"data: 1\n\ndata: 2\n\n"
        (request,) = server.received
        assert (request.method, request.target) == ("GET", "/v1/nodes/n_7f3a/events")
        assert request.bearer == NODE_KEY
        assert request.headers["accept"] == "text/event-stream"
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["cache-control"] == "no-cache"
        assert "last-event-id" not in request.headers
        assert "content-type" not in request.headers

    run_against(streaming(b"data: 1\n\n", b"data: 2\n\n", end=True), test)


@pytest.mark.parametrize(
    ("event_id", "sent"),
    [
        ("evt_1", "evt_1"),
        ("a b", "a b"),
        ("ereignis-ü", "ereignis-ü"),
        ("x" * 512, "x" * 512),
        ("", None),
        ("x" * 513, None),
        ("ü" * 257, None),
        (" x", None),
        ("x ", None),
        ("a\x01b", None),
        ("a\r\nX-Evil: 1", None),
        ("a\x7fb", None),
    ],
)
def test_last_event_id_is_sent_when_it_fits_a_header(event_id: str, sent: str | None) -> None:
    async def test(client: Client, server: RawServer) -> None:
        async with client.plane.events(event_id):
            pass
        assert server.received[0].headers.get("last-event-id") == sent
        assert "x-evil" not in server.received[0].headers

    run_against(streaming(end=True), test)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, errors.Misconfigured),
        (401, errors.Unauthenticated),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (429, errors.RateLimited),
        (503, errors.Transient),
    ],
)
def test_refused_stream_raises_on_entering(status: int, kind: type[errors.ControlError]) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(kind) as caught:
            async with client.plane.events(None):
                pytest.fail("entered")
        assert (caught.value.status, caught.value.body) == (status, "why")
        assert caught.value.retry_after == (9.0 if status in {429, 503} else None)
        assert client.refused == ([SecretStr(NODE_KEY)] if status == 401 else [])

    run_against(answer(status, b"why", {"Retry-After": "9"}), test)


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ({}, True),
        ({"Content-Type": "text/event-stream"}, True),
        ({"Content-Type": "Text/Event-Stream ; charset=utf-8"}, True),
        ({"Content-Type": "text/html"}, False),
        ({"Content-Type": "application/json"}, False),
        ({"Content-Type": ""}, False),
        ({"Content-Encoding": "gzip"}, False),
        ({"Content-Encoding": "identity"}, True),
    ],
)
def test_only_an_event_stream_is_one(headers: dict[str, str], accepted: bool) -> None:
    async def test(client: Client, server: RawServer) -> None:
        if accepted:
            async with client.plane.events(None) as chunks:
                assert await collect(chunks) == b":\n"
        else:
            with pytest.raises(errors.Transient):
                async with client.plane.events(None):
                    pytest.fail("entered")

    run_against(answer(200, b":\n", headers), test)


@pytest.mark.parametrize("cut", [lambda: HEAD + b"8\r\ndat", lambda: HEAD + chunk(b"data: 1\n")])
def test_cut_stream_is_a_passing_failure(cut: Callable[[], bytes]) -> None:
    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(cut())
        await writer.drain()
        raise Cut

    async def test(client: Client, server: RawServer) -> None:
        async with client.plane.events(None) as chunks:
            with pytest.raises(errors.Transient):
                await collect(chunks)

    run_against(handler, test)


def test_waiting_for_bytes_has_no_limit_but_can_be_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(exchange, "STREAM_HEAD_SECONDS", 0.1)

    async def test(client: Client, server: RawServer) -> None:
        async with client.plane.events(None) as chunks:
            assert await anext(chunks) == b"data: 1\n"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await anext(chunks)

    run_against(streaming(b"data: 1\n"), test)


def test_answer_that_does_not_begin_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "STREAM_HEAD_SECONDS", 0.1)

    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Transient, match="no answer within"):
            async with client.plane.events(None):
                pytest.fail("entered")

    run_against(handler, test)


async def test_leaving_closes_the_connection() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + chunk(b"data: 1\n\n"))
        assert await reader.read() == b""
        closed.set()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with client.plane.events(None) as chunks:
            await anext(chunks)
        async with asyncio.timeout(5):
            await closed.wait()
        await client.plane.close()


def test_cancelled_reader_closes_the_connection() -> None:
    async def test(client: Client, server: RawServer) -> None:
        async def read() -> None:
            async with client.plane.events(None) as chunks:
                await collect(chunks)

        for count in range(1, 5):  # more than the stream may have connections
            task = asyncio.create_task(read())
            await server.until_received(count)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run_against(streaming(b":\n"), test)


def test_stream_takes_no_slot_from_the_calls() -> None:
    async def handler(request: Received, writer: asyncio.StreamWriter) -> bytes:
        if request.target.endswith("/events"):
            return await streaming(b":\n")(request, writer)
        return answer(200, b"{}")

    async def test(client: Client, server: RawServer) -> None:
        async with client.plane.events(None) as chunks:
            await anext(chunks)
            await asyncio.gather(*(client.plane.state() for _ in range(20)))
        assert server.connections <= 1 + 7

    run_against(handler, test)


def test_large_stream_arrives_whole_and_in_pieces() -> None:
    data = bytes(range(256)) * (4 << 12)

    async def test(client: Client, server: RawServer) -> None:
        async with client.plane.events(None) as chunks:
            parts = [part async for part in chunks]
        assert b"".join(parts) == data
        assert max(map(len, parts)) <= 1 << 16

    run_against(streaming(data, end=True), test)
