"""Log files: followed through everything that is done to them, with and without an agent that looks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from plexd.linux import logfiles
from plexd.linux.logfiles import LogFile
from plexd.store.cursors import Cursors
from plexd.telemetry import files as module
from plexd.telemetry.files import Files
from plexd.telemetry.records import LogEncoder
from plexd.telemetry.severity import Filter
from plexd.telemetry.window import Limits
from tests.node_harness import EPOCH
from tests.telemetry.harness import Plane, Stage, error
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

LIMITS = Limits(1000, 1 << 20, 0.5, 10_000, 16 << 20)
EVERYTHING = Filter(None, [], [], "plexd.service")
INTERVAL = 1.0


class Reader:
    """One life of an agent that follows `patterns`."""

    def __init__(self, data: Path, plane: Plane, *patterns: str, limits: Limits = LIMITS, **how: Any) -> None:
        self.cursors = Cursors(data)
        self.cursors.load()
        self.stage = Stage(plane, limits)
        files = Files(
            self.stage.pipeline,
            self.cursors,
            lambda path: LogEncoder(path, "host", 16384),
            how.get("wanted", EVERYTHING),
            patterns=patterns,
            interval=INTERVAL,
            from_beginning=how.get("from_beginning", False),
            max_line_bytes=16384,
        )
        self.stage.pipeline.sources[:] = [files]


class Desk:
    """A directory with logs, and lives of an agent, in virtual time. A life ends as with kill -9 unless it is saved."""

    def __init__(self, tmp_path: Path) -> None:
        self.plane = Plane()
        self.logs = tmp_path / "log"
        self.logs.mkdir()
        self.data = tmp_path / "t"
        self.log = self.logs / "app.log"
        self.patterns: Sequence[str] = (f"{self.logs}/*.log",)

    @asynccontextmanager
    async def life(self, *, save: bool = True, **how: Any) -> AsyncIterator[Stage]:
        reader = Reader(self.data, self.plane, *self.patterns, **how)
        async with reader.stage as stage:
            yield stage
            if save:
                await reader.cursors.save()

    def write(self, *numbers: int, path: Path | None = None) -> None:
        with (path or self.log).open("a") as file:
            for number in numbers:
                file.write(f"line {number}\n")

    def rotate(self, keep: int = 5) -> None:
        for number in range(keep, 0, -1):
            old = self.logs / f"app.log.{number}"
            if old.exists():
                old.rename(self.logs / f"app.log.{number + 1}")
        self.log.rename(self.logs / "app.log.1")

    @property
    def arrived(self) -> list[int]:
        return [int(e["message"].split()[1]) for e in self.plane.taken if e["message"].startswith("line ")]

    @property
    def gaps(self) -> list[str]:
        return [e["message"].removeprefix("telemetry gap: ") for e in self.plane.taken if "telemetry" in e["message"]]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_first_start_begins_at_the_end_and_follows(desk: Desk) -> None:
    desk.write(1, 2)
    async with desk.life():
        await asyncio.sleep(1)
        desk.write(3, 4)
        await asyncio.sleep(5)
    desk.write(5)
    async with desk.life():
        await asyncio.sleep(5)
    assert desk.arrived == [3, 4, 5]
    assert {entry["source"] for entry in desk.plane.taken} == {str(desk.log)}
    assert desk.plane.taken[0]["unit"] == ""


async def test_first_start_may_begin_at_the_beginning(desk: Desk) -> None:
    desk.write(1, 2)
    async with desk.life(from_beginning=True):
        await asyncio.sleep(5)
    assert desk.arrived == [1, 2]


async def test_end_where_the_first_start_began_does_not_move_on(desk: Desk) -> None:
    """Killed before anything was delivered."""
    desk.write(1)
    desk.plane.judge = lambda _: error(503)
    async with desk.life(save=False):
        await asyncio.sleep(1)
        desk.write(2)
        await asyncio.sleep(5)
    desk.plane.judge = lambda _: None
    async with desk.life():
        await asyncio.sleep(5)
    assert desk.arrived == [2]


async def test_file_that_appears_later_is_read_from_its_beginning(desk: Desk) -> None:
    async with desk.life():
        await asyncio.sleep(3)
        desk.write(1, 2, path=desk.logs / "new.log")
        await asyncio.sleep(5)
    desk.write(3, path=desk.logs / "newer.log")
    async with desk.life():
        await asyncio.sleep(5)
    assert desk.arrived == [1, 2, 3]


async def test_rotation_by_renaming_loses_nothing(desk: Desk) -> None:
    desk.write()
    async with desk.life():
        await asyncio.sleep(1)
        desk.write(*range(10))
        desk.rotate()
        desk.write(10, path=desk.logs / "app.log.1")  # the writer has not noticed yet
        await asyncio.sleep(2)
        desk.write(11, path=desk.logs / "app.log.1")
        desk.write(*range(12, 20))
        await asyncio.sleep(20)
    assert desk.arrived == list(range(20))
    assert desk.gaps == []


async def test_several_rotations_between_two_looks_lose_nothing(desk: Desk) -> None:
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        for number in range(1, 4):
            desk.write(number)
            desk.rotate()
        desk.write(4)
        await asyncio.sleep(40)
    assert desk.arrived == [1, 2, 3, 4]


def read_one_line_and_after(desk: Desk, change: Callable[[], None], *, is_away: bool) -> None:
    """The agent reads line 1; then `change` happens, while it runs or between two lives of it."""

    async def main() -> None:
        desk.write(0)
        async with desk.life():
            await asyncio.sleep(1)
            desk.write(1)
            await asyncio.sleep(5)
            if not is_away:
                change()
                await asyncio.sleep(40)
        if is_away:
            change()
            async with desk.life():
                await asyncio.sleep(40)

    run_virtual(main())


@pytest.mark.parametrize("is_away", [False, True], ids=["between two looks", "while the agent is down"])
@pytest.mark.parametrize("when", ["before rotated files are listed", "before the path is opened"])
def test_rotation_while_an_earlier_one_is_looked_into_loses_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, is_away: bool, when: str
) -> None:
    once_more: list[int] = []

    def rotate_once_more() -> None:
        if once_more:
            desk.rotate()
            desk.write(once_more.pop())

    def list_late(path: Path) -> list[Path]:
        rotate_once_more()
        return siblings(path)

    def open_late(file: LogFile, path: Path) -> None:
        if path == desk.log:
            rotate_once_more()
        opened(file, path)

    siblings, opened = logfiles.siblings, LogFile.__init__
    if when == "before the path is opened":
        monkeypatch.setattr(LogFile, "__init__", open_late)
    else:
        monkeypatch.setattr(logfiles, "siblings", list_late)

    def rotate() -> None:
        desk.rotate()
        desk.write(2)
        once_more.append(3)

    read_one_line_and_after(desk, rotate, is_away=is_away)
    assert once_more == []
    assert desk.arrived == [1, 2, 3]
    assert desk.gaps == []


@pytest.mark.parametrize("is_away", [False, True], ids=["between two looks", "while the agent is down"])
def test_file_that_was_written_to_before_an_earlier_one_is_not_passed_over(desk: Desk, is_away: bool) -> None:
    """The writer wrote on into the first, unaware of the rotation, after the second had its lines."""

    def rotate_twice() -> None:
        desk.rotate()
        desk.write(2)
        desk.rotate()
        second, first = desk.logs / "app.log.1", desk.logs / "app.log.2"
        os.utime(second, ns=(0, first.stat().st_mtime_ns - 1))
        desk.write(3)

    read_one_line_and_after(desk, rotate_twice, is_away=is_away)
    assert desk.arrived == [1, 2, 3]
    assert desk.gaps == []


@pytest.mark.parametrize("rotations", [1, 2, 3])
async def test_rotation_while_the_agent_is_down_loses_nothing(desk: Desk, rotations: int) -> None:
    """T9."""
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        desk.write(1)
        await asyncio.sleep(5)
    for number in range(rotations):
        desk.write(2 + number)
        desk.rotate()
    desk.write(2 + rotations)
    async with desk.life():
        await asyncio.sleep(40)
    assert desk.arrived == list(range(1, 3 + rotations))
    assert desk.gaps == []


async def test_rotated_file_that_is_gone_is_marked(desk: Desk) -> None:
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        desk.write(1)
        await asyncio.sleep(5)
    desk.write(2)
    desk.log.rename(desk.logs / "elsewhere")
    desk.write(3)
    async with desk.life():
        await asyncio.sleep(10)
    assert desk.arrived == [1, 3]
    assert desk.gaps == [f"source={desk.log} reason=rotated_away lost=unknown"]


async def test_marker_is_not_lost_with_the_agent(desk: Desk) -> None:
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        desk.write(1)
        await asyncio.sleep(5)
    desk.log.unlink()
    desk.plane.judge = lambda _: error(503)
    async with desk.life():
        await asyncio.sleep(10)
    desk.plane.judge = lambda _: None
    async with desk.life():
        await asyncio.sleep(10)
    assert desk.gaps == [f"source={desk.log} reason=rotated_away lost=unknown"]


def truncate_and_write(desk: Desk, *numbers: int) -> None:
    os.truncate(desk.log, 0)
    desk.write(*numbers)


@pytest.mark.parametrize("count", [1, 100], ids=["shorter", "longer"])
@pytest.mark.parametrize("down", [False, True], ids=["while looking", "while down"])
async def test_emptied_file_is_marked_and_read_from_its_beginning(desk: Desk, count: int, down: bool) -> None:
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        desk.write(*range(1, 20))
        await asyncio.sleep(5)
        if not down:
            truncate_and_write(desk, *range(20, 20 + count))
            await asyncio.sleep(5)
    if down:
        truncate_and_write(desk, *range(20, 20 + count))
        async with desk.life():
            await asyncio.sleep(5)
    assert desk.arrived == list(range(1, 20 + count))
    assert desk.gaps == [f"source={desk.log} reason=truncated_file lost=unknown"]


@pytest.mark.parametrize("lives", [1, 2])
async def test_file_that_was_empty_at_first_is_known_by_its_first_line(desk: Desk, lives: int) -> None:
    """Also when the agent is killed before the position of a line is on disk."""
    desk.write()
    async with desk.life(save=False):
        await asyncio.sleep(1.5)
        if lives == 1:
            desk.write(*range(1, 20))
            await asyncio.sleep(5)
    if lives == 2:
        desk.write(*range(1, 20))
        async with desk.life(save=False):
            await asyncio.sleep(5)
    truncate_and_write(desk, *range(20, 60))
    async with desk.life():
        await asyncio.sleep(5)
    assert desk.arrived == list(range(1, 60))
    assert desk.gaps == [f"source={desk.log} reason=truncated_file lost=unknown"]


async def test_file_that_was_empty_when_it_was_looked_at_is_known_by_what_is_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first lines come between the look and the reading, and the agent is killed right after their delivery."""
    read = LogFile.read
    coming = [1, 2, 3]

    def read_what_just_came(file: LogFile, offset: int, count: int) -> bytes:
        desk.write(*coming)
        coming.clear()
        return read(file, offset, count)

    desk.write()
    monkeypatch.setattr(LogFile, "read", read_what_just_came)
    async with desk.life(save=False):
        await asyncio.sleep(0.9 * INTERVAL)  # delivered, and not looked at once more
    truncate_and_write(desk, *range(20, 60))
    async with desk.life():
        await asyncio.sleep(5)
    assert desk.arrived == [1, 2, 3, *range(20, 60)]
    assert desk.gaps == [f"source={desk.log} reason=truncated_file lost=unknown"]


