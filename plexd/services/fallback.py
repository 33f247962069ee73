"""Every 15 seconds, has peers that cannot be reached try their next endpoint candidate."""

from __future__ import annotations

import asyncio
from typing import Protocol

INTERVAL_SECONDS = 15.0


class Converger(Protocol):
    async def try_next_endpoints(self) -> None: ...


class Fallback:
    name = "fallback"

    def __init__(self, converger: Converger) -> None:
        self._converger = converger

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            await self._converger.try_next_endpoints()
