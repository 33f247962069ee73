"""Moves peers that do not answer to their next endpoint candidate, every 15 seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

INTERVAL_SECONDS = 15.0


class Fallback:
    """`look_at_clocks` is called before each round, because a round judges peers by the age of their handshakes."""

    name = "fallback"

    def __init__(self, try_next_endpoints: Callable[[], Awaitable[object]], look_at_clocks: Callable[[], None]) -> None:
        self._try_next_endpoints = try_next_endpoints
        self._look_at_clocks = look_at_clocks

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            self._look_at_clocks()
            await self._try_next_endpoints()
