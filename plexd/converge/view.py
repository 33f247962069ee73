"""Looks at the mesh for people, heartbeat and metrics. Nothing here remembers or repairs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from plexd.converge.mesh import Applied, Interface, Table
from plexd.converge.wanted import Wanted
from plexd.errors import KernelError
from plexd.log import get_logger
from plexd.mesh.address import Endpoint
from plexd.mesh.observed import Observed, is_fresh
from plexd.mesh.policy import Resolved
from plexd.mesh.table_reading import Hits, hits
from plexd.mesh.target import Target
from plexd.node.control_calls import MeshStatus

log = get_logger("mesh")

LOOK_SECONDS = 1.0


class View:
    def __init__(
        self, interface: Interface, table: Table, wanted: Wanted, applied: Applied, now: Callable[[], float] = time.time
    ) -> None:
        self._interface = interface
        self._table = table
        self._wanted = wanted
        self._applied = applied
        self._now = now

    @property
    def resolved(self) -> Mapping[str, Endpoint]:
        return self._wanted.resolved

    @property
    def since(self) -> Mapping[str, float]:
        return self._applied.since

    @property
    def policies_applied_at(self) -> float | None:
        return self._applied.policies_applied_at

    async def look(self) -> tuple[Target | None, Observed | None]:
        """What is wanted and what the kernel holds.

        No target while the node has no private key; no look when the kernel refuses one, or takes over a second.
        """
        observed = await self._observe()
        admitted = await self._wanted.preview()
        return admitted.target if admitted is not None else None, observed

    async def look_at_policies(self) -> tuple[Resolved, Mapping[tuple[str, int], Hits] | None]:
        """What the policies mean here, and the packets matched per rule (policy id, number); None while unknown."""
        admitted = await self._wanted.preview()
        if admitted is None:
            return Resolved(), None
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                table = await self._table.read()
        except (KernelError, TimeoutError) as exc:
            log.debug("firewall not looked at", error=str(exc))
            table = None
        return admitted.resolved, hits(table, admitted.resolved.rules) if table is not None else None

    async def status(self) -> MeshStatus | None:
        """A fresh look for the heartbeat; None while there is no interface with a port, or no answer in a second."""
        observed = await self._observe()
        if observed is None or observed.link is None or observed.device is None or not observed.device.listen_port:
            return None  # without a port: the link of a pass that failed
        now = self._now()
        fresh = sum(is_fresh(peer.last_handshake, now) for peer in observed.device.peers.values())
        return MeshStatus(observed.link.name, fresh, observed.device.listen_port)

    async def _observe(self) -> Observed | None:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                return await self._interface.observe()
        except (KernelError, TimeoutError) as exc:
            log.debug("interface not looked at", error=str(exc))
            return None
