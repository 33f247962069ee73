"""Delivers drift reports: corrections are on disk before they are sent, and leave the disk once they have arrived.

When the disk refuses a write, corrections are still sent; meanwhile the newest 500 stay in memory.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from plexd.errors import ControlError, Transient
from plexd.log import get_logger
from plexd.mesh.drift import Correction
from plexd.node.state import Node
from plexd.runtime.backoff import Postponement
from plexd.runtime.waiting import set_within

log = get_logger("reconcile")

MAX_UNSENT = 500
LOGGED = 20  # of one cycle: a first state pull may bring ten thousand peers


class ControlPlane(Protocol):
    async def report_drift(self, timestamp: float, corrections: Sequence[Correction]) -> None:
        """Raises ControlError."""


class UnsentDrift(Protocol):
    """Corrections on disk; at most the newest 500 are kept. Both calls block for an fsync and may raise OSError."""

    def load_unsent_corrections(self) -> tuple[Correction, ...]: ...

    def save_unsent_corrections(self, corrections: Sequence[Correction]) -> tuple[Correction, ...]: ...


class DriftReports:
    """Collects the corrections of each cycle and tries to deliver them after each cycle, the oldest first."""

    name = "drift"

    def __init__(
        self,
        control: ControlPlane,
        node: Node,
        unsent: UnsentDrift,
        now: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._control = control
        self._node = node
        self._unsent = unsent
        self._now = now
        self._postponement = Postponement(lambda: node.identity.node_id, uniform)
        self._waiting: tuple[Correction, ...] | None = None  # None: not read from the disk yet
        self._new: list[Correction] = []
        self._added = 0  # to those waiting, since the start
        self._timestamp = 0.0
        self._cycle_ended = asyncio.Event()
        self._disk_lock = asyncio.Lock()
        self._disk_failed = False
        node.on_renewed.append(self._renewed)

    def cycle_ended(self, corrections: Sequence[Correction]) -> None:
        """A cycle, or a pass, has ended with these corrections. Without corrections too, delivery is tried again."""
        for correction in corrections[:LOGGED]:
            log.info("drift corrected", type=correction.type, detail=correction.detail)
        if len(corrections) > LOGGED:
            log.info("more drift corrected", count=len(corrections) - LOGGED)
        if corrections:
            self._timestamp = self._now()
            self._new.extend(corrections)
        self._cycle_ended.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if pause := self._postponement.remaining(loop.time()):
                await set_within(self._cycle_ended, pause)  # corrections of the meantime are only saved
            else:
                await self._cycle_ended.wait()
            self._cycle_ended.clear()
            waiting = await self.save()
            added_before = self._added
            if not waiting or not self._node.accepted.is_set() or self._postponement.remaining(loop.time()):
                continue
            node_id = self._node.identity.node_id
            try:
                await self._control.report_drift(self._timestamp or self._now(), waiting)
            except ControlError as exc:
                kept = isinstance(exc, Transient) or exc.status == 401
                log.warning("drift report failed", error=str(exc), kept=len(waiting) if kept else 0)
                self._postponement.postpone(exc, node_id, loop.time())
                if kept:
                    continue
            added = self._added - added_before  # saved during the request, by a stop: not sent yet
            self._waiting = (self._waiting or ())[-added:] if added else ()
            await self._write(self._waiting)

    def _renewed(self) -> None:
        """The new node was not asked to wait."""
        self._cycle_ended.set()

    async def save(self) -> tuple[Correction, ...]:
        """Save what is not delivered yet; returns all of it, whether or not the disk took it."""
        if self._waiting is None:
            self._waiting = await asyncio.to_thread(self._unsent.load_unsent_corrections)
        if self._new:
            self._waiting = (*self._waiting, *self._new)[-MAX_UNSENT:]
            self._added += len(self._new)
            self._new.clear()
            await self._write(self._waiting)
        return self._waiting

    async def _write(self, corrections: tuple[Correction, ...]) -> None:
        async with self._disk_lock:
            try:
                await asyncio.to_thread(self._unsent.save_unsent_corrections, corrections)
            except OSError as exc:
                if not self._disk_failed:
                    log.error("drift not saved", error=str(exc), next_step="it is sent from memory; check the disk")
                self._disk_failed = True
            else:
                self._disk_failed = False
