"""The node API's routes without a socket: a request in, a response out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from plexd.api.http_server import Request, Response
from plexd.api.revision import Revision
from plexd.api.routes import Dispatcher, Right, Route, refuse
from plexd.api.state import StateRoutes
from plexd.linux.unix_socket import Credentials
from plexd.mesh.desired import DataEntry, Desired
from plexd.node.reports import Reports
from plexd.store.files import DataDirectory
from plexd.store.reports import ReportStore

MORNING = 1_800_000_000.0  # 2027-01-15T08:00:00Z
WORKER = Credentials(4711, 1000, 1000, frozenset())

DESIRED = Desired(
    metadata={"region": "eu-1", "a/b": "slash"},
    data={
        "proxy": DataEntry("proxy", "application/json", '{"retries":3,"ratio":0.10}', 4, "2026-03-02T08:15:30Z"),
        "big": DataEntry("big", "text/plain", "9" * 5000, 1, "2026-03-02T08:15:30Z"),
    },
    secret_refs={"db-pass": 2, "api-key": 1},
)


class Guard:
    """A gate that lets those rights through."""

    def __init__(self, *rights: Right) -> None:
        self.rights = {Right.NONE, *rights}

    async def check(self, request: Request, right: Right) -> Response | None:
        return None if right in self.rights else refuse(403, "access_denied", "no")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def code(self) -> str:
        return str(self.json["code"])


class Desk:
    """Takes requests. Everything is allowed but secrets, unless told otherwise."""

    def __init__(self, routes: Iterable[Route], *rights: Right) -> None:
        self.guard = Guard(*(rights or (Right.READ, Right.REPORT)))
        self._dispatcher = Dispatcher(routes, self.guard)

    async def ask(
        self, method: str, target: str, body: object = None, headers: Iterable[tuple[str, str]] = ()
    ) -> Answer:
        """`body` is sent as it is when it is bytes, else as JSON."""
        path, _, query = target.partition("?")
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        response = await self._dispatcher.respond(Request(method, path, query, tuple(headers), WORKER, content))
        return Answer(response.status, dict(response.headers), response.body.decode())


class Place:
    """A node's state on a real disk, and a desk in front of it."""

    def __init__(self, directory: Path, desired: Desired = DESIRED, *rights: Right) -> None:
        self.directory = DataDirectory(directory / "data")
        self.desired = desired
        self.revision = Revision()
        self.reports = Reports(ReportStore(self.directory), lambda: MORNING)
        self.reports.on_change.append(self.revision.move)
        self.desk = Desk(StateRoutes(lambda: self.desired, self.reports, self.revision).table(), *rights)
        self.ask = self.desk.ask

    def close(self) -> None:
        self.directory.close()


def play(
    directory: Path,
    scene: Callable[[Place], Coroutine[Any, Any, None]],
    desired: Desired = DESIRED,
    *rights: Right,
    run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> None:
    async def main() -> None:
        place = Place(directory, desired, *rights)
        try:
            await scene(place)
        finally:
            place.close()

    run(main())
