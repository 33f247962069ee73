"""The cloud's metadata service on a real socket: what it is asked, what it may answer, how long it is waited for."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from plexd.config.models import Token, TokenMetadata
from plexd.control import fetch_token, metadata
from plexd.errors import RegistrationRefused
from plexd.identity.enrolment import TokenSearch
from plexd.store.token import NoToken
from tests.control.rawserver import Cut, Handler, RawServer, Received, answer

pytestmark = pytest.mark.virtual_time

TOKEN = "token-of-the-cloud"
SESSION = "c2Vzc2lvbg=="


def serving(token: bytes = TOKEN.encode(), session: bytes | None = SESSION.encode()) -> Handler:
    """A service that answers with the token to who has the session token, or to everybody without one."""

    async def handle(request: Received, _: Any) -> bytes:
        if request.method == "PUT":
            return answer(405) if session is None else answer(200, session)
        if session is not None and request.headers.get("x-aws-ec2-metadata-token") != session.decode().strip():
            return answer(401)
        return answer(200, token)

    return handle


def fetch(handler: Handler | bytes, **options: Any) -> tuple[str, list[Received]]:
    """What came of it, and what the service was asked."""

    async def main() -> tuple[str, list[Received]]:
        async with RawServer(handler).running() as server:
            config = TokenMetadata.model_validate({"base_url": f"http://127.0.0.1:{server.port}"} | options)
            return await fetch_token(config), server.received

    return asyncio.run(main())


# --- what is asked


def test_session_token_is_fetched_first_and_sent_along() -> None:
    token, (put, get) = fetch(serving())
    assert token == TOKEN
    assert (put.method, put.target) == ("PUT", "/latest/api/token")
    assert put.headers["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"
    assert put.body == b""
    assert (get.method, get.target) == ("GET", "/plexd/bootstrap-token")
    assert get.headers["x-aws-ec2-metadata-token"] == SESSION


def test_without_session_there_is_one_request() -> None:
    token, (get,) = fetch(serving(session=None), session=False)
    assert token == TOKEN
    assert "x-aws-ec2-metadata-token" not in get.headers


def test_configured_path_and_headers_are_used_for_the_get_only() -> None:
    path = "/computeMetadata/v1/x?alt=text&a=b"
    _, (put, get) = fetch(serving(), path=path, headers={"Metadata-Flavor": "Google"})
    assert get.target == path
    assert get.headers["metadata-flavor"] == "Google"
    assert "metadata-flavor" not in put.headers


def test_nothing_says_who_asks() -> None:
    _, asked = fetch(serving())
    expected = {"host", "x-aws-ec2-metadata-token-ttl-seconds", "content-length"}, {"host", "x-aws-ec2-metadata-token"}
    for request, names in zip(asked, expected, strict=True):
        assert set(request.headers) <= names


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetch(serving())[0] == TOKEN


def test_redirect_is_not_followed() -> None:
    token, asked = fetch(answer(302, b"", {"Location": "/elsewhere"}), session=False)
    assert token == ""
    assert [request.target for request in asked] == ["/plexd/bootstrap-token"]


# --- sessions that are none


@pytest.mark.parametrize(
    "session",
    [
        *(answer(status, SESSION.encode()) for status in (201, 302, 400, 403, 404, 405)),
        answer(204),
        *(answer(200, body) for body in (b"", b" \n", b"x" * 513, b"two words", "ü".encode(), b"\x00")),
    ],
)
def test_token_is_asked_for_without_session_where_there_is_none(session: bytes) -> None:
    async def handle(request: Received, _: Any) -> bytes:
        return session if request.method == "PUT" else answer(200, TOKEN.encode())

    token, (_, get) = fetch(handle)
    assert token == TOKEN
    assert "x-aws-ec2-metadata-token" not in get.headers


def test_longest_session_token_is_one() -> None:
    session = b"x" * 512
    _, (_, get) = fetch(serving(session=session))
    assert get.headers["x-aws-ec2-metadata-token"] == session.decode()


def test_session_that_is_never_answered_costs_its_time_limit_and_no_more() -> None:
    """In a container the answer dies on its way: its hop limit is 1."""

    async def handle(request: Received, _: Any) -> bytes:
        if request.method == "PUT":
            await asyncio.Event().wait()
        return answer(200, TOKEN.encode())

    token, asked = fetch(handle, timeout=timedelta(milliseconds=100))
    assert token == TOKEN
    assert [request.method for request in asked] == ["PUT", "GET"]


# --- what is answered


@pytest.mark.parametrize("status", [201, 204, 301, 400, 401, 403, 404, 410, 429])
def test_other_status_is_no_token_and_not_asked_again(status: int) -> None:
    token, asked = fetch(answer(status, TOKEN.encode()), session=False)
    assert token == ""
    assert len(asked) == 1


@pytest.mark.parametrize(("body", "token"), [(b"", ""), (b" \r\n", ""), (b" x y \n", "x y"), (b"~" * 512, "~" * 512)])
def test_white_space_around_the_token_is_not_part_of_it(body: bytes, token: str) -> None:
    assert fetch(answer(200, body), session=False)[0] == token


@pytest.mark.parametrize("size", [513, 5_000_000])
def test_body_of_more_than_512_bytes_is_an_error(size: int) -> None:
    with pytest.raises(RegistrationRefused, match="more than 512 bytes"):
        fetch(answer(200, b"x" * size), session=False)


def test_body_without_end_is_an_error_and_not_read_on() -> None:
    async def pour(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
            await writer.drain()

    with pytest.raises(RegistrationRefused, match="more than 512 bytes"):
        fetch(pour, session=False)


def encoded(text: str) -> bytes:
    return base64.b64encode(text.encode())


@pytest.mark.parametrize(
    ("body", "token"),
    [
        (encoded(TOKEN), TOKEN),
        (encoded(TOKEN) + b"\n", TOKEN),
        (base64.encodebytes(b"y" * 500), "y" * 500),
        (encoded(f" {TOKEN}\n"), TOKEN),
        (b"", ""),
    ],
)
def test_base64_is_decoded_where_it_is_said_to_be_one(body: bytes, token: str) -> None:
    assert fetch(answer(200, body), session=False, base64=True)[0] == token


@pytest.mark.parametrize("body", [b"not base64!", b"QUJ", "ü".encode()])
def test_what_is_not_base64_is_an_error(body: bytes) -> None:
    with pytest.raises(RegistrationRefused, match="base64"):
        fetch(answer(200, body), session=False, base64=True)


def test_base64_of_more_than_1024_bytes_is_an_error() -> None:
    assert len(fetch(answer(200, encoded("x" * 768)), session=False, base64=True)[0]) == 768
    with pytest.raises(RegistrationRefused, match="more than 1024 bytes"):
        fetch(answer(200, encoded("x" * 769)), session=False, base64=True)


# --- a service that comes up late, or not at all


def failing(times: int, failure: bytes | type[Cut], then: bytes) -> Handler:
    left = times

    async def handle(_: Received, __: Any) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            return then
        if isinstance(failure, bytes):
            return failure
        raise failure

    return handle


@pytest.mark.parametrize("status", [500, 502, 503, 599])
def test_failing_service_is_asked_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(metadata, "RETRY_SECONDS", 0.01)
    token, asked = fetch(failing(3, answer(status), answer(200, TOKEN.encode())), session=False)
    assert token == TOKEN
    assert len(asked) == 4


def test_session_is_asked_for_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "RETRY_SECONDS", 0.01)
    token, asked = fetch(failing(2, answer(503), answer(200, b"session")))
    assert token == "session"
    assert [request.method for request in asked] == ["PUT", "PUT", "PUT", "GET"]


def test_service_that_nobody_has_started_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "RETRY_SECONDS", 0.01)

    async def main() -> str:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            port = reserved.getsockname()[1]  # free again, and nobody listens there
        refused = asyncio.Event()

        def note(exc: BaseException) -> BaseException:
            refused.set()
            return exc

        monkeypatch.setattr(metadata, "root_cause", note)
        config = TokenMetadata(enabled=True, base_url=f"http://127.0.0.1:{port}")
        async with asyncio.TaskGroup() as group:
            token = group.create_task(fetch_token(config))
            await refused.wait()
            async with RawServer(serving()).running(port=port):
                return await token

    assert asyncio.run(main()) == TOKEN


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.Response(503)], ids=["refused", "503"])
@pytest.mark.parametrize(
    ("session", "wait", "times"),
    [
        (False, "30s", list(range(0, 31, 2))),
        (False, "5s", [0, 2, 4]),
        (False, "0", [0]),
        (True, "5s", [0, 2, 4, 4]),  # the session took the time, the token is asked for once
    ],
)
async def test_retries_are_2_seconds_apart_and_share_one_time_limit(
    failure: httpx.Response | Exception, session: bool, wait: str, times: list[float]
) -> None:
    asked: list[float] = []

    def fail(_: httpx.Request) -> httpx.Response:
        asked.append(asyncio.get_running_loop().time())
        if isinstance(failure, Exception):
            raise failure
        return failure

    config = TokenMetadata.model_validate({"session": session, "wait": wait})
    assert (await metadata._Inquiry(config, httpx.MockTransport(fail)).token()) == ""
    assert asked == times


@pytest.mark.parametrize(
    "handler", [failing(9, Cut, b""), b"nonsense\r\n\r\n", answer(200, b"x", {"Content-Length": "9"})]
)
def test_broken_answer_is_no_token_and_not_asked_again(handler: Handler | bytes) -> None:
    token, asked = fetch(handler, session=False, timeout=timedelta(milliseconds=200))
    assert token == ""
    assert len(asked) == 1


def test_time_limit_is_for_the_whole_request() -> None:
    async def drip(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    token, asked = fetch(drip, session=False, timeout=timedelta(milliseconds=200))
    assert token == ""
    assert len(asked) == 1


# --- the last of the sources


def search(server: RawServer, file: str, environ: dict[str, str], **options: Any) -> TokenSearch:
    given = {"enabled": True, "base_url": f"http://127.0.0.1:{server.port}", "session": False} | options
    config = Token(file=Path(file), metadata=TokenMetadata.model_validate(given))
    return TokenSearch(lambda: config, environ)


def with_service(body: bytes, test: Callable[[RawServer], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with RawServer(body).running() as server:
            return await test(server)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("environ", "token", "asked"), [({}, TOKEN, 1), ({"PLEXD_BOOTSTRAP_TOKEN": "nearer"}, "nearer", 0)]
)
def test_service_is_asked_after_the_sources_at_hand(environ: Mapping[str, str], token: str, asked: int) -> None:
    async def test(server: RawServer) -> None:
        found = await search(server, "/nowhere/token", dict(environ)).find()
        assert found.value.get_secret_value() == token
        assert found.file is None
        assert len(server.received) == asked

    with_service(answer(200, TOKEN.encode()), test)


def test_service_is_not_asked_unless_it_is_enabled() -> None:
    async def test(server: RawServer) -> None:
        with pytest.raises(NoToken):
            await search(server, "/nowhere/token", {}, enabled=False).find()
        assert server.received == []

    with_service(answer(200, TOKEN.encode()), test)


def test_service_without_a_token_is_named_among_the_places() -> None:
    async def test(server: RawServer) -> None:
        with pytest.raises(NoToken, match=f"127.0.0.1:{server.port}/plexd/bootstrap-token"):
            await search(server, "/nowhere/token", {}).find()

    with_service(answer(404), test)


@pytest.mark.parametrize("body", ["ü".encode(), b"a\x00b", b"a\nb", b"\xff"])
def test_what_is_no_token_is_an_error_that_does_not_show_it(body: bytes) -> None:
    async def test(server: RawServer) -> None:
        with pytest.raises(RegistrationRefused, match="metadata service") as caught:
            await search(server, "/nowhere/token", {}).find()
        assert not isinstance(caught.value, NoToken)
        assert body.decode("utf-8", "replace") not in str(caught.value)

    with_service(answer(200, body), test)


def test_refused_token_of_the_service_is_not_found_again() -> None:
    async def test(server: RawServer) -> None:
        with pytest.raises(NoToken):
            await search(server, "/nowhere/token", {}).find({SecretStr(TOKEN)})

    with_service(answer(200, TOKEN.encode()), test)


def test_no_log_line_holds_token_or_session() -> None:
    with capture_logs() as lines:
        fetch(serving())
    assert lines
    assert TOKEN not in str(lines)
    assert SESSION not in str(lines)
