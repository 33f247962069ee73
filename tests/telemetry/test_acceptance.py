"""Acceptance checks of docs/contract/telemetry.md §7, that are shown nowhere else; the disk that is full.

T2, T5 to T9 and T13 stand with the pipeline, the records, the files and the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from plexd.store.cursors import Cursors
from plexd.telemetry import spooled
from plexd.telemetry.counters import Dropped
from plexd.telemetry.files import Files
from plexd.telemetry.metrics import Metrics
from plexd.telemetry.window import Limits
from tests.telemetry.harness import Hand, Plane, Stage, body, error, eventually
from tests.telemetry.test_files import Desk, desk
from tests.telemetry.test_metrics import Scripted
from tests.telemetry.test_spooled import Process

__all__ = ["desk"]  # a fixture


@pytest.mark.virtual_time
async def test_ten_minutes_without_a_control_plane_lose_nothing(desk: Desk) -> None:
    """T1: 50 lines a second meanwhile, with a window that holds a part of them."""
    desk.write()
    desk.plane.judge = lambda _: error(503)
    async with desk.life(limits=Limits(1000, 1 << 20, 10.0, 10_000, 16 << 20)) as stage:
        await asyncio.sleep(2)
        for second in range(600):
            desk.write(*range(second * 50, second * 50 + 50))
            await asyncio.sleep(1)
        assert stage.pipeline.window.count == 10_000
        desk.plane.judge = lambda _: None
        await asyncio.sleep(120)
        assert stage.pipeline.counters.dropped == {}
    assert desk.arrived == list(range(30_000))


@pytest.mark.virtual_time
async def test_group_that_never_ends_neither_stretches_the_cycle_nor_holds_others_up() -> None:
    """T4."""
    stage = Stage(limits=Limits(500, 1 << 20, 1.0, 20_000, 16 << 20))
    slow, quick = Scripted("latency"), Scripted("system")
    slow.steps = [1e6] * 10
    stage.pipeline.sources[:] = [Metrics(stage.pipeline, [slow, quick], 15.0)]
    async with stage:
        await asyncio.sleep(62)
        assert quick.times == slow.times == [0, 15, 30, 45, 60]
        assert [point["group"] for point in stage.plane.taken].count("system") >= 4


@pytest.mark.virtual_time
async def test_stalled_pipeline_delays_no_other() -> None:
    async with Stage(Plane(seconds=1e9)) as stalled, Stage() as other:
        await stalled.hand.put(*range(10))
        await other.hand.put(*range(10))
        await asyncio.sleep(1)
        assert stalled.plane.numbers == []
        assert other.plane.numbers == list(range(10))
        assert isinstance(other.hand, Hand)


def cursors_of(stage: Stage) -> Cursors:
    (source,) = stage.pipeline.sources
    assert isinstance(source, Files)
    return source._cursors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """Until not a byte is left; the file to remove."""
    path = place / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return path


@contextlib.contextmanager
def taking_nothing(place: Path, how: str) -> Iterator[None]:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], check=True)

    if how == "full":
        ballast = fill(place)
        yield
        ballast.unlink()
    else:
        remount("ro")
        yield
        remount("rw")


ON_A_SMALL_DISK = pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            how, marks=[pytest.mark.namespaces, pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")]
        )
        for how in ("full", "read-only")
    ],
)


@ON_A_SMALL_DISK
async def test_disk_that_takes_nothing_is_seen_and_recovered_from(
    desk: Desk,
    small_disk: Path,
    how: str,
) -> None:
    desk.data = small_disk / "t"
    desk.write()
    async with desk.life(limits=Limits(1000, 1 << 20, 0.2, 10_000, 16 << 20)) as stage:
        cursors = asyncio.create_task(cursors_of(stage).run())
        await asyncio.sleep(1.5)
        with taking_nothing(small_disk, how):
            desk.write(*range(100))
            await eventually(lambda: desk.arrived == list(range(100)))  # delivery goes on
            await eventually(lambda: "positions not saved" in stage.pipeline.status()["sources"][1]["detail"])
        await eventually(lambda: "positions not saved" not in stage.pipeline.status()["sources"][1]["detail"])
        cursors.cancel()
    desk.write(100)
    async with desk.life():
        await eventually(lambda: 100 in desk.arrived)
    assert desk.arrived == list(range(101))


@ON_A_SMALL_DISK
def test_spool_on_a_disk_that_takes_nothing_is_seen_and_recovers(
    small_disk: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile memory has to do: what it cannot hold is counted in a marker, the rest arrives in order."""
    monkeypatch.setattr(spooled, "RETRY_SECONDS", 0.2)
    plane = Plane(lambda _: error(503))

    def detail(process: Process) -> str:
        return str(process.stage.pipeline.status()["sources"][-1]["detail"])

    async def first() -> None:
        process = Process(small_disk / "t", plane, Limits(1000, 1 << 20, 0.2, 2000, 16 << 20))
        async with process.stage:
            for number in range(10):
                await process.spooled.add(body(number))
            process.spool.close()  # or the disk is too busy to become read-only
            with taking_nothing(small_disk, how):
                await process.spooled.add(body(10, pad="x" * 8192))  # more than the rest of a page
                assert detail(process).startswith("spool: degraded")
                for number in range(11, 5000):
                    process.spooled.add_nowait(body(number))
                await process.spooled.flush()
                assert process.stage.pipeline.imbalance() == 0
            await eventually(lambda: not detail(process))  # by itself
            assert await process.spooled.flush()
            lost.append(process.stage.pipeline.counters.dropped[Dropped.OVERFLOW])
            process.stage.plane.judge = lambda _: None

            def has_arrived() -> bool:
                process.stage.pipeline.wake()
                return bool(plane.numbers) and plane.numbers[-1] == 4999

            await eventually(has_arrived)
            lost.append(process.stage.pipeline.counters.dropped[Dropped.OVERFLOW])
            await process.cursors.save()
        process.spool.close()

    async def second() -> None:
        process = Process(small_disk / "t", plane, Limits(1000, 1 << 20, 0.2, 2000, 16 << 20))
        async with process.stage:
            await process.spooled.add(body(5000))
            await eventually(lambda: plane.numbers[-1] == 5000)
        process.spool.close()

    lost: list[int] = []
    asyncio.run(first())
    asyncio.run(second())
    arrived = list(dict.fromkeys(plane.numbers))
    assert arrived == sorted(arrived)
    assert set(range(10)) <= set(arrived)
    assert 5001 - len(arrived) == lost[-1] > 0
    assert sum(int(marker.rpartition("lost=")[2]) for marker in plane.markers) == lost[-1]
