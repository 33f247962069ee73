"""Keeps the addresses of what is given by name: endpoints of peers, and the control plane itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping

from plexd.errors import Unresolved
from plexd.linux.lookup import look_up
from plexd.log import get_logger
from plexd.mesh.address import Endpoint, HostPort, parse_endpoint
from plexd.mesh.target import names_to_resolve
from plexd.node import Node
from plexd.waiting import set_within

log = get_logger("mesh")

REPEAT_SECONDS = 60.0


class Resolve:
    """Looks names up when they appear and every minute after; writes into `resolved` and asks for a pass on news.

    `control_plane` holds the control plane's addresses once they are known: no route may swallow them.
    """

    name = "resolve"

    def __init__(
        self,
        node: Node,
        resolved: MutableMapping[str, Endpoint],
        control_plane_host: str,
        request_pass: Callable[[str], None],
    ) -> None:
        self.names_changed = asyncio.Event()
        self.control_plane: frozenset[bytes] = frozenset()
        self._control_plane_host = control_plane_host
        self._node = node
        self._resolved = resolved
        self._request_pass = request_pass

    async def run(self) -> None:
        while True:
            self.names_changed.clear()
            await self._look_up_control_plane()
            names = names_to_resolve(self._node.desired)
            for gone in self._resolved.keys() - names:
                del self._resolved[gone]
            found = await asyncio.gather(*(self._look_up(name) for name in names))
            news = {name: endpoint for name, endpoint in zip(names, found, strict=True) if endpoint is not None}
            if any(self._resolved.get(name) != endpoint for name, endpoint in news.items()):
                self._resolved.update(news)
                self._request_pass("endpoint names resolved")
            await set_within(self.names_changed, REPEAT_SECONDS)

    async def _look_up_control_plane(self) -> None:
        found = frozenset(await _addresses(self._control_plane_host))
        if found and found != self.control_plane:
            self.control_plane = found
            self._request_pass("control plane resolved")

    async def _look_up(self, text: str) -> Endpoint | None:
        parsed = parse_endpoint(text)
        assert isinstance(parsed, HostPort)  # noqa: S101 - names_to_resolve yields nothing else
        addresses = await _addresses(parsed.host)
        if not addresses:
            return None
        known = self._resolved.get(text)  # an answer in another order is no news
        return known if known is not None and known.packed in addresses else Endpoint(addresses[0], parsed.port)


async def _addresses(name: str) -> list[bytes]:
    """Empty when the name does not resolve."""
    try:
        return await look_up(name)
    except Unresolved as exc:
        log.warning("name not resolved", name=name, error=str(exc))
        return []
