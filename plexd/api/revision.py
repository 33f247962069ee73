"""Counts the changes of what programs on this node can read, and lets them wait for the next one."""

from __future__ import annotations

import asyncio


class Revision:
    """`number` starts at 1 with the process (docs/contract/node-api.md §4)."""

    def __init__(self) -> None:
        self.number = 1
        self.is_stopped = False
        self.waiting = 0
        self._moved = asyncio.Event()

    def move(self) -> None:
        """Something changed."""
        self.number += 1
        self._wake()

    def stop(self) -> None:
        """Nobody waits any more: the daemon stops."""
        self.is_stopped = True
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def beyond(self, since: int, seconds: float) -> bool:
        """Whether the number passes `since` within that time."""
        self.waiting += 1
        try:
            async with asyncio.timeout(seconds):
                while self.number <= since and not self.is_stopped:
                    await self._moved.wait()
        except TimeoutError:
            pass
        finally:
            self.waiting -= 1
        return self.number > since
