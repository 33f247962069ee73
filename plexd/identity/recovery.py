"""Finds out what a 401 meant, and ends a refusal where that can be done (docs/contract/lifecycle.md §5).

One 401 proves nothing: a heartbeat confirms it. While the refusal stands deliveries wait, and the mesh stays as it is;
heartbeats at growing intervals find out whether it is over, and before each of them the node looks for another
identity: one that somebody put on disk, or a bootstrap token to get one with.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from plexd.log import get_logger
from plexd.node.state import Node

log = get_logger("recovery")

CONFIRM_SECONDS = 5.0
FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS = 60.0, 300.0


class Reenrolment(Protocol):
    """Gives the node another identity; when it returns true, the node is settled with it."""

    async def adopt(self) -> bool:
        """Take over what is on disk, if that is another identity than the node's; whether it was."""

    async def register(self) -> bool:
        """Register anew, if there is a token worth a try; whether that succeeded."""


class Recovery:
    """One at a time: whatever else meets a 401 meanwhile waits for its end. `interval` of heartbeats, in seconds."""

    name = "recovery"

    def __init__(
        self,
        node: Node,
        renewal: Reenrolment,
        probe: Callable[[], Awaitable[bool | None]],
        interval: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`probe` sends a heartbeat and tells whether the node is accepted, None when that was not to be learnt."""
        self._node = node
        self._renewal = renewal
        self._probe = probe
        self.interval = interval
        self._uniform = uniform

    async def run(self) -> None:
        while True:
            await self._node.suspected.wait()
            await self._recover()

    async def _recover(self) -> None:
        if await self._renewal.adopt() or not await self._is_refused():
            return
        self._node.refuse()
        for doubled in itertools.count():
            if await self._renewal.adopt() or await self._renewal.register():
                return
            if doubled and await self._probe():
                return
            await asyncio.sleep(min(LONGEST_PROBE_SECONDS, FIRST_PROBE_SECONDS * 2 ** min(doubled, 10)))

    async def _is_refused(self) -> bool:
        """Whether a heartbeat meets the same refusal. As long as none is answered, they keep their ordinary pace."""
        delay = CONFIRM_SECONDS * self._uniform(0.75, 1.25)
        while True:
            await asyncio.sleep(delay)
            accepted = self._node.settled.is_set() or await self._probe()
            if accepted:
                log.warning("identity confirmed after a refusal", next_step="nothing: a passing fault")
            if accepted is not None:
                return not accepted
            delay = self.interval
