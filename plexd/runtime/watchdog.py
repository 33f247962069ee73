"""Tells the service manager that the event loop turns; a blocked loop cannot, which is the point."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from plexd.log import get_logger

log = get_logger("supervisor")

BLOCKED_SECONDS = 30.0


class Watchdog:
    """`interval` is in seconds; a tick that comes more than 30 s late is not reported as life."""

    name = "watchdog"

    def __init__(self, interval: float, ping: Callable[[], object]) -> None:
        self._interval = interval
        self._ping = ping

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._interval
            await asyncio.sleep(self._interval)
            late = loop.time() - due
            if late > BLOCKED_SECONDS:
                log.error("event loop was blocked", seconds=round(late, 1))
            else:
                self._ping()
