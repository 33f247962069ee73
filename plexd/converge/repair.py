"""The repair loop: repairs damage when the kernel notifies of it, or when a userspace WireGuard dies.

It works beside the reconcile loop, which may be waiting for the control plane meanwhile. The repairs themselves come
back as notifications; the pass that these start finds nothing to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from plexd.converge.results import PassResult
from plexd.log import get_logger
from plexd.mesh.drift import Correction
from plexd.runtime.waiting import any_set_within

log = get_logger("mesh")

DEBOUNCE_SECONDS = 0.05  # damage seldom comes alone: a deleted link takes addresses and routes along


class Kernel(Protocol):
    """`damaged`: a pass is due at once. `noticed`: one is due, and more is likely to come."""

    @property
    def damaged(self) -> asyncio.Event: ...

    @property
    def noticed(self) -> asyncio.Event: ...


class Converger(Protocol):
    """`deferred` is set by every pass that defers the repair of a flapping object, whoever asked for the pass."""

    @property
    def deferred(self) -> asyncio.Event: ...

    async def repair(self, *, whole: bool, at_once: bool) -> PassResult: ...


class Repair:
    """`after` is set by the first pass: before it, nobody knows what the mesh should be."""

    name = "repair"

    def __init__(
        self,
        kernel: Kernel,
        converger: Converger,
        after: asyncio.Event,
        report: Callable[[Sequence[Correction]], None],
    ) -> None:
        self._kernel = kernel
        self._converger = converger
        self._after = after
        self._report = report

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        kernel, converger = self._kernel, self._converger
        await self._after.wait()
        due: float | None = None
        while True:
            rest = max(DEBOUNCE_SECONDS, due - loop.time()) if due is not None else None
            notified = await any_set_within(rest, kernel.damaged, kernel.noticed, converger.deferred)
            if notified and not kernel.damaged.is_set():
                await asyncio.sleep(DEBOUNCE_SECONDS)
            at_once = kernel.damaged.is_set()
            kernel.damaged.clear()
            kernel.noticed.clear()
            started = loop.time()
            # a flapping object may be a peer, about which nothing notifies
            result = await converger.repair(whole=not notified, at_once=at_once)
            due = result.due
            converger.deferred.clear()  # set by this pass
            if result.corrections:
                log.info("damage repaired", changed=result.changed, duration_seconds=round(loop.time() - started, 3))
                self._report(result.corrections)
