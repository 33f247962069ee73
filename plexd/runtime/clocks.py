"""Notices that time went by unseen, in a suspended machine, or that the clock was set.

After either, timers are late or early, peers may have moved, the age of a handshake says little, and the control plane
may have given this node up: whoever goes by one of these listens to `on_gap`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from plexd.log import get_logger

log = get_logger("reconcile")

LOOK_SECONDS = 2.0
SLACK_SECONDS = 2.0  # leap seconds and the steps of a time server at start are below


class Reading(NamedTuple):
    """All three at one moment, in seconds. Only `monotonic` stands still in a suspended machine, only `wall` is set."""

    monotonic: float
    boot: float
    wall: float


def read_clocks() -> Reading:
    return Reading(time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())


def gap(before: Reading, now: Reading) -> str | None:
    """What happened between two readings, None when time just went by."""
    passed = now.boot - before.boot
    suspended = passed - (now.monotonic - before.monotonic)
    if suspended > SLACK_SECONDS:
        return f"resumed after {suspended:.0f} s"
    jump = now.wall - before.wall - passed
    return f"clock set by {jump:+.0f} s" if abs(jump) > SLACK_SECONDS else None


class Clocks:
    """`on_gap` is told what happened, once for each gap."""

    name = "clocks"

    def __init__(self, read: Callable[[], Reading] = read_clocks) -> None:
        self.on_gap: list[Callable[[str], None]] = []
        self._read = read
        self._before = read()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """At once, for who must know before doing what a gap would make wrong."""
        before, self._before = self._before, self._read()
        if (reason := gap(before, self._before)) is not None:
            log.info("time passed unseen", what=reason)
            for listener in self.on_gap:
                listener(reason)
