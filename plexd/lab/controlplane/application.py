"""The calls of the wire contract over the fleet: authenticates, judges, answers, streams, and notes what arrived."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from plexd.lab.controlplane import requests
from plexd.lab.controlplane.arrivals import Arrival, Arrivals, Credential
from plexd.lab.controlplane.delivery import Answer, Exchange, deliver
from plexd.lab.controlplane.faults import Effect, Fault, FaultPlan
from plexd.lab.controlplane.fleet import Fleet, Node
from plexd.lab.controlplane.refusal import Refusal
from plexd.lab.controlplane.requests import BODY_LIMIT, Body, Route
from plexd.lab.controlplane.stream import Chunk
from plexd.lab.controlplane.telemetry import Telemetry
from plexd.log import get_logger
from plexd.wire import endpoints
from plexd.wire.writing import dump as dump_models

log = get_logger("lab")

KEEPALIVE_SECONDS = 25.0  # an agent gives up after 90 s of silence
_KEEPALIVE = b": keepalive\n\n"
_TOKEN = re.compile(rb'("token"\s*:\s*)"(?:[^"\\]|\\.)*"?')
_MASK = b'"********"'


@dataclass(slots=True)
class _Call:
    """What is known of a request so far; it becomes an arrival whatever becomes of it."""

    method: str
    path: str
    headers: Mapping[str, str]  # lower-case names
    raw: bytes
    route: Route | None = None
    node: Node | None = None
    credential: Credential = "none"
    body: Body | None = None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class _Subscription:
    """A connection's place in the event stream of a node."""

    node: Node
    position: int
    replayed: Sequence[Chunk]
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Application:
    """ASGI. `changed` is called after every request that was handled; `clock` gives Unix seconds."""

    def __init__(
        self,
        fleet: Fleet,
        arrivals: Arrivals,
        faults: FaultPlan,
        *,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.telemetry = Telemetry()
        self.artifacts: dict[tuple[str, str, str], bytes] = {}
        self.keepalive_seconds = KEEPALIVE_SECONDS
        self.retry_milliseconds: int | None = None
        self._fleet = fleet
        self._arrivals = arrivals
        self._faults = faults
        self._changed = changed
        self._clock = clock
        self._followers: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._may_be_plain: set[str] = set()  # endpoints that just refused gzip
        fleet.on_event = self._wake

    def streams(self, node_id: str) -> int:
        """How many connections follow the node's event stream now."""
        return len(self._followers.get(node_id, ()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with suppress(ClientDisconnect):
            raw = await _read(request)
            call = _Call(
                request.method,
                scope["raw_path"].decode("ascii") + ("?" if scope["query_string"] else ""),
                {name: value for name, value in request.headers.items()},  # noqa: C416 - the last of several counts
                raw,
            )
            await self._answer(call, scope, receive, send)

    async def _answer(self, call: _Call, scope: Scope, receive: Receive, send: Send) -> None:
        number, arrived = self._arrivals.next_number(), self._clock()
        error = None
        try:
            answer = self._handle(call)
        except Refusal as refusal:
            error = refusal.reason
            answer = _json(refusal.status, {"error": refusal.reason} | refusal.details)
        if answer.status == 415 and call.route is not None:
            self._may_be_plain.add(call.route.endpoint.name)
        self._changed()
        # from here on the node's events count, even those that come before the head of the answer is sent
        subscription = self._subscribe(call) if error is None else None
        exchange = Exchange(scope, receive, send)
        try:
            await self._arrivals.add(self._arrival(number, arrived, call, answer.status, error))
            if call.fault is not None and call.fault.delay_seconds:
                await exchange.wait(asyncio.sleep(call.fault.delay_seconds))
            if exchange.gone:
                return
            date = {"date": formatdate(self._clock(), usegmt=True)}
            answer = Answer(answer.status, answer.body, date | dict(answer.headers))
            if subscription is not None:
                await self._stream(subscription, answer, exchange, call.fault.effect if call.fault else Effect.NONE)
            else:
                gzip_accepted = "gzip" in call.headers.get("accept-encoding", "")
                await deliver(exchange, answer, call.fault, gzip_accepted=gzip_accepted)
        finally:
            if subscription is not None:
                self._followers[subscription.node.id].discard(subscription.wake)
            await exchange.close()

    # --- judging

    def _handle(self, call: _Call) -> Answer:
        call.route = route = requests.find_route(call.method, call.path)
        endpoint = route.endpoint
        registering = endpoint.credential is endpoints.Credential.BOOTSTRAP_TOKEN
        credential = requests.bearer(call.headers)
        call.credential = "unknown"
        if not registering:
            call.node = self._authenticate(call, credential)
        call.fault = self._faults.take(endpoint.name, call.node.id if call.node else None, partial(_text, call))
        if call.fault is not None and call.fault.replaces_the_control_plane:
            return _substitute(call.fault)
        requests.check_headers(endpoint, call.headers)
        may_be_plain = endpoint.name in self._may_be_plain
        self._may_be_plain.discard(endpoint.name)
        call.body = requests.read_body(endpoint, call.headers, call.raw, may_be_plain=may_be_plain)
        value = call.body.value if call.body else None
        if registering:
            return self._register(call, credential)
        assert call.node is not None  # noqa: S101 - every other endpoint is authenticated above
        if call.body is not None and endpoint in {endpoints.METRICS, endpoints.LOGS, endpoints.AUDIT}:
            self.telemetry.take(call.node.id, endpoint.name, call.body.text)
        return self._dispatch(call.node, route, value)

    def _authenticate(self, call: _Call, credential: str) -> Node:
        if credential in self._fleet.snapshot.tokens:
            call.credential = "bootstrap_token"
            raise Refusal(401, "the bootstrap token is good for registration only")
        node = self._fleet.authenticate(credential)
        call.credential = "node_key"
        call.node = node
        assert call.route is not None  # noqa: S101 - found before
        named = call.route.parameters.get("node_id", node.id)
        if named != node.id:
            raise Refusal(403 if named in self._fleet.nodes else 404, "the node key belongs to another node")
        return node

    def _register(self, call: _Call, credential: str) -> Answer:
        assert call.body is not None  # noqa: S101 - registration has a body
        request = call.body.value
        if request.token.get_secret_value() != credential:
            raise Refusal(400, "token and bearer credential differ")
        call.credential = "bootstrap_token"
        answer = self._fleet.register(
            credential,
            public_key=request.public_key,
            hostname=request.hostname,
            metadata=request.metadata,
            capabilities=json.loads(dump_models(request.capabilities)) if request.capabilities else None,
        )
        call.node = self._fleet.node(answer["node_id"])
        log.info("node registered", node_id=call.node.id, hostname=call.node.hostname, mesh_ip=call.node.mesh_ip)
        return _json(201, answer)

    def _dispatch(self, node: Node, route: Route, value: Any) -> Answer:
        """What each endpoint does with a request that is in order."""
        fleet, parameters = self._fleet, route.parameters
        match route.endpoint:
            case endpoints.EVENTS:
                return Answer(200, headers={"content-type": "text/event-stream", "cache-control": "no-store"})
            case endpoints.HEARTBEAT:
                _same("node_id", value.node_id, node.id)
                return _json(200, fleet.heartbeat(node))
            case endpoints.DEREGISTER:
                fleet.remove(node.id)
                log.info("node deregistered", node_id=node.id, hostname=node.hostname)
                return Answer(204)
            case endpoints.ROTATE_KEYS:
                _same("node_id", value.node_id, node.id)
                return _json(200, fleet.rotate_key(node, value.new_public_key))
            case endpoints.CAPABILITIES:
                node.capabilities = json.loads(dump_models(value))
                return Answer(204)
            case endpoints.ENDPOINT:
                return _json(200, fleet.report_endpoint(node, value.public_endpoint, value.nat_type))
            case endpoints.STATE:
                return _json(200, fleet.state(node))
            case endpoints.SECRET:
                return _json(200, fleet.secret(node, parameters["key"]))
            case endpoints.REPORT:
                entries = [json.loads(dump_models(entry)) for entry in value.entries]
                fleet.sync_reports(node, entries, value.deleted)
                return Answer(204)
            case endpoints.ACK:
                _same("execution_id", value.execution_id, parameters["execution_id"])
                fleet.acknowledge(node, value.execution_id, value.status)
                return Answer(204)
            case endpoints.RESULT:
                _same("execution_id", value.execution_id, parameters["execution_id"])
                fleet.finish(node, value.execution_id, value.status)
                return Answer(204)
            case endpoints.METRICS | endpoints.LOGS | endpoints.AUDIT:
                return Answer(202)
            case endpoints.ARTIFACT:
                content = self.artifacts.get((parameters["version"], parameters["os"], parameters["arch"]))
                if content is None:
                    raise Refusal(404, "there is no such artifact")
                return Answer(200, content, {"content-type": "application/octet-stream"})
            case _:  # drift and the extensions: noted with the arrivals, which is all there is to do
                return Answer(204)

    def _arrival(self, number: int, arrived: float, call: _Call, status: int, error: str | None) -> Arrival:
        kept = {Effect.NONE, Effect.STATUS, Effect.BODY, Effect.OVERSIZED, Effect.GZIP_BOMB}
        answered = call.fault is None or call.fault.effect in kept
        return Arrival(
            number=number,
            time=arrived,
            endpoint=call.route.endpoint.name if call.route else "",
            node_id=call.node.id if call.node else None,
            method=call.method,
            path=call.path,
            headers={name: value for name, value in call.headers.items() if name != "authorization"},
            credential=call.credential,
            text=_text(call),
            size=len(call.raw),
            status=status if answered else None,
            error=error,
            fault=call.fault.effect if call.fault else None,
        )

    # --- the event stream

    def _wake(self, node_id: str) -> None:
        for follower in self._followers.get(node_id, ()):
            follower.set()

    def _subscribe(self, call: _Call) -> _Subscription | None:
        """For a call that is answered with a stream; None for every other."""
        if call.node is None or call.route is None or call.route.endpoint is not endpoints.EVENTS:
            return None
        if call.fault is not None and call.fault.replaces_the_control_plane:
            return None
        stream = self._fleet.stream(call.node.id)
        last_event_id = call.headers.get("last-event-id", "").encode("latin-1").decode(errors="replace")
        subscription = _Subscription(call.node, stream.end, stream.replay(last_event_id) if last_event_id else ())
        self._followers[call.node.id].add(subscription.wake)
        return subscription

    async def _stream(self, subscription: _Subscription, answer: Answer, exchange: Exchange, effect: Effect) -> None:
        if effect is Effect.DISCONNECT:
            await exchange.reset()
            return
        await exchange.head(answer.status, answer.headers)
        if effect is not Effect.END:
            retry = b"retry: %d\n" % self.retry_milliseconds if self.retry_milliseconds is not None else b""
            await exchange.body(b": hello\n" + retry + b"\n", more=True)
            if effect is Effect.CUT:
                await exchange.cut()
                return
            await self._follow(subscription, exchange)
        if not exchange.gone:
            await exchange.body(b"", more=False)

    async def _follow(self, subscription: _Subscription, exchange: Exchange) -> None:
        """Until the stream is ended, the node has left or the connection is gone."""
        node, position, wake = subscription.node, subscription.position, subscription.wake
        stream = self._fleet.stream(node.id)
        for chunk in subscription.replayed:
            await exchange.body(chunk.data, more=True)
        while not exchange.gone and self._fleet.nodes.get(node.id) is node:
            wake.clear()
            chunks, position = stream.since(position), stream.end
            for chunk in chunks:
                if chunk.ends:
                    return
                await exchange.body(chunk.data, more=True)
            await exchange.wait(wake.wait(), self.keepalive_seconds)
            if not wake.is_set() and not exchange.gone:
                await exchange.body(_KEEPALIVE, more=True)


def _json(status: int, value: Mapping[str, Any]) -> Answer:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Answer(status, text.encode(), {"content-type": "application/json"})


def _substitute(fault: Fault) -> Answer:
    status = fault.status if fault.effect is Effect.STATUS else 200
    names = {name.lower() for name in fault.headers}
    default = {} if "content-type" in names or not fault.body else {"content-type": "application/json"}
    return Answer(status, fault.body.encode(), default | {n.lower(): v for n, v in fault.headers.items()})


def _same(name: str, in_body: str, in_path: str) -> None:
    if in_body != in_path:
        raise Refusal(400, f"{name} in the body is not the one of the path or of the node key")


async def _read(request: Request) -> bytes:
    """The body as far as it may matter; what is longer than any body may be is refused later by its length."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= BODY_LIMIT + 1:
            parts.append(part)
    return b"".join(parts) if size <= BODY_LIMIT + 1 else b"\0" * (BODY_LIMIT + 1)


def _text(call: _Call) -> bytes:
    """The body for the record, also of a request that was refused."""
    try:
        text = call.body.text if call.body else requests.decode(call.headers, call.raw)
    except Refusal:
        return b""
    return _TOKEN.sub(rb"\1" + _MASK, text) if call.path == endpoints.REGISTER.template else text
