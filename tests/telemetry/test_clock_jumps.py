"""The wall clock is set forward and back while telemetry flows: waits go by the monotonic clock, entries keep the time
that they were written with, and no position is told by a time that is to come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from plexd.linux import journalctl
from plexd.telemetry.gaps import Reason
from plexd.telemetry.metrics import Metrics
from plexd.telemetry.window import Limits
from tests.node_harness import EPOCH, unix_time
from tests.telemetry.harness import Plane, Stage, error
from tests.telemetry.journald import MARKS, Journald
from tests.telemetry.test_files import Desk, desk
from tests.telemetry.test_journal import Reader, lines, messages, read
from tests.telemetry.test_metrics import Scripted
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

__all__ = ["desk"]  # a fixture
JUMPS = pytest.mark.parametrize("jump", [-86_400.0, -1.0, 3600.0, 1e9])


class WallClock:
    """Goes with the loop, and can be set."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return unix_time() + self.offset


def set_clock(stage: Stage) -> WallClock:
    clock = WallClock()
    stage.pipeline.now = clock
    return clock


@JUMPS
async def test_batches_go_when_they_would_have_gone(jump: float) -> None:
    async with Stage() as stage:
        clock = set_clock(stage)
        await stage.hand.put(1)
        await asyncio.sleep(4)
        clock.offset = jump
        await asyncio.sleep(5.9)
        assert stage.plane.numbers == []
        await asyncio.sleep(0.2)
        assert stage.plane.numbers == [1]
        assert stage.pipeline.status()["counters"]["oldest_age_seconds"] == 0.0


@JUMPS
def test_tries_after_failures_are_as_far_apart_as_without(jump: float) -> None:
    def times(offset: float) -> list[float]:
        async def main() -> list[float]:
            async with Stage(Plane(lambda _: error(503))) as stage:
                clock = set_clock(stage)
                await stage.hand.put(*range(10))
                await asyncio.sleep(7)
                clock.offset = offset
                await asyncio.sleep(300)
                return stage.plane.times

        return run_virtual(main())

    assert times(jump) == times(0.0)


@JUMPS
async def test_markers_are_spaced_by_the_monotonic_clock(jump: float) -> None:
    async with Stage(limits=Limits(10, 1 << 20, 1.0, 100, 16 << 20)) as stage:
        clock = set_clock(stage)
        for _ in range(3):
            await stage.hand.feed.gap(Reason.ROTATED_AWAY, 2, 0)
        clock.offset = jump
        await asyncio.sleep(55)
        assert [marker.rpartition(" ")[2] for marker in stage.plane.markers] == ["lost=2"]
        await asyncio.sleep(10)
        assert [marker.rpartition(" ")[2] for marker in stage.plane.markers] == ["lost=2", "lost=4"]


@JUMPS
async def test_cycles_of_metrics_stay_in_step_and_carry_the_time_that_is_told(jump: float) -> None:
    stage = Stage(limits=Limits(500, 1 << 20, 1.0, 20_000, 16 << 20))
    group = Scripted("system")
    stage.pipeline.sources[:] = [Metrics(stage.pipeline, [group], 15.0)]
    clock = set_clock(stage)
    async with stage:
        await asyncio.sleep(20)
        clock.offset = jump
        await asyncio.sleep(30)
        assert group.times == [0, 15, 30, 45]
        stamps = [datetime.fromisoformat(point["timestamp"]).timestamp() for point in stage.plane.taken]
        assert stamps == [EPOCH, EPOCH + 15, EPOCH + 30 + jump, EPOCH + 45 + jump]


@JUMPS
async def test_files_are_followed_through_rotation_and_an_unfinished_line_waits_its_time(
    desk: Desk, jump: float
) -> None:
    desk.write(1)
    async with desk.life(from_beginning=True) as stage:
        clock = set_clock(stage)
        await asyncio.sleep(3)
        desk.rotate()
        clock.offset = jump
        desk.write(2, path=desk.logs / "app.log.1")  # the writer has not noticed yet
        with desk.log.open("a") as log:
            log.write("line 3\nline 4")
        await asyncio.sleep(25)
        assert desk.arrived == [1, 2, 3]
        await asyncio.sleep(15)
        assert desk.arrived == [1, 2, 3, 4]
        assert desk.gaps == []


def entry(number: int, realtime: float, boot: str = "b0") -> bytes:
    cursor = f"s=5c0a;i={number:x};b={boot};m={number:x};t={int(realtime * 1e6):x};x=1"
    record = {"__CURSOR": cursor, "__REALTIME_TIMESTAMP": str(int(realtime * 1e6)), "MESSAGE": f"line {number}"}
    return json.dumps(record).encode() + b"\n"


def test_entries_of_the_journal_keep_order_and_time_through_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What journalctl prints when the clock was set back by an hour, forward by a year, and back."""
    told = [EPOCH, EPOCH + 1, EPOCH - 3600, EPOCH - 3599, EPOCH + 31_536_000, EPOCH + 2, EPOCH + 2]
    asked: list[dict[str, Any]] = []

    @asynccontextmanager
    async def follow(**how: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            begun = not how["cursor"]
            for number, realtime in enumerate(told, 1):
                line = entry(number, realtime)
                begun = begun or how["cursor"].encode() in line
                if begun:
                    yield line
            await asyncio.Event().wait()

        asked.append(how)
        yield chunks()

    async def first_line(cursor: str, _directory: Path | None) -> bytes:
        return json.dumps({"__CURSOR": cursor}).encode()

    monkeypatch.setattr(journalctl, "is_installed", lambda: True)
    monkeypatch.setattr(journalctl, "follow", follow)
    monkeypatch.setattr(journalctl, "first_line", first_line)
    plane = Plane()

    async def life(until: int) -> None:
        reader = Reader(tmp_path, tmp_path / "t", plane)
        reader.stage.pipeline.now = unix_time
        async with reader.stage:
            await asyncio.sleep(1)
            assert messages(plane)[-1] == f"line {until}"
            await reader.cursors.save()

    run_virtual(life(7))
    assert messages(plane) == lines(1, 8)
    stamps = [datetime.fromisoformat(taken["timestamp"]).timestamp() for taken in plane.taken]
    assert stamps == told
    told += [EPOCH - 7200, EPOCH + 3]  # and again, while nobody looked
    run_virtual(life(9))
    assert messages(plane) == lines(1, 10)
    assert "i=7;" in asked[1]["cursor"]


class TestRealJournal:
    pytestmark = MARKS

    @pytest.mark.parametrize("cursor", ["", "s=0a;i=1;b=0b;m=1;t=1;x=1"], ids=["not begun", "cursor lost"])
    def test_position_in_a_time_to_come_hides_nothing(self, tmp_path: Path, cursor: str) -> None:
        """The clock was wrong by an hour when the agent last ran: what comes is not held back for so long."""
        (tmp_path / "t").mkdir()
        position = {"cursor": cursor, "realtime_usec": int((time.time() + 3600) * 1e6)}
        (tmp_path / "t" / "cursors.json").write_text(json.dumps({"version": 1, "journald": position}))
        with Journald(tmp_path / "journald") as journald:
            for line in lines(0, 10):
                journald.write(line)
            journald.control("--sync")
            plane = read(journald.directory, tmp_path / "t", "line 9")
            assert messages(plane) == ["telemetry gap: source=journald reason=cursor_lost lost=unknown", *lines(0, 10)]
            for line in lines(10, 20):
                journald.write(line)
            assert messages(read(journald.directory, tmp_path / "t", "line 19")) == lines(10, 20)
