"""Routes as a table: a request finds its route, the gate says whether its caller may, the route answers.

Rights are decided on the route that was found, never on how its path was spelled (docs/contract/node-api.md §1.2 and
§2).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import Enum, auto
from typing import NamedTuple, Protocol
from urllib.parse import unquote

from plexd.api.http_server import Request, Response
from plexd.log import get_logger

log = get_logger("api")

KEY = "{key}"  # the last segment of a path, where it stands for any

Document = Mapping[str, object] | list[Mapping[str, object]]


class Right(Enum):
    """What a caller must be allowed (docs/contract/node-api.md §2)."""

    NONE = auto()  # nobody is asked
    READ = auto()
    REPORT = auto()
    SECRET = auto()
    ADMIN = auto()


class Call(NamedTuple):
    """A request on its route; `key` is the decoded `{key}` of its path, empty without one.

    `may` asks for further rights of the same caller.
    """

    request: Request
    key: str
    may: Callable[[Right], Awaitable[bool]]


class Route(NamedTuple):
    method: str
    path: str
    right: Right
    answer: Callable[[Call], Awaitable[Response]]


class Gate(Protocol):
    """Knows who may what on one listener."""

    async def check(self, request: Request, right: Right) -> Response | None:
        """The refusal, None when the caller may."""


class Dispatcher:
    """Answers requests by the table; `respond` raises nothing."""

    def __init__(self, routes: Iterable[Route], gate: Gate) -> None:
        self._gate = gate
        self._routes: dict[tuple[str, ...], dict[str, Route]] = {}
        self._keyed: dict[tuple[str, ...], dict[str, Route]] = {}  # by what stands before the key
        for route in routes:
            *parent, name = segments = tuple(route.path.split("/"))
            table, path = (self._keyed, tuple(parent)) if name == KEY else (self._routes, segments)
            table.setdefault(path, {})[route.method] = route

    async def admit(self, request: Request) -> Response | None:
        """The refusal of a request by its head alone, None when it may be answered; raises nothing."""
        found = self._find(request)
        return found if isinstance(found, Response) else await self._refusal(request, *found)

    async def respond(self, request: Request) -> Response:
        found = self._find(request)
        if isinstance(found, Response):
            return found
        refusal = await self._refusal(request, *found)
        if refusal is not None:
            return refusal

        async def may(right: Right) -> bool:
            return await self._gate.check(request, right) is None

        route, key = found
        try:
            return await route.answer(Call(request, key, may))
        except Exception:
            log.exception("request failed", path=route.path)
            return _failed()

    async def _refusal(self, request: Request, route: Route, key: str) -> Response | None:
        try:
            refusal = await self._gate.check(request, route.right)
        except Exception:
            log.exception("request failed", path=route.path)
            return _failed()
        if refusal is not None:
            _log_refusal(request, route, refusal, key)
        return refusal

    def _find(self, request: Request) -> tuple[Route, str] | Response:
        """Decoded once, and after the split: an encoded slash is part of its segment."""
        segments = tuple(unquote(segment, errors="surrogateescape") for segment in request.path.split("/"))
        methods, key = self._routes.get(segments), ""
        if methods is None:
            methods, key = self._keyed.get(segments[:-1]), segments[-1]
        if methods is None:
            return refuse(404, "not_found", "there is no such path here")
        if (route := methods.get(request.method)) is None:
            allowed = ", ".join(sorted(methods))
            return refuse(405, "method_not_allowed", f"this path answers {allowed} only", ("Allow", allowed))
        return route, key


def _failed() -> Response:
    return refuse(500, "internal_error", "this failed inside plexd; its log says why")


def _log_refusal(request: Request, route: Route, refusal: Response, key: str) -> None:
    caller = request.caller
    who = {"uid": caller.uid, "gid": caller.gid, "pid": caller.pid} if caller is not None else {}
    named = {"key": key.encode(errors="replace").decode()} if key else {}
    log.warning("request denied", method=route.method, path=route.path, status=refusal.status, **who, **named)


def refuse(status: int, code: str, sentence: str, *headers: tuple[str, str], **members: object) -> Response:
    return Response(status, json.dumps({"error": sentence, "code": code, **members}).encode(), headers)


def answer(document: Document, *headers: tuple[str, str]) -> Response:
    return Response(200, json.dumps(document).encode(), headers)
