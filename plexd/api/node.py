"""Status, peers, health and the delivery of telemetry over HTTP."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from plexd.api.http_server import Response
from plexd.api.routes import Call, Right, Route, answer, refuse


class Overview(Protocol):
    """What there is to tell, as JSON."""

    async def status(self) -> bytes: ...

    async def peers(self) -> bytes: ...

    async def peer(self, name: str) -> bytes | None:
        """One of them, by id or mesh address, with all that is known; None: there is no such peer."""

    async def policies(self) -> bytes: ...

    async def health(self) -> bytes: ...

    def pipeline(self, name: str) -> bytes | None:
        """How `metrics`, `logs` or `audit` are delivered; None before the node is registered."""

    async def not_ready(self) -> str | None:
        """Why the node is not ready, in one word; None when it is."""


def node_routes(overview: Overview) -> tuple[Route, ...]:
    return (
        Route("GET", "/v1/status", Right.READ, _telling(overview.status)),
        Route("GET", "/v1/peers", Right.READ, _telling(overview.peers)),
        Route("GET", "/v1/peers/{key}", Right.READ, _one_peer(overview)),
        Route("GET", "/v1/policies", Right.READ, _telling(overview.policies)),
        Route("GET", "/v1/health", Right.READ, _telling(overview.health)),
        Route("GET", "/v1/metrics/status", Right.READ, _pipeline(overview, "metrics")),
        Route("GET", "/v1/log-status", Right.READ, _pipeline(overview, "logs")),
        Route("GET", "/v1/audit/status", Right.READ, _pipeline(overview, "audit")),
    )


def _one_peer(overview: Overview) -> Callable[[Call], Awaitable[Response]]:
    async def answer(call: Call) -> Response:
        body = await overview.peer(call.key)
        if body is None:
            return refuse(404, "not_found", "there is no such peer")
        return Response(200, body)

    return answer


def _pipeline(overview: Overview, name: str) -> Callable[[Call], Awaitable[Response]]:
    async def answer(_: Call) -> Response:
        body = overview.pipeline(name)
        if body is None:
            return refuse(503, "not_registered", "nothing is delivered before the node is registered")
        return Response(200, body)

    return answer


def probe_routes(overview: Overview) -> tuple[Route, ...]:
    """Liveness and readiness, for anybody: constant bodies, and nothing that names the node."""

    async def is_alive(_: Call) -> Response:
        return Response(200, b'{"status":"ok"}')

    async def is_ready(_: Call) -> Response:
        reason = await overview.not_ready()
        if reason is None:
            return Response(200, b'{"status":"ready"}')
        return Response(503, json.dumps({"status": "not_ready", "reason": reason}).encode())

    return tuple(
        Route(method, path, Right.NONE, answer)
        for path, answer in (("/healthz", is_alive), ("/readyz", is_ready))
        for method in ("GET", "HEAD")
    )


def document_route(routes: Callable[[], Iterable[Route]]) -> Route:
    """The API in words for programs: `routes` are those it describes."""

    async def describe_all(_: Call) -> Response:
        from plexd.api.openapi import describe  # noqa: PLC0415 - only who asks pays

        return answer(describe(routes()))

    return Route("GET", "/v1/openapi.json", Right.READ, describe_all)


def _telling(tell: Callable[[], Awaitable[bytes]]) -> Callable[[Call], Awaitable[Response]]:
    async def answer(_: Call) -> Response:
        return Response(200, await tell())

    return answer
