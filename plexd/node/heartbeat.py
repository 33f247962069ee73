"""Says that the node is alive, and turns the hints in the answer into wake-ups (docs/contract/lifecycle.md §4).

While it is being found out what a 401 meant, the ticks rest and somebody else decides when to send one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from plexd.errors import ControlError, NotFound, Unauthenticated, WireError
from plexd.log import get_logger
from plexd.node.state import Node
from plexd.runtime.backoff import Postponement
from plexd.runtime.waiting import any_set_within
from plexd.store.identity import Identity

log = get_logger("heartbeat")

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
        self._wanted = asyncio.Event()
        self._released = asyncio.Event()  # from the wait below
        self._sending = asyncio.Lock()  # one at a time
        self._due = float("-inf")  # monotonic
        self._postponement = Postponement(lambda: node.identity.node_id, uniform)
        self._failures = 0
        self._not_found = 0
        node.on_renewed.append(self._renewed)

    def request(self) -> None:
        """Send one at once, or as soon as one may be sent."""
        self._wanted.set()

    async def run(self) -> None:
        suspected = self._node.suspected
        while True:
            await self._node.settled.wait()
            await any_set_within(_until(self._due), suspected, self._wanted)
            await any_set_within(self._remaining(), suspected, self._released)
            self._released.clear()
            if not suspected.is_set():
                async with self._sending:
                    await self._send()

    async def probe(self) -> bool | None:
        """Send one, whatever the ticks do; whether the node is accepted, None when the answer does not say."""
        await asyncio.sleep(self._remaining())
        async with self._sending:
            # a tick that was still under way may have answered the question
            return self._node.settled.is_set() or await self._send()

    async def _send(self) -> bool | None:
        """What the answer says of the node, the node is told."""
        self._wanted.clear()
        started = asyncio.get_running_loop().time()
        try:
            return await self._exchange()
        finally:
            # ticks that came while the request was running are skipped
            interval = self.interval * self._uniform(0.9, 1.1)
            now = asyncio.get_running_loop().time()
            self._due = now + interval - (now - started) % interval

    async def _exchange(self) -> bool | None:
        identity = self._node.identity
        try:
            hints = await self._beat(min(LIMIT_SECONDS, self.interval))
        except Unauthenticated:
            self._not_found = 0
            return self._refused(identity)
        except NotFound as exc:
            self._not_found += 1
            self._failed(exc)
            return self._refused(identity) if self._not_found >= NOT_FOUND_LIMIT else None
        except (ControlError, WireError) as exc:
            self._not_found = 0
            self._failed(exc)
            if isinstance(exc, ControlError):
                self._postponement.postpone(exc, identity.node_id, asyncio.get_running_loop().time())
            return None
        self._node.connection.heartbeat_sent(True)
        self._failures = self._not_found = 0
        self._node.accept(identity.node_key)
        # a flag set before the last rotation was finished asks for what has been done
        if hints.rotate_keys and self._node.identity.private_key == identity.private_key:
            self._request_rotation("heartbeat")
        if hints.reconcile:
            self._request_reconcile("heartbeat")
        return True

    def _refused(self, identity: Identity) -> bool:
        self._node.connection.heartbeat_sent(False)
        self._node.suspect(identity.node_key)
        return False

    def _failed(self, exc: ControlError | WireError) -> None:
        self._node.connection.heartbeat_sent(False)
        self._failures += 1
        if self._failures == 1 or self._failures % 10 == 0:
            log.warning("heartbeat failed", error=str(exc), failures=self._failures)

    def _remaining(self) -> float:
        return self._postponement.remaining(asyncio.get_running_loop().time())

    def _renewed(self) -> None:
        """The new node is alive, and says so at once."""
        self._not_found = 0
        self._none_before = float("-inf")  # another node was asked to wait
        self._released.set()
        self.request()


def _until(moment: float) -> float:
    """Seconds from now, none when it is over."""
    return max(0.0, moment - asyncio.get_running_loop().time())
