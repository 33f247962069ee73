"""A pipeline that is put together anew while the process goes on, because its configuration has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from plexd.telemetry.pipeline import Pipeline


class Renewable:
    """A service. `build` gives the pipeline, None where it is switched off; `retire` is awaited for one that has ended,
    before the next is built. It may be asked to do so again for one that it was interrupted with."""

    def __init__(
        self, name: str, build: Callable[[], Pipeline | None], retire: Callable[[Pipeline], Awaitable[None]]
    ) -> None:
        self.name = name
        self._build = build
        self._retire = retire
        self._pipeline = build()
        self._outdated = asyncio.Event()

    def renew(self) -> None:
        self._outdated.set()

    async def run(self) -> None:
        while True:
            if not self._outdated.is_set():
                await self._run_until_outdated()
            if self._pipeline is not None:
                await self._retire(self._pipeline)
            self._outdated.clear()
            self._pipeline = self._build()

    async def _run_until_outdated(self) -> None:
        outdated = asyncio.create_task(self._outdated.wait(), name=f"{self.name} outdated")
        tasks: set[asyncio.Task[Any]] = {outdated}
        if self._pipeline is not None:
            tasks.add(asyncio.create_task(self._pipeline.run(), name=f"{self.name} running"))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {outdated}:
                task.result()  # it only ends by a failure, which is the supervisor's to see
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
