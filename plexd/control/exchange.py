"""One request and its answer: headers, time limits, compression, and every foreign error made one of ours."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from plexd import __version__
from plexd.control.answer import (
    LONGEST_RETRY_AFTER_SECONDS,
    describe_status,
    error_class,
    parse_http_date,
    parse_retry_after,
)
from plexd.control.body import MAX_ERROR_BYTES, BodyReader, BrokenBody, compress, readable
from plexd.control.clock import ClockOffset
from plexd.control.network import root_cause
from plexd.errors import ControlError, Misconfigured, Transient, WireError
from plexd.log import get_logger
from plexd.masking import MASK
from plexd.wire import endpoints
from plexd.wire.endpoints import AnswerBody, Endpoint
from plexd.wire.reading import load

log = get_logger("control")

CONNECT_SECONDS = 10.0
STREAM_HEAD_SECONDS = 30.0
LEFTOVER_SECONDS = 2.0  # for the text of an error or a body nobody needs: neither may hold up the outcome
LEFTOVER_BYTES = 64 << 10
HEARTBEAT_RETRY_AFTER_SECONDS = 300.0
TLS_LOG_SECONDS = 60.0
OFF_LOOP_BYTES = 64 << 10  # larger bodies are worked on in a thread, so that the event loop does not stall

_ACCEPT = {
    AnswerBody.NOTHING: "application/json",
    AnswerBody.JSON: "application/json",
    AnswerBody.EVENT_STREAM: "text/event-stream",
    AnswerBody.OCTETS: "application/octet-stream",
}
_HEADER_VALUE = re.compile(rb"[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")
MAX_EVENT_ID_BYTES = 512


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked of the control plane; `raw` is the JSON of the request, `limit` the seconds for all of it."""

    endpoint: Endpoint
    path: str
    credential: SecretStr
    raw: bytes | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """The JSON of an answer as `reading.load` returns it, and how many bytes it had. `{}` where no body is needed.

    `sent` is the size of the request's body as it travelled.
    """

    value: object = field(default_factory=dict)
    size: int = 0
    sent: int = 0


@dataclass(slots=True)
class _Traffic:
    """What the debug line of an exchange tells."""

    started: float
    status: int | None = None
    sent: int = 0
    received: int = 0