async def test_inode_that_is_used_again_is_not_taken_for_the_old_file(desk: Desk) -> None:
    desk.write(*range(20))
    async with desk.life(from_beginning=True):
        await asyncio.sleep(5)
    inode = desk.log.stat().st_ino
    os.truncate(desk.log, 0)  # as a new file that was given the old inode would look
    desk.write(*range(100, 140))
    assert desk.log.stat().st_ino == inode
    async with desk.life():
        await asyncio.sleep(5)
    assert desk.arrived == [*range(20), *range(100, 140)]


async def test_line_counts_when_it_ends(desk: Desk) -> None:
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        with desk.log.open("a") as file:
            file.write("line 1 and")
            file.flush()
            await asyncio.sleep(20)
            assert desk.arrived == []
            file.write(" more\nline 2")
        await asyncio.sleep(10)
        assert desk.arrived == [1]
        await asyncio.sleep(30)
        assert desk.arrived == [1, 2]  # it did not grow for half a minute
    async with desk.life():
        await asyncio.sleep(5)
    assert [entry["message"] for entry in desk.plane.taken] == ["line 1 and more", "line 2"]


async def test_unfinished_line_of_a_rotated_file_is_taken(desk: Desk) -> None:
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        with desk.log.open("a") as file:
            file.write("line 1")
        desk.rotate()
        desk.write(2)
        await asyncio.sleep(10)
    assert desk.arrived == [1, 2]


