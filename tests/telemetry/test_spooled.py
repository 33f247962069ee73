"""Entries of sources that can't be read again: on disk first, in memory while the disk refuses."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from plexd.store.cursors import Cursors
from plexd.store.spool import Spool
from plexd.telemetry.spooled import Spooled
from plexd.telemetry.window import Limits
from tests.telemetry.harness import LIMITS, Plane, Stage, body, error
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

MAX = 4 << 20


class Process:
    """A pipeline with a spool in `directory`; made anew for each life of the process."""

    def __init__(self, directory: Path, plane: Plane, limits: Limits = LIMITS) -> None:
        self.cursors = Cursors(directory)
        self.cursors.load()
        self.stage = Stage(plane, limits)
        self.spool = Spool(directory / "audit-spool", MAX)
        self.spooled = Spooled("spool", self.stage.pipeline, self.spool, self.cursors, "audit_spool")
        self.stage.pipeline.sources[:] = [self.spooled]


def test_entries_are_on_disk_when_add_returns(tmp_path: Path) -> None:
    async def first() -> None:
        process = Process(tmp_path / "t", Plane())
        await asyncio.gather(*(process.spooled.add(body(n)) for n in range(5)))
        assert process.stage.pipeline.imbalance() == 0

    async def second() -> None:
        process = Process(tmp_path / "t", Plane())
        async with process.stage as stage:
            await asyncio.sleep(11)
            assert stage.plane.numbers == list(range(5))

    run_virtual(first())  # and gone, as with kill -9
    run_virtual(second())


def test_nothing_is_sent_twice_after_positions_were_saved(tmp_path: Path) -> None:
    async def life(first: int) -> list[int]:
        process = Process(tmp_path / "t", Plane())
        async with process.stage as stage:
            for n in range(first, first + 10):
                process.spooled.add_nowait(body(n))
            await asyncio.sleep(11)
            await process.cursors.save()
            assert stage.pipeline.imbalance() == 0
            return stage.plane.numbers

    assert run_virtual(life(0)) == list(range(10))
    assert run_virtual(life(10)) == list(range(10, 20))


async def test_delivered_segments_are_deleted_once_the_position_is_on_disk(tmp_path: Path) -> None:
    process = Process(tmp_path / "t", Plane(), Limits(1000, 1 << 20, 1.0, 10_000, 16 << 20))
    async with process.stage:
        for n in range(3000):
            process.spooled.add_nowait(body(n, pad="x" * 1000))
        await asyncio.sleep(20)
        segments = list((tmp_path / "t" / "audit-spool").iterdir())
        assert len(segments) == 2
        await process.cursors.save()
        await asyncio.sleep(1)
        assert len(list((tmp_path / "t" / "audit-spool").iterdir())) == 1


async def test_spool_that_is_full_loses_the_oldest_with_a_marker_that_counts(tmp_path: Path) -> None:
    process = Process(tmp_path / "t", Plane(lambda _: error(503)), Limits(100, 1 << 20, 1.0, 1000, 2 << 20))
    async with process.stage as stage:
        for start in range(0, 12_000, 500):
            for n in range(start, start + 500):
                process.spooled.add_nowait(body(n, pad="x" * 1000))
            await process.spooled.flush()
        assert process.spool.bytes <= MAX
        stage.plane.judge = lambda _: None
        await asyncio.sleep(400)
        arrived = stage.plane.numbers
        assert arrived == sorted(set(arrived))
        lost = stage.pipeline.counters.dropped["overflow"]  # type: ignore[index]
        assert len(arrived) + lost == 12_000
        marked = [int(marker.rpartition("lost=")[2]) for marker in stage.plane.markers]
        assert sum(marked) == lost > 0


class BrokenDisk:
    def __init__(self, process: Process) -> None:
        self.is_broken = True
        self._append = process.spool.append
        process.spool.append = self.append  # type: ignore[method-assign]

    def append(self, bodies: Any) -> int:
        if self.is_broken:
            raise OSError(30, "Read-only file system")
        return self._append(bodies)


@pytest.mark.virtual_time
async def test_entries_go_on_from_memory_while_the_disk_refuses(tmp_path: Path) -> None:
    with capture_logs() as logs:
        process = Process(tmp_path / "t", Plane())
        async with process.stage as stage:
            await process.spooled.add(body(0))
            disk = BrokenDisk(process)
            for n in range(1, 6):
                await process.spooled.add(body(n))
            await asyncio.sleep(11)
            assert stage.pipeline.status()["sources"][-1]["detail"] == "spool: degraded (Read-only file system)"
            disk.is_broken = False
            await process.spooled.add(body(6))
            await asyncio.sleep(30)
            assert stage.plane.numbers == list(range(7))
            assert stage.pipeline.status()["sources"][-1]["detail"] == ""
    assert [line["event"] for line in logs] == ["spool degraded, entries stay in memory", "spool works again"]


@pytest.mark.parametrize("is_broken", [False, True])
async def test_successor_takes_over_what_is_on_disk_and_what_the_disk_refused(tmp_path: Path, is_broken: bool) -> None:
    before = Process(tmp_path / "t", Plane(lambda _: error(503)))
    async with before.stage:
        for n in range(150):  # more than the window holds
            await before.spooled.add(body(n))
        await asyncio.sleep(20)
        disk = BrokenDisk(before)
        disk.is_broken = is_broken
        for n in range(150, 160):
            await before.spooled.add(body(n))
    before.stage.pipeline.drop_rest(lambda _: True)
    await before.spooled.retire()
    before.cursors.release("audit_spool")
    stage = Stage()
    counters = stage.pipeline.counters = before.stage.pipeline.counters
    spool = Spool(tmp_path / "t" / "audit-spool", MAX)
    spooled = Spooled("spool", stage.pipeline, spool, before.cursors, "audit_spool")
    stage.pipeline.sources[:] = [spooled]
    spooled.succeed(before.spooled)
    async with stage:
        await asyncio.sleep(60)
    assert stage.plane.numbers == list(range(160))
    assert counters.collected == counters.sent == 160


async def test_memory_is_bounded_while_disk_and_control_plane_refuse(tmp_path: Path) -> None:
    process = Process(tmp_path / "t", Plane(lambda _: error(503)))
    async with process.stage as stage:
        BrokenDisk(process)
        for n in range(500):
            await process.spooled.add(body(n))
        await asyncio.sleep(60)
        entries, _ = stage.pipeline.spooled()
        assert entries <= LIMITS.entries
        assert stage.pipeline.window.count <= LIMITS.entries
        assert stage.pipeline.imbalance() == 0
        stage.plane.judge = lambda _: None
        await asyncio.sleep(400)
        lost = stage.pipeline.counters.dropped["overflow"]  # type: ignore[index]
        assert len(stage.plane.numbers) + lost == 500
        assert sum(int(marker.rpartition("lost=")[2]) for marker in stage.plane.markers) == lost


@pytest.mark.parametrize("kept", [0, 5])
async def test_torn_line_is_counted_as_malformed(tmp_path: Path, kept: int) -> None:
    process = Process(tmp_path / "t", Plane())
    for n in range(kept + 1):
        await process.spooled.add(body(n))
    (segment,) = (tmp_path / "t" / "audit-spool").iterdir()
    segment.write_bytes(segment.read_bytes()[:-3])
    again = Process(tmp_path / "t", Plane())
    async with again.stage as stage:
        await asyncio.sleep(11)
        assert stage.plane.numbers == list(range(kept))
        assert stage.pipeline.counters.dropped == {"malformed": 1}


async def test_what_is_on_disk_can_be_waited_for_until_it_is_in_the_window(tmp_path: Path) -> None:
    process = Process(tmp_path / "t", Plane(judge=lambda batch: error(503)))
    async with process.stage as stage:
        for n in range(50):
            process.spooled.add_nowait(body(n))
        assert await process.spooled.read_out(5.0)
        assert stage.pipeline.window.count == 50
        for n in range(100):
            process.spooled.add_nowait(body(n))
        assert not await process.spooled.read_out(5.0)  # the window is full
