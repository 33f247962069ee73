"""Acceptance checks of the telemetry contract, section 7, that are shown nowhere else; the disk that is full.

T2, T5 to T9 and T13 stand with the pipeline, the records, the files and the agent.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from plexd.store.cursors import Cursors
from plexd.telemetry.files import Files
from plexd.telemetry.metrics import Metrics
from plexd.telemetry.window import Limits
from tests.telemetry.stage import Hand, Plane, Stage, error, eventually
from tests.telemetry.test_files import Desk, desk
from tests.telemetry.test_metrics import Scripted
from tests.virtual_time import run_virtual

__all__ = ["desk"]  # a fixture


def test_ten_minutes_without_a_control_plane_lose_nothing(desk: Desk) -> None:
    """T1: 50 lines a second meanwhile, with a window that holds a part of them."""

    async def main() -> None:
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

    run_virtual(main())
    assert desk.arrived == list(range(30_000))


def test_group_that_never_ends_neither_stretches_the_cycle_nor_holds_others_up() -> None:
    """T4."""

    async def main() -> None:
        stage = Stage(limits=Limits(500, 1 << 20, 1.0, 20_000, 16 << 20))
        slow, quick = Scripted("latency"), Scripted("system")
        slow.steps = [1e6] * 10
        stage.pipeline.sources[:] = [Metrics(stage.pipeline, [slow, quick], 15.0)]
        async with stage:
            await asyncio.sleep(62)
            assert quick.times == slow.times == [0, 15, 30, 45, 60]
            assert [point["group"] for point in stage.plane.taken].count("system") >= 4

    run_virtual(main())


def test_stalled_pipeline_delays_no_other() -> None:
    async def main() -> None:
        async with Stage(Plane(seconds=1e9)) as stalled, Stage() as other:
            await stalled.hand.put(*range(10))
            await other.hand.put(*range(10))
            await asyncio.sleep(1)
            assert stalled.plane.numbers == []
            assert other.plane.numbers == list(range(10))
            assert isinstance(other.hand, Hand)

    run_virtual(main())


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
        subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> Path:
    """Until not a byte is left; the file to remove."""
    path = place / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return path


@pytest.mark.namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_disk_that_takes_nothing_is_seen_and_recovered_from(
    desk: Desk,
    small_disk: Path,
    how: str,
) -> None:
    desk.data = small_disk / "t"

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    async def main() -> None:
        desk.write()
        async with desk.life(limits=Limits(1000, 1 << 20, 0.2, 10_000, 16 << 20)) as stage:
            cursors = asyncio.create_task(cursors_of(stage).run())
            await asyncio.sleep(1.5)
            ballast = fill(small_disk) if how == "full" else None
            if ballast is None:
                remount("ro")
            desk.write(*range(100))
            await eventually(lambda: desk.arrived == list(range(100)))  # delivery goes on
            await eventually(lambda: "positions not saved" in stage.pipeline.status()["sources"][1]["detail"])
            if ballast is not None:
                ballast.unlink()
            else:
                remount("rw")
            await eventually(lambda: "positions not saved" not in stage.pipeline.status()["sources"][1]["detail"])
            cursors.cancel()
        desk.write(100)
        async with desk.life():
            await eventually(lambda: 100 in desk.arrived)

    asyncio.run(main())
    assert desk.arrived == list(range(101))
