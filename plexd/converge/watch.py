"""Listens for notifications of the kernel for as long as the daemon runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable


class Watch:
    def __init__(self, name: str, watch: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self._watch = watch

    async def run(self) -> None:
        await self._watch()
