"""Every 15 seconds, has peers that cannot be reached try their next endpoint candidate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

INTERVAL_SECONDS = 15.0


class Converger(Protocol):
    async def try_next_endpoints(self) -> None: ...


class Fallback:
    """`look_at_clocks` is called before each round, which judges peers by the age of their handshakes."""

    name = "fallback"

    def __init__(self, converger: Converger, look_at_clocks: Callable[[], None]) -> None:
        self._converger = converger
        self._look_at_clocks = look_at_clocks

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            self._look_at_clocks()
            await self._converger.try_next_endpoints()
