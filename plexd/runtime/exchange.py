"""Exchanges what a service runs for something newly built, while everything else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


async def _nothing_to_retire(_: object) -> None:
    pass


class Exchangeable(Generic[T]):
    """A service that runs what `build` returns, until `exchange` is called; then it builds and runs the next one.

    `build` returns None when there is nothing to run. `run` ends only by a failure, which the supervisor sees. `retire`
    is awaited for what has ended, before the next is built; after an interruption it may be awaited again for the same.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], T | None],
        run: Callable[[T], Awaitable[None]],
        retire: Callable[[T], Awaitable[None]] = _nothing_to_retire,
    ) -> None:
        self.name = name
        self._build = build
        self._run = run
        self._retire = retire
        self._current = build()
        self._outdated = asyncio.Event()

    def exchange(self) -> None:
        self._outdated.set()

    async def run(self) -> None:
        while True:
            if not self._outdated.is_set():
                await self._run_until_outdated()
            if self._current is not None:
                await self._retire(self._current)
            self._outdated.clear()
            self._current = self._build()

    async def _run_until_outdated(self) -> None:
        outdated = asyncio.create_task(self._outdated.wait(), name=f"{self.name} outdated")
        tasks: set[asyncio.Task[Any]] = {outdated}
        if self._current is not None:
            tasks.add(asyncio.ensure_future(self._run(self._current)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {outdated}:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
