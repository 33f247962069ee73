"""The agent's own log records as a source, where nobody else collects them (docs/contract/telemetry.md §4.1)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import NamedTuple

from plexd.telemetry.counters import Dropped
from plexd.telemetry.gaps import Reason
from plexd.telemetry.pipeline import Pipeline, SourceQueue
from plexd.telemetry.records import LogEncoder
from plexd.telemetry.severity import NAMES, OF_LEVELS

RING = 2000  # records not yet in the window
SILENT = {"telemetry"}  # components whose records would make more of them


class _Record(NamedTuple):
    microseconds: int
    level: str
    text: str


class OwnLog:
    """`add` is to be told of every record, from any thread."""

    name = "agent"

    def __init__(self, pipeline: Pipeline, form: LogEncoder, unit: str) -> None:
        self._unit = unit
        self._ring: deque[_Record] = deque()
        self._lost = 0
        self._added = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.move(pipeline, form)

    def move(self, pipeline: Pipeline, form: LogEncoder) -> None:
        """From now on it is a source of this pipeline; another one has ended."""
        self._form = form
        self._feed: SourceQueue[None] = pipeline.feed(self.name, lambda _: None)
        self._added.set()

    def add(self, level: str, component: str, text: str) -> None:
        if component in SILENT:
            return
        self._ring.append(_Record(time.time_ns() // 1000, level, text))
        if len(self._ring) > RING:
            self._ring.popleft()
            self._lost += 1
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._added.set)

    async def collect(self) -> None:
        while True:
            await self._added.wait()
            self._added.clear()
            if self._lost:
                lost, self._lost = self._lost, 0
                self._feed.lose(Dropped.OVERFLOW, count=lost)
                await self._feed.gap(Reason.OVERFLOW, lost, None)
            while self._ring:
                record = self._ring[0]
                severity = NAMES[OF_LEVELS.get(record.level, OF_LEVELS["info"])]
                body, cut = self._form.write(record.microseconds, self._unit, record.text, severity)
                await self._feed.put(body, None)
                if self._ring and self._ring[0] is record:  # else it was pushed out meanwhile
                    self._ring.popleft()
                if cut:
                    self._feed.note_truncated()
