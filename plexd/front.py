"""Puts the node API together: what it serves, to whom, and what it needs of the node once that is registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from plexd.api.node import Overview, node_routes, probe_routes
from plexd.api.revision import Revision
from plexd.api.secrets import SecretRead, SecretRoutes, Source
from plexd.api.state import StateRoutes
from plexd.config.models import Config
from plexd.mesh.desired import Desired
from plexd.node import Node
from plexd.reports import Reports
from plexd.services.listener import Listener
from plexd.services.local_api import LocalApi
from plexd.services.reports import ReportSync
from plexd.store.files import DataDirectory
from plexd.store.reports import ReportStore
from plexd.supervisor import Service
from plexd.uplink import Uplink


class Door(Service, Protocol):
    """A listener: opened before anything else, served by `run`, closed at the very end."""

    def open(self) -> None:
        """Raises ListenerError."""

    def close(self) -> None: ...


class _Source:
    """Where secrets come from."""

    def __init__(self, node: Node, uplink: Uplink) -> None:
        self._node = node
        self.fetch = uplink.fetch_secret

    def node_secret_key(self) -> str:
        return self._node.identity.node_key.get_secret_value()


class Front:
    """Serves from before the registration; `join` says that there is a node to serve for."""

    def __init__(self, config: Config, directory: DataDirectory, overview: Overview) -> None:
        self.reports = Reports(ReportStore(directory))
        self._config = config
        self._overview = overview
        self._node: Node | None = None
        self._report_sync: ReportSync | None = None
        self._source: Source | None = None
        self._secrets = SecretRoutes(lambda: self._source)
        self._revision = Revision()
        self.reports.on_change.append(self._revision.move)

    @property
    def on_secret_read(self) -> list[Callable[[SecretRead], None]]:
        """Told of every attempt of an allowed caller to read a secret; for the audit trail."""
        return self._secrets.on_read

    def doors(self) -> Sequence[Door]:
        api = self._config.node_api
        if not api.enabled:
            return ()
        state = StateRoutes(self._desired, self.reports, self._revision)
        routes = (*node_routes(self._overview), *probe_routes(self._overview), *state.table(), *self._secrets.table())
        return (LocalApi(api.socket, routes, api.shutdown_timeout.total_seconds()),)

    def join(self, node: Node, uplink: Uplink, listener: Listener) -> Sequence[Service]:
        """The node is registered; the services that deliver what was left at the door."""
        self._node = node
        self._source = _Source(node, uplink)
        node.on_entries.append(self._revision.move)
        self._revision.move()
        debounce = self._config.node_api.debounce.total_seconds()
        self._report_sync = ReportSync(uplink, node, self.reports, debounce)
        listener.on_reconnected.append(self._report_sync.retry)
        return (self._report_sync,)

    async def flush(self) -> None:
        """One last attempt to deliver. Raises ControlError."""
        if self._report_sync is not None:
            await self._report_sync.flush()

    def stop(self) -> None:
        """Nothing is written any more, and nobody waits for changes."""
        self._revision.stop()

    def _desired(self) -> Desired:
        return self._node.desired if self._node is not None else Desired()
