"""The whole front door on real sockets, served from a thread: for programs that come as other users or over TCP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self
from unittest import mock

from plexd.api import rights
from plexd.api.assembly import ApiServer, tcp_listening_socket
from plexd.api.http_server import HttpServer, Limits
from plexd.api.listening_sockets import ListeningSocket
from plexd.api.routes import Dispatcher, Right, refuse
from plexd.config.models import Config
from plexd.config.reload import Reloaded
from plexd.errors import ConfigError, NotFound
from plexd.linux.tcp_socket import TcpSocket
from plexd.mesh.desired import DataEntry, Desired
from plexd.node.state import Node
from plexd.runtime.supervisor import Supervisor
from plexd.store.files import DataDirectory
from plexd.wire.models import SecretResponse
from tests.api.asking import DESIRED, Guard
from tests.api.test_secrets import NSK, sealed
from tests.node_harness import make_identity, make_node

READERS, SECRET_READERS = 47011, 47012  # groups that nobody on this host has
TOKEN = "a-token-of-at-least-32-characters"
START_SECONDS = 20.0


class Told:
    """An overview with known answers, and what was asked of the daemon."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.reconciliations: list[str] = []
        self.problems: tuple[str, ...] = ()

    async def status(self) -> bytes:
        return b'{"node_id":"n_self"}'

    async def peers(self) -> bytes:
        return b"[]"

    async def peer(self, name: str) -> bytes | None:
        return json.dumps({"id": name}).encode() if name == "n_9c20" else None

    async def policies(self) -> bytes:
        return b'{"default":"deny","policies":[]}'

    async def health(self) -> bytes:
        return b'{"status":"healthy"}'

    def pipeline(self, name: str) -> bytes | None:
        return json.dumps({"pipeline": name}).encode()

    async def not_ready(self) -> str | None:
        return self.reason

    async def reload(self) -> Reloaded:
        if self.problems:
            raise ConfigError(*self.problems)
        return Reloaded(Config(), ("log_level",), ("api", "mode"))


class Calls:
    """A control plane with one secret, which takes every report."""

    async def fetch_secret(self, key: str) -> SecretResponse:
        if key != "db-pass":
            raise NotFound("no such secret", status=404)
        return SecretResponse.model_validate(sealed(b"s3cr3t!"))

    async def sync_reports(self, entries: Sequence[DataEntry], deleted: Sequence[str]) -> None:
        pass


def port_of(door: ListeningSocket) -> int | None:
    """None for the Unix socket."""
    listening = door._listening
    return int(listening.socket.getsockname()[1]) if isinstance(listening, TcpSocket) else None


class House:
    """A context manager. Groups of the host are those above, None for one that it has not."""

    def __init__(
        self,
        directory: Path,
        groups: dict[str, int | None] | None = None,
        *,
        is_registered: bool = True,
        is_open: bool = False,
        cached: Desired | None = None,
        **settings: Any,
    ) -> None:
        """`is_open`: everything is also served over TCP, to anybody, at the port of "everything"."""
        directory.chmod(0o755)
        self.directory = directory
        self.socket = directory / "api.sock"
        self.told = Told()
        self._groups = {"plexd": READERS, "plexd-secrets": SECRET_READERS} if groups is None else groups
        self._config = Config.model_validate(
            {**settings, "node_api": {"socket": str(self.socket), **settings.get("node_api", {})}}
        )
        self._is_registered = is_registered
        self._is_open = is_open
        self._cached = cached or Desired()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_SECONDS)
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        if self._error is None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_SECONDS)

    def look_up_groups(self) -> None:
        self.api_server.gate.look_up_groups()

    def call(self, function: Callable[[], object]) -> None:
        """Have it called on the loop of the house."""
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(START_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:  # told to whoever waits for the house
            self._error = exc
        self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        directory = DataDirectory(self.directory / "data")
        host = mock.patch.object(rights, "group_id", self._groups.get)
        host.start()
        try:
            self.api_server = api_server = ApiServer(self._config, directory, self.told, self.told.reload)
            self.sockets = [*api_server.listening_sockets()]
            if self._is_open:
                server = HttpServer(Dispatcher(api_server.routes(), Guard(*Right)).respond, refuse, Limits())
                self.sockets.append(tcp_listening_socket("everything", ("127.0.0.1", 0), "", server))
            for listening_socket in self.sockets:
                listening_socket.open()
            self.ports = {each.name: port for each in self.sockets if (port := port_of(each))}
            api_server.remember(self._cached)
            services = api_server.component(*self._member()).services if self._is_registered else ()
            running = asyncio.create_task(Supervisor(lambda _: None).run([*self.sockets, *services]))
            self._ready.set()
            await self._stop.wait()
            api_server.stop()
            running.cancel()
            await asyncio.wait([running])
        finally:
            host.stop()
            directory.close()

    def _member(self) -> tuple[Node, Calls, Callable[[str], None]]:
        self.node = node = make_node(identity=make_identity(node_key=NSK))
        node.desired = replace(DESIRED, peers=node.desired.peers)
        return node, Calls(), self.told.reconciliations.append