def test_reading_waits_for_room_and_a_kill_loses_nothing(desk: Desk) -> None:
    async def main() -> None:
        desk.write(0)
        small = Limits(10, 1 << 20, 0.5, 30, 16 << 20)
        async with desk.life(limits=small):
            await asyncio.sleep(1)
        desk.plane.judge = lambda _: error(503)
        for _ in range(3):
            desk.write(*range(len(written), len(written) + 100))
            written.extend(range(100))
            async with desk.life(limits=small, save=False) as stage:
                await asyncio.sleep(20)
                assert stage.pipeline.window.count == 30
        desk.plane.judge = lambda _: None
        async with desk.life(limits=small):
            await asyncio.sleep(60)

    written: list[int] = []
    run_virtual(main())
    assert desk.arrived == list(range(300))


async def test_huge_line_is_cut_and_takes_no_memory(desk: Desk) -> None:
    desk.write(0)
    async with desk.life() as stage:
        await asyncio.sleep(1)
        with desk.log.open("ab") as file:
            file.write(b"line 1 " + b"x" * (20 << 20) + b"\nline 2 \xff\x00end\nline 3\r\n")
        await asyncio.sleep(30)
        assert stage.pipeline.counters.truncated == 1
    huge, odd, plain = desk.plane.taken
    assert len(huge["message"]) == 16384
    assert huge["message"].endswith("x[truncated]")
    assert (odd["message"], plain["message"]) == ("line 2 \ufffdend", "line 3")


