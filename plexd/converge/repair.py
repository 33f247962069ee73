"""The repair loop: damage that the kernel tells of, or that a dying WireGuard program is, is repaired when it happens.

It works beside the reconcile loop, which may be waiting for the control plane meanwhile, and leaves the reporting to
it. What it writes comes back as notifications too; the pass that these wake finds nothing to do, and that is the end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from plexd.converge.passes import PassResult
from plexd.log import get_logger
from plexd.mesh.drift import Correction
from plexd.runtime.backoff import Backoff
from plexd.runtime.waiting import any_set_within

log = get_logger("mesh")

DEBOUNCE_SECONDS = 0.05  # damage seldom comes alone: a deleted link takes addresses and routes along
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 60.0


class Kernel(Protocol):
    """`damaged`: a pass is due at once. `noticed`: one is due, and more is likely to come."""

    @property
    def damaged(self) -> asyncio.Event: ...

    @property
    def noticed(self) -> asyncio.Event: ...


class Converger(Protocol):
    """`contested` is set by every pass that leaves an object for its time, whoever asked for the pass."""

    @property
    def clean(self) -> asyncio.Event: ...

    @property
    def contested(self) -> asyncio.Event: ...

    async def converge(self) -> PassResult: ...

    async def repair(self) -> PassResult: ...


class Repair:
    """`after` is set by the first pass: before it, it is not known what the mesh should be."""

    name = "repair"

    def __init__(
        self,
        kernel: Kernel,
        converger: Converger,
        after: asyncio.Event,
        report: Callable[[Sequence[Correction]], None],
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._kernel = kernel
        self._converger = converger
        self._after = after
        self._report = report
        self._retry = Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, uniform)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        kernel, converger = self._kernel, self._converger
        await self._after.wait()
        due: float | None = None
        while True:
            rest = max(DEBOUNCE_SECONDS, due - loop.time()) if due is not None else None
            told = await any_set_within(rest, kernel.damaged, kernel.noticed, converger.contested)
            if told and not kernel.damaged.is_set():
                await asyncio.sleep(DEBOUNCE_SECONDS)
            kernel.damaged.clear()
            kernel.noticed.clear()
            started = loop.time()
            # what is fought over may be a peer, of which nothing tells
            result = await (converger.repair() if told else converger.converge())
            due = result.due
            converger.contested.clear()  # by this pass
            if result.corrections:
                log.info("damage repaired", changed=result.changed, duration_seconds=round(loop.time() - started, 3))
                self._report(result.corrections)
            if not result.failed:
                self._retry.reset()
                continue
            # what was half done and undone comes back as a notification: without a rest this would go round and round
            await any_set_within(self._retry.next(), kernel.damaged, converger.clean)
