"""Says that the node is alive, and turns the hints in the answer into wake-ups.

It is also the probe of a refused identity: any 401 elsewhere asks for a heartbeat that confirms it, and while the
refusal stands, heartbeats at growing intervals find out when it ends (lifecycle contract, sections 4 and 5).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from plexd.errors import ControlError, NotFound, Transient, Unauthenticated, WireError
from plexd.log import get_logger
from plexd.node import Node
from plexd.waiting import set_within

log = get_logger("heartbeat")

CONFIRM_SECONDS = 5.0
PROBE_FIRST_SECONDS = 60.0
PROBE_LAST_SECONDS = 300.0
NOT_FOUND_LIMIT = 3  # 404s in a row that count as a 401
LIMIT_SECONDS = 30.0


class Hints(Protocol):
    """The flags of the answer."""

    @property
    def reconcile(self) -> bool: ...

    @property
    def rotate_keys(self) -> bool: ...


class Beat(Protocol):
    def __call__(self, limit_seconds: float) -> Awaitable[Hints]:
        """Build a heartbeat from the live subsystems and send it. Raises ControlError or WireError."""


class Heartbeat:
    """`interval` is in seconds, spread by 10 %."""

    name = "heartbeat"

    def __init__(
        self,
        beat: Beat,
        node: Node,
        interval: float,
        request_reconcile: Callable[[str], None],
        request_rotation: Callable[[str], None],
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.interval = interval
        self._beat = beat
        self._node = node
        self._request_reconcile = request_reconcile
        self._request_rotation = request_rotation
        self._uniform = uniform
        self._failures = 0
        self._not_found = 0
        self._probe_seconds = PROBE_FIRST_SECONDS

    async def run(self) -> None:
        while True:
            confirming = self._node.suspected.is_set()
            delay = await self._one(confirming=confirming)
            if confirming and self._node.suspected.is_set():  # refused, or nothing was learnt
                await asyncio.sleep(delay)
            elif await set_within(self._node.suspected, delay):
                # a suspicion cuts an ordinary wait short; the confirming beat follows after a moment
                await asyncio.sleep(CONFIRM_SECONDS * self._uniform(0.75, 1.25))

    async def _one(self, *, confirming: bool) -> float:
        """Send one; the seconds to wait before the next."""
        started = asyncio.get_running_loop().time()
        tick = self.interval * self._uniform(0.9, 1.1)
        delay = tick if self._node.accepted.is_set() else self._probe_seconds
        key = self._node.identity.private_key
        try:
            hints = await self._beat(min(LIMIT_SECONDS, self.interval))
        except Unauthenticated:
            self._node.contact.heartbeat_sent(False)
            return self._refused(confirming)
        except NotFound as exc:
            self._node.contact.heartbeat_sent(False)
            self._not_found += 1
            self._log_failure(exc)
            return self._refused(confirming) if self._not_found >= NOT_FOUND_LIMIT else delay
        except (ControlError, WireError) as exc:
            self._node.contact.heartbeat_sent(False)
            self._log_failure(exc)
            if isinstance(exc, Transient) and exc.retry_after is not None:
                return max(delay, exc.retry_after * self._uniform(1.0, 1.25))
            return _rest(delay, started)
        self._node.contact.heartbeat_sent(True)
        self._failures = self._not_found = 0
        self._probe_seconds = PROBE_FIRST_SECONDS
        if confirming:
            log.warning("identity confirmed after a refusal", next_step="nothing: a passing fault")
        self._node.accept()
        # a flag set before the last rotation was finished asks for what has been done
        if hints.rotate_keys and self._node.identity.private_key == key:
            self._request_rotation("heartbeat")
        if hints.reconcile:
            self._request_reconcile("heartbeat")
        return _rest(tick, started)

    def _refused(self, confirming: bool) -> float:
        if self._node.accepted.is_set() and not confirming:
            self._node.suspect(self._node.identity.node_key)
            return 0.0
        self._node.refuse()
        delay = self._probe_seconds
        self._probe_seconds = min(2 * delay, PROBE_LAST_SECONDS)
        return delay

    def _log_failure(self, exc: ControlError | WireError) -> None:
        self._failures += 1
        if self._failures == 1 or self._failures % 10 == 0:
            log.warning("heartbeat failed", error=str(exc), failures=self._failures)


def _rest(interval: float, started: float) -> float:
    """What is left of the interval since `started`; ticks that came while a request was running are skipped."""
    return interval - (asyncio.get_running_loop().time() - started) % interval