class Exchanger:
    """Speaks to one origin and to no other: an answer that points elsewhere is an error, and nothing is sent there.

    `calls` carries all but the stream, and may be replaced at any time. `refused` is called with the credential that
    was answered with 401; `on_clock_offset` with seconds, positive when the control plane is ahead.
    """

    def __init__(self, api: str, calls: httpx.AsyncBaseTransport, stream: httpx.AsyncBaseTransport) -> None:
        self.on_clock_offset: Callable[[float], None] = lambda _: None
        self._api = api
        self._host = urlsplit(api).hostname or ""
        self.calls = calls
        self._stream = stream
        self._clock = ClockOffset()
        self._tls_logged_at = float("-inf")
        self._redirect_logged: str | None = None

    async def exchange(self, call: Call, *, gzipped: bool) -> Document:
        """Raises ControlError."""
        content = call.raw
        if content is not None and gzipped:
            content = await asyncio.to_thread(compress, content) if len(content) > OFF_LOOP_BYTES else compress(content)
        headers = _headers(call)
        if content is not None:
            headers["Content-Type"] = b"application/json"
            if gzipped:
                headers["Content-Encoding"] = b"gzip"
        traffic = _Traffic(asyncio.get_running_loop().time(), sent=len(content or b""))
        with self._watched(call, traffic):
            async with asyncio.timeout(call.limit):
                response = await self._send(self.calls, call, headers, content, traffic, None)
                try:
                    await self._check(call, response)
                    if call.endpoint.answer is AnswerBody.NOTHING:
                        traffic.received = await _discard(response)
                        return Document(sent=traffic.sent)
                    body = await _read_body(response, traffic)
                finally:
                    await response.aclose()
            return await _parse(call, body)

    @asynccontextmanager
    async def stream(self, call: Call, last_event_id: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of an event stream. Entering and reading raise ControlError."""
        headers = _headers(call) | {"Cache-Control": b"no-cache"}
        if last_event_id is not None:
            raw = last_event_id.encode("utf-8", "replace")
            if len(raw) <= MAX_EVENT_ID_BYTES and _HEADER_VALUE.fullmatch(raw):
                headers["Last-Event-ID"] = raw
        traffic = _Traffic(asyncio.get_running_loop().time())
        with self._watched(call, traffic):
            response = await self._send(self._stream, call, headers, None, traffic, STREAM_HEAD_SECONDS)
        try:
            await self._check(call, response)
            _check_stream(response)
            async with aclosing(self._chunks(call, response)) as chunks:
                yield chunks
        finally:
            await response.aclose()

    async def _chunks(self, call: Call, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        with self._translated(call.endpoint.name):
            async with aclosing(_raw(response)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _send(
        self,
        transport: httpx.AsyncBaseTransport,
        call: Call,
        headers: Mapping[str, bytes],
        content: bytes | None,
        traffic: _Traffic,
        head_seconds: float | None,
    ) -> httpx.Response:
        """The answer's status and headers; the body is still to come, and the caller closes it."""
        connection = _Connection(head_seconds)
        request = httpx.Request(
            call.endpoint.method,
            self._api + call.path,
            headers=[(name.encode(), value) for name, value in headers.items()],
            content=content,
            extensions={"trace": connection.trace},
        )
        async with connection.limit:
            response = await transport.handle_async_request(request)
        traffic.status = response.status_code
        server_time = parse_http_date(response.headers.get("date", ""))
        if server_time is not None:
            self.on_clock_offset(self._clock.add(server_time, time.time()))
        return response

    async def _check(self, call: Call, response: httpx.Response) -> None:
        """Raises the error that the status stands for; returns on success."""
        status = response.status_code
        failure = error_class(status)
        if failure is None:
            return
        if failure is Misconfigured:
            self._log_redirect(response)
        # the text may repeat what was sent, and beside a secret hold its value
        text = (await _error_text(response)).replace(call.credential.get_secret_value(), MASK)
        body = "" if call.endpoint is endpoints.SECRET else text
        raise failure(
            f"{call.endpoint.name}: the control plane answered {describe_status(status)}",
            status=status,
            retry_after=_retry_after(call.endpoint, response),
            body=body,
        )

    def _log_redirect(self, response: httpx.Response) -> None:
        try:
            target = httpx.URL(self._api).join(response.headers.get("location", "")).host
        except httpx.InvalidURL:
            target = ""
        if target != self._redirect_logged:
            self._redirect_logged = target
            log.error("redirect refused", target=target, next_step="correct the base URL (api)")

    @contextmanager
    def _watched(self, call: Call, traffic: _Traffic) -> Iterator[None]:
        """Errors translated, and one debug line when it is over."""
        error = ""
        try:
            with self._translated(call.endpoint.name):
                yield
        except ControlError as exc:
            error = str(exc)
            raise
        finally:
            log.debug(
                "request finished",
                method=call.endpoint.method,
                path=call.path,
                status=traffic.status,
                duration_seconds=round(asyncio.get_running_loop().time() - traffic.started, 3),
                sent_bytes=traffic.sent,
                received_bytes=traffic.received,
                error=error,
            )

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except BrokenBody as exc:
            raise Transient(f"{name}: {exc}") from exc
        except TimeoutError as exc:
            reason = str(exc) or "no complete answer within the time limit"
            raise Transient(f"{name}: {reason}") from exc
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as exc:
            cause = root_cause(exc)
            if isinstance(cause, ssl.SSLCertVerificationError):
                self._log_verification(cause)
                reason = f"the control plane's certificate is not trusted: {cause.verify_message}"
            else:
                reason = f"connection to the control plane failed: {str(cause) or type(cause).__name__}"
            raise Transient(f"{name}: {reason}") from exc

    def _log_verification(self, cause: ssl.SSLCertVerificationError) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._tls_logged_at >= TLS_LOG_SECONDS:
            self._tls_logged_at = now
            log.error("certificate refused", host=self._host, reason=cause.verify_message)


class _Connection:
    """10 s to connect; once the request is on its way, `head_seconds` for the answer's head, or only the limit around.

    httpx's own limits are for single reads and writes, so a slow peer could stretch them without end.
    """

    def __init__(self, head_seconds: float | None) -> None:
        self._head_seconds = head_seconds
        self._timeout = asyncio.timeout(CONNECT_SECONDS)
        self._close_socket: Callable[[], Awaitable[None]] | None = None
        self._connected = False
        self.limit = self._limit()

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by httpcore at each step. A CONNECT is still part of the way through a proxy."""
        if event == "connection.connect_tcp.complete":
            self._close_socket = info["return_value"].aclose
        if not event.endswith("send_request_headers.started") or info["request"].method == b"CONNECT":
            return
        self._connected = True
        if not self._timeout.expired():
            now = asyncio.get_running_loop().time()
            self._timeout.reschedule(None if self._head_seconds is None else now + self._head_seconds)

    @asynccontextmanager
    async def _limit(self) -> AsyncIterator[None]:
        try:
            async with self._timeout:
                try:
                    yield
                except BaseException:
                    # httpcore forgets the socket when it is cancelled within the TLS handshake
                    if self._close_socket is not None and not self._connected:
                        await self._close_socket()
                    raise
        except TimeoutError as exc:
            if not self._timeout.expired():
                raise
            what, seconds = ("answer", self._head_seconds) if self._connected else ("connection", CONNECT_SECONDS)
            raise TimeoutError(f"no {what} within {seconds:.0f} s") from exc


def _headers(call: Call) -> dict[str, bytes]:
    plain = call.endpoint.answer in {AnswerBody.EVENT_STREAM, AnswerBody.OCTETS}
    return {
        "Authorization": b"Bearer " + call.credential.get_secret_value().encode("ascii"),
        "User-Agent": f"plexd/{__version__}".encode(),
        "Accept": _ACCEPT[call.endpoint.answer].encode(),
        "Accept-Encoding": b"identity" if plain else b"gzip",
    }


def _retry_after(endpoint: Endpoint, response: httpx.Response) -> float | None:
    if response.status_code not in {429, 503}:
        return None
    longest = HEARTBEAT_RETRY_AFTER_SECONDS if endpoint is endpoints.HEARTBEAT else LONGEST_RETRY_AFTER_SECONDS
    server_time = parse_http_date(response.headers.get("date", ""))
    now = time.time() if server_time is None else server_time
    return parse_retry_after(response.headers.get("retry-after", ""), now, longest)


def _check_stream(response: httpx.Response) -> None:
    media_type = response.headers.get("content-type", "text/event-stream").partition(";")[0].strip().lower()
    if media_type != "text/event-stream":
        raise Transient(f"events: the control plane answered with {media_type[:80]!r} instead of an event stream")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Transient("events: the control plane encoded the event stream although it must not")


async def _raw(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    assert isinstance(response.stream, httpx.AsyncByteStream)  # noqa: S101 - of an asynchronous transport
    async for chunk in response.stream:
        yield chunk


async def _read_body(response: httpx.Response, traffic: _Traffic) -> bytes:
    reader = BodyReader(response.headers.get("content-encoding", ""))
    async with aclosing(_raw(response)) as chunks:
        async for chunk in chunks:
            reader.feed(chunk)
            traffic.received = reader.received
    return reader.finish()


async def _error_text(response: httpx.Response) -> str:
    """As much of it as comes in time and can be read; the status already says what happened."""
    try:
        reader = BodyReader(response.headers.get("content-encoding", ""), MAX_ERROR_BYTES)
    except BrokenBody:
        return ""
    with suppress(BrokenBody, TimeoutError, httpx.HTTPError, OSError):
        async with asyncio.timeout(LEFTOVER_SECONDS), aclosing(_raw(response)) as chunks:
            async for chunk in chunks:
                reader.feed(chunk)
    return readable(reader.start())


async def _discard(response: httpx.Response) -> int:
    """Reads a short body to its end, so that the connection can be used again; whatever it holds is ignored."""
    received = 0
    with suppress(TimeoutError, httpx.HTTPError, OSError):
        async with asyncio.timeout(LEFTOVER_SECONDS), aclosing(_raw(response)) as chunks:
            async for chunk in chunks:
                received += len(chunk)
                if received > LEFTOVER_BYTES:
                    break
    return received


async def _parse(call: Call, body: bytes) -> Document:
    if not body:
        if call.endpoint.body_required:
            raise Transient(f"{call.endpoint.name}: the control plane's answer has no body")
        return Document()
    try:
        value = await asyncio.to_thread(load, body) if len(body) > OFF_LOOP_BYTES else load(body)
    except WireError as exc:
        raise Transient(f"{call.endpoint.name}: the control plane's answer is damaged: {exc}") from exc
    return Document(value, len(body))
