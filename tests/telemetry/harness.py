"""A pipeline on a stage: a control plane that answers as it is told, a source that is fed by hand, a clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plexd.errors import ControlError, Forbidden, NotFound, RateLimited, Rejected, TooLarge, Transient, Unauthenticated
from plexd.telemetry.gaps import Gap
from plexd.telemetry.pipeline import Pipeline, SourceQueue
from plexd.telemetry.records import log_marker, shortened
from plexd.telemetry.window import Limits
from tests.node_harness import lowest, unix_time

LIMITS = Limits(batch_entries=10, batch_bytes=1 << 20, batch_seconds=10.0, entries=100, bytes=16 << 20)


def error(status: int, retry_after: float | None = None) -> ControlError:
    kinds: dict[int, type[ControlError]] = {
        400: Rejected, 401: Unauthenticated, 403: Forbidden, 404: NotFound, 405: NotFound, 413: TooLarge,
        422: Rejected, 429: RateLimited, 501: NotFound,
    }  # fmt: skip
    return kinds.get(status, Transient)(f"status {status}", status=status, retry_after=retry_after)


class LogEncoder:
    def marker(self, gap: Gap) -> bytes | None:
        return log_marker(gap, unix_time(), "host", "plexd.service")

    def shorten(self, body: bytes) -> bytes | None:
        return shortened(body, "message")


@dataclass
class Plane:
    """Takes batches. `judge` answers with the error of a batch, None to take it; `seconds` is how long that takes."""

    judge: Callable[[list[Any]], ControlError | None] = lambda batch: None
    seconds: float = 0.001
    batches: list[list[Any]] = field(default_factory=list)  # all that were sent
    times: list[float] = field(default_factory=list)
    taken: list[Any] = field(default_factory=list)
    at_once: int = 0

    async def send(self, raw: bytes) -> int:
        batch = json.loads(raw)
        self.batches.append(batch)
        self.times.append(asyncio.get_running_loop().time())
        self.at_once += 1
        try:
            assert self.at_once == 1, "more than one request in flight"
            await asyncio.sleep(self.seconds)
            failure = self.judge(batch)
            if failure is not None:
                raise failure
            self.taken += batch
            return len(raw)
        finally:
            self.at_once -= 1

    @property
    def numbers(self) -> list[int]:
        """Of the numbered entries taken, in order."""
        return [entry["n"] for entry in self.taken if "n" in entry]

    @property
    def markers(self) -> list[str]:
        return [entry["message"] for entry in self.taken if "telemetry gap" in str(entry.get("message"))]


class Hand:
    """A source that entries are put into by hand; `settled` notes the positions."""

    def __init__(self, pipeline: Pipeline, name: str = "hand") -> None:
        self.name = name
        self.settled: list[int] = []
        self.feed: SourceQueue[int] = pipeline.feed(name, self.settled.append)
        pipeline.sources.append(self)

    async def collect(self) -> None:
        await asyncio.Event().wait()

    async def put(self, *numbers: int, **members: Any) -> None:
        for number in numbers:
            await self.feed.put(body(number, **members), number)


def body(number: int, **members: Any) -> bytes:
    return json.dumps({"n": number} | members).encode()


@dataclass
class Stage:
    """`now` of pipeline is the loop's time."""

    plane: Plane = field(default_factory=Plane)
    limits: Limits = LIMITS
    keeps_when_unprovisioned: bool = True
    owed: Sequence[Gap] = ()
    aside: list[bytes] = field(default_factory=list)
    saves: int = 0
    uniform: Callable[[float, float], float] = lowest

    def __post_init__(self) -> None:
        self.accepted = asyncio.Event()
        self.accepted.set()
        self.pipeline = Pipeline(
            "logs", self.limits, LogEncoder(), self.plane.send, self.accepted, self._put_aside,
            keeps_when_unprovisioned=self.keeps_when_unprovisioned, owed=self.owed, save=self._saved,
            uniform=self.uniform, now=unix_time, monotonic=lambda: asyncio.get_running_loop().time(),
        )  # fmt: skip
        self.hand = Hand(self.pipeline)

    async def __aenter__(self) -> Stage:
        self.task = asyncio.create_task(self.pipeline.run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        assert self.pipeline.imbalance() == 0

    async def _put_aside(self, bodies: Sequence[bytes]) -> Path:
        self.aside += bodies
        return Path("/nowhere")

    def _saved(self) -> None:
        self.saves += 1


async def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """In real time. TimeoutError when it does not happen."""
    async with asyncio.timeout(seconds):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)
