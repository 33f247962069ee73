"""The node API: what programs on this host may ask the daemon over its Unix socket, and who may.

Routes are a table; rights come from the credentials of whoever connected, as the kernel tells them.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote

from plexd.errors import ListenerError
from plexd.linux.unix_socket import Credentials, SocketFile, group_id, is_member
from plexd.log import get_logger
from plexd.serving import HttpServer, Request, Response

log = get_logger("api")

GROUP = "plexd"
REOPEN_SECONDS = 60.0


class Overview(Protocol):
    """What there is to tell, as JSON."""

    async def status(self) -> bytes: ...

    async def peers(self) -> bytes: ...

    async def health(self) -> bytes: ...

    async def not_ready(self) -> str | None:
        """Why the node is not ready, in one word; None when it is."""


class Right(Enum):
    """What a caller must be (node API, section 2)."""

    NONE = auto()  # nobody is asked
    READ = auto()  # root, the daemon's own user, a member of the group plexd


class Route(NamedTuple):
    method: str
    path: str
    right: Right
    answer: Callable[[], Awaitable[Response]]


class LocalApi:
    """Serves the socket at `path`; `open` makes it, `run` serves it and removes it at the end."""

    name = "local api"

    def __init__(self, path: Path, overview: Overview) -> None:
        self._path = path
        self._overview = overview
        self._file: SocketFile | None = None
        self._group: int | None = None
        self._server = HttpServer(self._respond, refuse)
        table = (
            Route("GET", "/v1/status", Right.READ, self._status),
            Route("GET", "/v1/peers", Right.READ, self._peers),
            Route("GET", "/v1/health", Right.READ, self._health),
            Route("GET", "/healthz", Right.NONE, self._is_alive),
            Route("GET", "/readyz", Right.NONE, self._is_ready),
        )
        self._routes: dict[tuple[str, ...], dict[str, Route]] = {}
        for route in table:
            self._routes.setdefault(_segments(route.path), {})[route.method] = route

    def open(self) -> None:
        """Make the socket; callers wait until `run`. Raises ListenerError, also when another daemon has it."""
        self._group = group_id(GROUP)
        self._file = SocketFile(self._path, self._group)
        if self._group is None:
            log.warning("socket is for root only", path=str(self._path), reason=f"this host has no group {GROUP}")

    def close(self) -> None:
        """Remove the socket; what is removed already is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None

    async def run(self) -> None:
        while self._file is None:  # a failure took it
            try:
                self.open()
            except ListenerError as exc:  # nothing that a daemon at work should end for
                log.error("socket not opened again", error=str(exc), next_try_seconds=REOPEN_SECONDS)
                await asyncio.sleep(REOPEN_SECONDS)
        try:
            await self._server.serve(self._file.socket)
        finally:
            self.close()

    # requests

    async def _respond(self, request: Request) -> Response:
        methods = self._routes.get(_segments(request.path))
        if methods is None:
            return refuse(404, "not_found", f"there is no {request.path} here")
        route = methods.get(request.method)
        if route is None:
            allowed = ", ".join(sorted(methods))
            return refuse(405, "method_not_allowed", f"{request.path} answers {allowed} only", ("Allow", allowed))
        if not await self._may(request.caller, route.right):
            caller = request.caller
            log.warning("request denied", path=route.path, uid=caller.uid, gid=caller.gid, pid=caller.pid)
            return refuse(403, "access_denied", f"only root and members of the group {GROUP} may ask this")
        try:
            return await route.answer()
        except Exception:
            log.exception("request failed", path=route.path)
            return refuse(500, "internal_error", "this failed inside plexd; its log says why")

    async def _may(self, caller: Credentials, right: Right) -> bool:
        if right is Right.NONE or caller.uid in {0, os.geteuid()}:
            return True
        return self._group is not None and await is_member(caller, self._group)

    # answers

    async def _status(self) -> Response:
        return Response(200, await self._overview.status())

    async def _peers(self) -> Response:
        return Response(200, await self._overview.peers())

    async def _health(self) -> Response:
        return Response(200, await self._overview.health())

    async def _is_alive(self) -> Response:
        return Response(200, b'{"status":"ok"}')

    async def _is_ready(self) -> Response:
        reason = await self._overview.not_ready()
        if reason is None:
            return Response(200, b'{"status":"ready"}')
        return Response(503, json.dumps({"status": "not_ready", "reason": reason}).encode())


def _segments(path: str) -> tuple[str, ...]:
    """Decoded once, and after the split: an encoded slash is part of its segment."""
    return tuple(unquote(segment) for segment in path.split("/"))


def refuse(status: int, code: str, sentence: str, *headers: tuple[str, str]) -> Response:
    return Response(status, json.dumps({"error": sentence, "code": code}).encode(), headers)
