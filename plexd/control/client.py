"""Every call to the control plane, driven by the table in `plexd.wire.endpoints`.

A call is tried as often as its endpoint's policy says; callers do not try again. It ends in an answer, in one of the
ControlErrors, or, when the answer is JSON but not what the contract says, in a WireError. Neither bodies nor
credentials are ever logged.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

import httpx
from pydantic import SecretStr

from plexd.control.body import PLAIN_REQUEST_BYTES
from plexd.control.exchange import OFF_LOOP_BYTES, Call, Document, Exchanger
from plexd.control.network import open_transport
from plexd.control.retries import retrying
from plexd.errors import NotFound, Rejected, Unauthenticated
from plexd.log import get_logger
from plexd.runtime.backoff import Uniform
from plexd.wire import endpoints, models
from plexd.wire.endpoints import Credential, Endpoint
from plexd.wire.reading import Skipped, read_value
from plexd.wire.values import is_bearer
from plexd.wire.writing import dump

log = get_logger("control")

REQUESTS_AT_ONCE = 8  # one of them is kept for the heartbeat
UNSUPPORTED_SECONDS = 3600.0

_TOKEN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,510}[\x21-\x7e])?")

RETIRE_SECONDS = 60.0  # longer than any call but the download of a program takes

Body = models.Model | Sequence[models.Model]
ModelT = TypeVar("ModelT", bound=models.Model)


async def _retire(transport: httpx.AsyncBaseTransport) -> None:
    try:
        await asyncio.sleep(RETIRE_SECONDS)
    finally:
        await transport.aclose()


class ControlPlane:
    """One client for the life of the process. Before `use_identity` only `register` can be called.

    `api` is the base URL without trailing slash. Raises ConfigError for a proxy in the environment that is not usable.
    """

    def __init__(
        self,
        api: str,
        ssl_context: ssl.SSLContext,
        *,
        uniform: Uniform = random.uniform,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._uniform = uniform

        def open_calls() -> httpx.AsyncBaseTransport:
            return transport or open_transport(
                api, ssl_context, connections=REQUESTS_AT_ONCE, kept_alive=REQUESTS_AT_ONCE
            )

        self._open_calls = open_calls
        calls = open_calls()
        # the stream takes no connection from the calls; two, as the old one may still be closing
        stream = transport or open_transport(api, ssl_context, connections=2, kept_alive=0)
        self._stream = stream
        self._retiring: set[asyncio.Task[None]] = set()
        self._exchanger = Exchanger(api, calls, stream)
        self._slots = asyncio.Semaphore(REQUESTS_AT_ONCE - 1)
        self._heartbeat_slot = asyncio.Semaphore(1)
        self._unsupported_until: dict[str, float] = {}
        self._node_id: Callable[[], str] = str
        self._node_key: Callable[[], SecretStr | None] = lambda: None
        self._on_unauthenticated: Callable[[SecretStr], None] = lambda _: None

    def use_identity(
        self,
        node_id: Callable[[], str],
        node_key: Callable[[], SecretStr | None],
        on_unauthenticated: Callable[[SecretStr], None],
    ) -> None:
        """The first two are asked at every request; the last is told of the node key that was answered with 401."""
        self._node_id, self._node_key, self._on_unauthenticated = node_id, node_key, on_unauthenticated

    @property
    def on_clock_offset(self) -> Callable[[float], None]:
        """Called with seconds, positive when the control plane is ahead, whenever an answer told its time."""
        return self._exchanger.on_clock_offset

    @on_clock_offset.setter
    def on_clock_offset(self, hook: Callable[[float], None]) -> None:
        self._exchanger.on_clock_offset = hook

    def forget_connections(self) -> None:
        """This host's addresses changed, and a connection kept open may lead from one that is gone: calls open new
        ones from now on. Those under way have a minute to end on the old."""
        retired, self._exchanger.calls = self._exchanger.calls, self._open_calls()
        if retired is not self._exchanger.calls:
            task = asyncio.create_task(_retire(retired), name="retire connections")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        retiring = tuple(self._retiring)
        for task in retiring:
            task.cancel()
        await asyncio.gather(*retiring, return_exceptions=True)
        for transport in (self._exchanger.calls, self._stream):
            await transport.aclose()

    # calls with an answer, or with a rule of their own

    async def register(
        self, request: models.RegisterRequest, *, retry_for: float
    ) -> tuple[models.RegisterResponse, tuple[Skipped, ...]]:
        """The token in the request is the credential as well. `retry_for` is in seconds."""
        return await self._ask(models.RegisterResponse, endpoints.REGISTER, request, retry_for=retry_for)

    async def heartbeat(self, request: models.HeartbeatRequest, *, limit: float) -> models.HeartbeatResponse:
        """`limit` is in seconds."""
        answer, _ = await self._ask(models.HeartbeatResponse, endpoints.HEARTBEAT, request, limit=limit)
        return answer

    async def state(self) -> tuple[models.StateResponse, tuple[Skipped, ...]]:
        return await self._ask(models.StateResponse, endpoints.STATE)

    async def report_endpoint(
        self, report: models.EndpointReport
    ) -> tuple[models.EndpointResponse, tuple[Skipped, ...]]:
        return await self._ask(models.EndpointResponse, endpoints.ENDPOINT, report)

    async def rotate_keys(
        self, request: models.KeyRotateRequest
    ) -> tuple[models.KeyRotateResponse, tuple[Skipped, ...]]:
        return await self._ask(models.KeyRotateResponse, endpoints.ROTATE_KEYS, request)

    async def secret(self, key: str) -> models.SecretResponse:
        answer, _ = await self._ask(models.SecretResponse, endpoints.SECRET, key=key)
        return answer

    async def deregister(self, *, retry_for: float | None = None) -> None:
        """A node that the control plane does not know counts as deregistered. `retry_for=0` tries once."""
        try:
            await self.call(endpoints.DEREGISTER, retry_for=retry_for)
        except (NotFound, Rejected) as exc:
            if exc.status not in {404, 410}:
                raise

    async def drift(self, report: models.DriftReport) -> None:
        await self.call(endpoints.DRIFT, report)

    async def put_capabilities(self, payload: models.CapabilitiesPayload) -> None:
        """Tried until it is accepted or refused: cancel it when there is a newer payload."""
        await self.call(endpoints.CAPABILITIES, payload)

    async def ack(self, ack: models.ExecutionAck) -> None:
        await self.call(endpoints.ACK, ack, execution_id=ack.execution_id)

    async def tunnel_closed(self, session_id: str, closed: models.TunnelClosed) -> None:
        await self.call(endpoints.TUNNEL_CLOSED, closed, session_id=session_id)

    async def ping(self) -> None:
        await self.call(endpoints.PING)

    def events(self, last_event_id: str | None) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The event stream, on a connection of its own. Entering and reading raise ControlError.

        Only the connection and the head of the answer have a limit; waiting for bytes ends by cancellation.
        """
        return self._events(last_event_id)

    async def deliver(self, endpoint: Endpoint, batch: bytes) -> int:
        """Post a batch of telemetry, a JSON array, once; how many bytes went over the wire. Raises ControlError."""
        async with self._slots:
            document = await self._attempt(self._prepare(endpoint, None, batch, None, {}))
        return document.sent

    # any call

    async def call(
        self, endpoint: Endpoint, body: Body | None = None, *, retry_for: float | None = None, **parameters: str
    ) -> None:
        """A call whose answer says no more than that it was accepted. `parameters` are those of the path, less node_id.

        An extension that the control plane lacks raises NotFound, and for the next hour without asking it.
        """
        await self._repeat(endpoint, body, None, retry_for, parameters)

    async def _ask(
        self,
        model: type[ModelT],
        endpoint: Endpoint,
        body: Body | None = None,
        *,
        limit: float | None = None,
        retry_for: float | None = None,
        **parameters: str,
    ) -> tuple[ModelT, tuple[Skipped, ...]]:
        """The answer, and the list elements of it that had to be left out."""
        document = await self._repeat(endpoint, body, limit, retry_for, parameters)
        if document.size > OFF_LOOP_BYTES:
            return await asyncio.to_thread(read_value, model, document.value)
        return read_value(model, document.value)

    @asynccontextmanager
    async def _events(self, last_event_id: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        call = self._prepare(endpoints.EVENTS, None, None, None, {})
        try:
            async with self._exchanger.stream(call, last_event_id) as chunks:
                yield chunks
        except Unauthenticated:
            self._on_unauthenticated(call.credential)
            raise

    async def _repeat(
        self,
        endpoint: Endpoint,
        body: Body | None,
        limit: float | None,
        retry_for: float | None,
        parameters: Mapping[str, str],
    ) -> Document:
        until = self._unsupported_until.get(endpoint.name)
        if until is not None and asyncio.get_running_loop().time() < until:
            raise NotFound(f"{endpoint.name}: not supported by the control plane, it said so less than an hour ago")
        token = body.token if isinstance(body, models.RegisterRequest) else None
        raw = None if body is None else dump(body)
        slot = self._heartbeat_slot if endpoint is endpoints.HEARTBEAT else self._slots

        async def attempt() -> Document:
            async with slot:
                # asked for only now: while this waited, the node may have been given another identity
                return await self._attempt(self._prepare(endpoint, token, raw, limit, parameters))

        try:
            document: Document = await retrying(endpoint, self._uniform, retry_for)(attempt)
        except NotFound:
            if endpoint.extension:
                self._unsupported_until[endpoint.name] = asyncio.get_running_loop().time() + UNSUPPORTED_SECONDS
                log.info("call not supported by the control plane", call=endpoint.name, next_try="in an hour")
            raise
        return document

    def _prepare(
        self,
        endpoint: Endpoint,
        token: SecretStr | None,
        raw: bytes | None,
        limit: float | None,
        parameters: Mapping[str, str],
    ) -> Call:
        node = {"node_id": self._node_id()} if "{node_id}" in endpoint.template else {}
        path = endpoint.path(**node, **parameters)
        if endpoint.credential is Credential.BOOTSTRAP_TOKEN:
            credential, usable = token, token is not None and _TOKEN.fullmatch(token.get_secret_value()) is not None
        else:
            credential = self._node_key()
            usable = credential is not None and is_bearer(credential.get_secret_value())
        if credential is None or not usable:
            raise Unauthenticated(
                f"{endpoint.name}: not sent, there is no {endpoint.credential} that fits into a header"
            )
        return Call(endpoint, path, credential, raw, limit or endpoint.limit)

    async def _attempt(self, call: Call) -> Document:
        gzipped = call.raw is not None and (call.endpoint.always_gzip or len(call.raw) > PLAIN_REQUEST_BYTES)
        try:
            try:
                return await self._exchanger.exchange(call, gzipped=gzipped)
            except Rejected as exc:
                if not (gzipped and exc.status == 415):
                    raise
                return await self._exchanger.exchange(call, gzipped=False)
        except Unauthenticated:
            if call.endpoint.credential is Credential.NODE_KEY:
                self._on_unauthenticated(call.credential)
            raise
