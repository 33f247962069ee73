"""Sees to it that new peers, and all peers after a new key of ours, are in touch within a second or two.

It rests while no peer is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

ROUND_SECONDS = 0.2


class Converger(Protocol):
    awaiting: asyncio.Event

    async def try_handshakes_again(self) -> bool:
        """One round; False when it may have left a peer out."""


class Handshakes:
    name = "handshakes"

    def __init__(self, converger: Converger, request_pass: Callable[[str], None]) -> None:
        self._converger = converger
        self._request_pass = request_pass

    async def run(self) -> None:
        while True:
            await self._converger.awaiting.wait()
            await asyncio.sleep(ROUND_SECONDS)
            if not await self._converger.try_handshakes_again():
                self._request_pass("handshakes not tried again")
