"""Tells the control plane where peers can reach this node, and takes their endpoints from the answer.

The endpoint is the configured one (`nat_traversal.public_endpoint`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from plexd.errors import ControlError, WireError
from plexd.log import get_logger
from plexd.mesh.events import EndpointOffered
from plexd.node import Node

log = get_logger("nat")


class ControlPlane(Protocol):
    async def report_endpoint(self, public_endpoint: str, nat_type: str) -> Sequence[EndpointOffered]:
        """Raises ControlError or WireError."""


class EndpointReport:
    """`refresh_interval` is in seconds, spread by 10 %; `apply_event` brings folded endpoints into the kernel."""

    name = "endpoint"

    def __init__(
        self,
        control: ControlPlane,
        node: Node,
        apply_event: Callable[[], Awaitable[bool]],
        public_endpoint: str,
        refresh_interval: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._control = control
        self._node = node
        self._apply_event = apply_event
        self._public_endpoint = public_endpoint
        self._refresh_interval = refresh_interval
        self._uniform = uniform
        self._failures = 0

    async def run(self) -> None:
        while True:
            await self._node.accepted.wait()
            await self._report()
            await asyncio.sleep(self._refresh_interval * self._uniform(0.9, 1.1))

    async def _report(self) -> None:
        try:
            offers = await self._control.report_endpoint(self._public_endpoint, "none")
        except (ControlError, WireError) as exc:
            self._failures += 1
            if self._failures == 1 or self._failures % 10 == 0:
                log.warning("endpoint report failed", error=str(exc), failures=self._failures)
            return
        self._failures = 0
        changed = [offer.peer_id for offer in offers if self._node.fold(offer)]
        if changed:
            log.info("peer endpoints received", peers=len(changed))
            await self._apply_event()