async def test_time_and_severity_of_a_line_are_read(desk: Desk) -> None:
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        desk.log.write_text("line 0\n<11>2026-03-04T09:15:02.5+01:00 it failed\nno time\n\n  \n")
        await asyncio.sleep(5)
    first, second = desk.plane.taken
    assert (first["timestamp"], first["severity"]) == ("2026-03-04T08:15:02.5Z", "err")
    assert first["message"] == "2026-03-04T09:15:02.5+01:00 it failed"
    assert (second["severity"], second["timestamp"][:10]) == ("info", "2027-01-15")
    assert EPOCH == 1_800_000_000


def test_only_regular_files_that_fit_are_followed(desk: Desk, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret\n")
    desk.write(1)
    (desk.logs / "link.log").symlink_to(outside)
    (desk.logs / "inner.log").symlink_to(desk.log)
    (desk.logs / "dir.log").mkdir()
    os.mkfifo(desk.logs / "fifo.log")
    (desk.logs / "old.log.gz").write_text("packed")
    found = logfiles.find([f"{desk.logs}/*.log", f"{desk.logs}/**/*", f"{desk.logs}/*.gz"])
    assert found == [desk.log] or found == [desk.logs / "inner.log"]


async def test_rotated_name_that_fits_the_pattern_is_not_read_twice(desk: Desk) -> None:
    desk.patterns = (f"{desk.logs}/*.log*",)
    desk.write(0)
    async with desk.life():
        await asyncio.sleep(1)
        desk.write(*range(1, 10))
        await asyncio.sleep(3)
        desk.rotate()
        desk.write(10)
        await asyncio.sleep(30)
        desk.rotate()
        desk.write(11)
        await asyncio.sleep(30)
    async with desk.life():
        await asyncio.sleep(30)
    assert desk.arrived == list(range(1, 12))


async def test_many_files_have_their_turn(desk: Desk) -> None:
    async with desk.life(from_beginning=True):
        big = desk.logs / "a.log"
        with big.open("w") as file:
            file.writelines(f"line {n} {'x' * 1000}\n" for n in range(3000))
        desk.write(5000, path=desk.logs / "b.log")
        await asyncio.sleep(30)
    place = desk.arrived.index(5000)
    assert place < 2000  # it did not wait for the whole of the big one
    assert sorted(desk.arrived) == [*range(3000), 5000]
    assert module.CYCLE_BYTES == 1 << 20
