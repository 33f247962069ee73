"""Puts the node API together: what it serves, to whom, and what it needs of the node once that is registered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from plexd.api.admin import Reload, admin_routes
from plexd.api.http_server import HttpServer, Limits
from plexd.api.listening_sockets import ListeningSocket
from plexd.api.node import Overview, document_route, node_routes, probe_routes
from plexd.api.revision import Revision
from plexd.api.rights import READERS, OpenGate, SocketGate
from plexd.api.routes import Dispatcher, Route, refuse
from plexd.api.secrets import SecretRead, SecretRoutes, Source
from plexd.api.state import StateRoutes
from plexd.api.token import TokenFile, TokenGate
from plexd.config.models import Config
from plexd.config.paths import split_listen
from plexd.linux.tcp_socket import TcpSocket
from plexd.linux.unix_socket import SocketFile
from plexd.log import get_logger
from plexd.mesh.desired import DataEntry, Desired
from plexd.node.report_sync import ReportSync
from plexd.node.reports import Reports
from plexd.node.state import Node
from plexd.runtime.component import Component
from plexd.store.files import DataDirectory
from plexd.store.reports import ReportStore
from plexd.wire.models import SecretResponse

log = get_logger("api")

OVER_TCP = ("/v1/state", "/v1/status")
PROBE_LIMITS = Limits(
    head=5.0, body=5.0, idle=0.0, answer=5.0, stop=1.0, connections=64, head_bytes=8 << 10, makes_room=False
)


class ReportAndSecretCalls(Protocol):
    """The control plane; `node.control_calls.ControlCalls` is the real one. Calls try once and raise ControlError."""

    async def fetch_secret(self, key: str) -> SecretResponse: ...

    async def sync_reports(self, entries: Sequence[DataEntry], deleted: Sequence[str]) -> None: ...


class _Source:
    """Where secrets come from."""

    def __init__(self, node: Node, control_calls: ReportAndSecretCalls) -> None:
        self._node = node
        self.fetch = control_calls.fetch_secret

    def node_secret_key(self) -> str:
        return self._node.identity.node_key.get_secret_value()


class ApiServer:
    """Serves from before the registration; `component` adds what there is to serve for a registered node."""

    def __init__(self, config: Config, directory: DataDirectory, overview: Overview, reload: Reload) -> None:
        self.reports = Reports(ReportStore(directory))
        self.gate = SocketGate()
        self._config = config
        self._overview = overview
        self._reload = reload
        self._request_reconcile: Callable[[str], None] | None = None
        self._token: TokenFile | None = None
        self._node: Node | None = None
        self._cached = Desired()
        self._report_sync: ReportSync | None = None
        self._source: Source | None = None
        self._secrets = SecretRoutes(lambda: self._source)
        self._revision = Revision()
        self.reports.on_change.append(self._revision.move)

    @property
    def on_secret_read(self) -> list[Callable[[SecretRead], Awaitable[None]]]:
        """Told of every attempt of an allowed caller to read a secret; for the audit trail."""
        return self._secrets.on_read

    def listening_sockets(self) -> Sequence[ListeningSocket]:
        """All listeners that are configured. Raises ListenerError when a token is missing."""
        sockets: list[ListeningSocket] = []
        api, health = self._config.node_api, self._config.health
        if health.enabled:
            server = _server(Dispatcher(probe_routes(self._overview), OpenGate()), PROBE_LIMITS)
            sockets.append(
                tcp_listening_socket("health listener", split_listen(health.listen), "health.listen", server)
            )
        if not api.enabled:
            return sockets
        limits = Limits(stop=api.shutdown_timeout.total_seconds())
        if api.http.enabled:
            gate = self._token_gate()
            shared = [route for route in self.routes() if route.path.startswith(OVER_TCP)]
            server = _server(Dispatcher(shared, gate), limits)
            sockets.append(
                tcp_listening_socket("api over tcp", split_listen(api.http.listen), "node_api.http.listen", server)
            )
        return [*sockets, local_listening_socket(api.socket, self.routes(), self.gate, limits)]

    def routes(self) -> tuple[Route, ...]:
        """All there are on the API socket."""
        return (
            *node_routes(self._overview),
            *probe_routes(self._overview),
            *StateRoutes(self._desired, self.reports, self._revision).table(),
            *self._secrets.table(),
            *admin_routes(self._reconcile, self._reload),
            document_route(self.routes),
        )

    def remember(self, desired: Desired) -> None:
        """What the node knew when it ended last: programs read that until the node is registered."""
        self._cached = desired

    def _token_gate(self) -> TokenGate:
        http = self._config.node_api.http
        assert http.token_file is not None  # noqa: S101 - the configuration asks for it
        self._token = TokenFile(http.token_file)
        host, _ = split_listen(http.listen)
        own = f"[{host}]" if ":" in host else host
        return TokenGate(self._token, (own, *http.allowed_hosts), secrets=http.secrets)

    async def read_again(self) -> None:
        """Group ids and the token, which a reload of the configuration reads as well."""
        await asyncio.to_thread(self.gate.look_up_groups)
        if self._token is not None:
            await asyncio.to_thread(self._token.read_again)

    def _reconcile(self) -> bool:
        if self._request_reconcile is None:
            return False
        self._request_reconcile("local api")
        return True

    def component(
        self, node: Node, control_calls: ReportAndSecretCalls, request_reconcile: Callable[[str], None]
    ) -> Component:
        """The node is registered: serve its state and secrets, and deliver reports."""
        self._node = node
        self._request_reconcile = request_reconcile
        self._source = _Source(node, control_calls)
        node.on_entries.append(self._revision.move)
        self._revision.move()
        debounce = self._config.node_api.debounce.total_seconds()
        self._report_sync = ReportSync(control_calls, node, self.reports, debounce)
        return Component(services=(self._report_sync,), stream_connected=(self._report_sync.retry,))

    async def flush(self) -> None:
        """One last attempt to deliver. Raises ControlError."""
        if self._report_sync is not None:
            await self._report_sync.flush()

    def stop(self) -> None:
        """Nothing is written any more, and nobody waits for changes."""
        self._revision.stop()

    def _desired(self) -> Desired:
        return self._node.desired if self._node is not None else self._cached


def local_listening_socket(path: Path, routes: Iterable[Route], gate: SocketGate, limits: Limits) -> ListeningSocket:
    """The Unix socket, for programs on this host; its group is the one whose members may read."""

    def listen() -> SocketFile:
        file = SocketFile(path, gate.readers)
        if gate.readers is None:
            log.warning("socket is for root only", path=str(path), reason=f"this host has no group {READERS}")
        return file

    return ListeningSocket("local api", listen, _server(Dispatcher(routes, gate), limits))


def tcp_listening_socket(name: str, address: tuple[str, int], key: str, server: HttpServer) -> ListeningSocket:
    """`key` names the address in the configuration."""
    return ListeningSocket(name, partial(TcpSocket, address, name, key), server)


def _server(dispatcher: Dispatcher, limits: Limits) -> HttpServer:
    return HttpServer(dispatcher.respond, refuse, limits, dispatcher.admit)
