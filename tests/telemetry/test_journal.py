"""The journal: forms of its entries, and a real one through boots, vacuuming and lost cursors."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plexd.linux import journalctl
from plexd.store.cursors import Cursors
from plexd.telemetry.counters import Dropped
from plexd.telemetry.journal import Continuity, Journal, SequenceNumber, message_text, parse_place, priority_of, unit_of
from plexd.telemetry.records import LogEncoder
from plexd.telemetry.severity import Filter
from plexd.telemetry.window import Limits
from tests.telemetry.harness import Plane, Stage, error, eventually
from tests.telemetry.journald import MARKS, Journald

LIMITS = Limits(1000, 1 << 20, 0.1, 10_000, 16 << 20)
EVERYTHING = Filter(None, [], [], "plexd.service")


def child(program: str) -> int:
    """The one that runs it."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (pid,) = (pid for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == program)
    return int(pid)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ([104, 105, 255, 0], "hi\ufffd\0"),
        (["a", "b"], "a\nb"),
        ([[104, 105], "there"], "hi\nthere"),
        (None, None),
        ([], None),
        ({}, None),
        ([None], ""),
    ],
)
def test_message_is_read_in_all_its_forms(value: Any, text: str | None) -> None:
    assert message_text(value) == text


@pytest.mark.parametrize(
    ("value", "priority"), [("0", 0), ("7", 7), ("8", 6), ("x", 6), (None, 6), (["3", "4"], 3), (3, 6), ("-1", 6)]
)
def test_odd_priority_is_info(value: Any, priority: int) -> None:
    assert priority_of(value) == priority


def test_unit_is_that_of_the_sender_before_the_one_it_is_about() -> None:
    assert unit_of({"_SYSTEMD_UNIT": "init.scope", "UNIT": "ssh.service"}) == "init.scope"
    assert unit_of({"UNIT": "ssh.service"}) == "ssh.service"
    assert unit_of({}) == ""


def test_cursor_tells_journal_boot_and_number() -> None:
    assert parse_place("s=5c0a;i=9f2;b=622e;m=c6;t=66;x=5f") == SequenceNumber("5c0a", "622e", 0x9F2)
    assert parse_place("garbage") is None


def test_missing_numbers_are_counted_per_journal_and_boot() -> None:
    continuity = Continuity(SequenceNumber("a", "b1", 5))
    assert continuity.missing_before(SequenceNumber("a", "b1", 6)) == 0
    assert continuity.missing_before(SequenceNumber("other", "b1", 900)) == 0
    assert continuity.missing_before(SequenceNumber("a", "b1", 10)) == 3
    assert continuity.missing_before(SequenceNumber("a", "b2", 50)) == 0
    continuity.skip()
    assert continuity.missing_before(SequenceNumber("a", "b2", 52)) == 0


class Reader:
    """One life of an agent that reads `directory`, its data in `data`."""

    def __init__(self, directory: Path, data: Path, plane: Plane, limits: Limits = LIMITS, **how: Any) -> None:
        self.cursors = Cursors(data)
        self.cursors.load()
        self.stage = Stage(plane, limits)
        pipeline = self.stage.pipeline
        pipeline.now = time.time
        lookback = how.pop("lookback", 3600.0)
        self.journal = Journal(
            pipeline, self.cursors, LogEncoder("journald", "host", 16384), how.pop("wanted", EVERYTHING),
            lookback=lookback, directory=directory, sees_all=True, is_wanted=how.pop("is_wanted", lambda _: True),
        )  # fmt: skip
        pipeline.sources[:] = [self.journal]
        self.plane = plane

    async def read(self, until: Callable[[], bool], *, save: bool = True) -> None:
        """Run until that holds, and end as with kill -9 if the positions are not to be saved."""
        async with self.stage:
            await eventually(until)
            if save:
                await self.cursors.save()


def messages(plane: Plane) -> list[str]:
    """What our tests wrote."""
    return [entry["message"] for entry in plane.taken if entry["message"].startswith(("line ", "telemetry gap"))]


def lines(start: int, end: int) -> list[str]:
    return [f"line {n}" for n in range(start, end)]


def read(directory: Path, data: Path, *last: str, plane: Plane | None = None, **how: Any) -> Plane:
    """Until all of `last` have arrived."""
    plane = plane or Plane()
    save = how.pop("save", True)

    async def main() -> None:
        await Reader(directory, data, plane, **how).read(lambda: set(last) <= set(messages(plane)), save=save)

    asyncio.run(main())
    return plane


@pytest.fixture
def journald(tmp_path: Path) -> Journald:
    return Journald(tmp_path / "journald")


class TestRealJournal:
    pytestmark = MARKS

    def test_what_was_there_and_what_comes_arrives_in_order(self, journald: Journald, tmp_path: Path) -> None:
        with journald:
            for line in lines(0, 500):
                journald.write(line, PRIORITY="3")
            plane = read(journald.directory, tmp_path / "t", "line 499")
            assert messages(plane) == lines(0, 500)
            assert {e["severity"] for e in plane.taken if e["message"].startswith("line")} == {"err"}
            for line in lines(500, 600):
                journald.write(line)
            assert messages(read(journald.directory, tmp_path / "t", "line 599")) == lines(500, 600)

    def test_lines_of_an_earlier_boot_are_not_lost(self, journald: Journald, tmp_path: Path) -> None:
        with journald:
            journald.write("line 0")
            read(journald.directory, tmp_path / "t", "line 0")
            for line in lines(1, 100):
                journald.write(line)
            journald.control("--sync")
        journald.boot()
        with journald:
            for line in lines(100, 200):
                journald.write(line)
            assert messages(read(journald.directory, tmp_path / "t", "line 199")) == lines(1, 200)

    def test_kill_repeats_but_loses_nothing(self, journald: Journald, tmp_path: Path) -> None:
        with journald:
            for line in lines(0, 300):
                journald.write(line)
            first = read(journald.directory, tmp_path / "t", "line 299", save=False)
            for line in lines(300, 400):
                journald.write(line)
            second = read(journald.directory, tmp_path / "t", "line 399", save=False)
            assert messages(first) == lines(0, 300)
            assert messages(second) == lines(0, 400)

    def test_beginning_of_the_first_start_does_not_move_on(self, journald: Journald, tmp_path: Path) -> None:
        """Killed before anything was delivered, the next start begins where this one did."""
        with journald:
            journald.write("line 0")

            async def main() -> None:
                refusing = Plane(lambda _: error(503))
                reader = Reader(journald.directory, tmp_path / "t", refusing, lookback=30.0)
                await reader.read(lambda: bool(refusing.batches), save=False)

            asyncio.run(main())
            stored = json.loads((tmp_path / "t" / "cursors.json").read_text())["journald"]
            assert stored["cursor"] == ""
            assert messages(read(journald.directory, tmp_path / "t", "line 0", lookback=0.0)) == ["line 0"]

    def test_vacuumed_entries_are_counted_in_a_marker(self, tmp_path: Path) -> None:
        journald = Journald(tmp_path / "journald", "SystemMaxFileSize=1M", "SystemMaxFiles=3")
        with journald:
            journald.write("line 0")
            read(journald.directory, tmp_path / "t", "line 0")
            for line in lines(1, 30_000):
                journald.write(line)
            journald.control("--sync")
            plane = read(journald.directory, tmp_path / "t", "line 29999")
            arrived = messages(plane)
            numbers = [int(text.split()[1]) for text in arrived[1:]]
            assert numbers == list(range(numbers[0], 30_000))
            assert numbers[0] > 1
            assert arrived[0] == f"telemetry gap: source=journald reason=cursor_lost lost={numbers[0] - 1}"

    @pytest.mark.parametrize("dies", [False, True], ids=["journalctl goes on", "journalctl dies of it"])
    def test_entries_vacuumed_while_reading_waits_are_counted_exactly(self, tmp_path: Path, dies: bool) -> None:
        journald = Journald(tmp_path / "journald", "SystemMaxFileSize=1M", "SystemMaxFiles=3")
        plane = Plane(lambda _: error(503))

        async def main() -> None:
            reader = Reader(journald.directory, tmp_path / "t", plane, Limits(10, 1 << 20, 0.1, 50, 16 << 20))
            async with reader.stage as stage:
                await eventually(lambda: not stage.pipeline.window.fits(1))
                for line in lines(100, 30_000):
                    journald.write(line)
                await asyncio.to_thread(journald.control, "--sync")
                if dies:  # as it may when a file goes away below it
                    oldest = min(journald.directory.rglob("system@*"), key=lambda path: path.stat().st_mtime_ns)
                    oldest.unlink()
                    os.kill(child(journalctl.PROGRAM), signal.SIGKILL)
                plane.judge = lambda _: None

                def has_arrived() -> bool:
                    stage.pipeline.wake()
                    return "line 29999" in messages(plane)

                await eventually(has_arrived, 60)

        with journald:
            for line in lines(0, 100):
                journald.write(line)
            asyncio.run(main())
        arrived = [text for text in messages(plane) if text.startswith("line")]
        marked = [int(text.rpartition("lost=")[2]) for text in messages(plane) if text.startswith("telemetry")]
        assert len(set(arrived)) + sum(marked) == 30_000
        assert sum(marked) > 0

    def test_foreign_cursor_is_noticed(self, journald: Journald, tmp_path: Path) -> None:
        with journald:
            journald.write("line 0")
            read(journald.directory, tmp_path / "t", "line 0")
            stored = json.loads((tmp_path / "t" / "cursors.json").read_text())
            foreign = stored["journald"]["cursor"].replace("s=", "s=0a", 1)
            stored["journald"]["cursor"] = foreign[:34] + foreign[36:]
            (tmp_path / "t" / "cursors.json").write_text(json.dumps(stored))
            journald.write("line 1")
            arrived = messages(read(journald.directory, tmp_path / "t", "line 1"))
            assert arrived[0] == "telemetry gap: source=journald reason=cursor_lost lost=unknown"
            assert arrived[-1] == "line 1"

    def test_odd_entries_arrive_as_the_contract_says(self, journald: Journald, tmp_path: Path) -> None:
        with journald:
            journald.write(b"line bin\xff\x00end", PRIORITY="4")
            journald.send(b"MESSAGE=line a\nMESSAGE=b\n")
            journald.send(b"PRIORITY=3\nNO_MESSAGE=1\n")
            journald.write("   ")
            journald.write(b"line " + b"x" * (20 << 20))
            journald.write("line " + "\u20ac" * 13_000)
            journald.write("line last")
            plane = Plane()

            async def main() -> None:
                reader = Reader(journald.directory, tmp_path / "t", plane)
                await reader.read(lambda: "line last" in messages(plane))
                counters = reader.stage.pipeline.counters
                assert counters.empty == 2
                assert counters.truncated == 1
                assert counters.dropped == {Dropped.OVERSIZE: 1}

            asyncio.run(main())
            binary, repeated, long, last = messages(plane)
            assert binary == "line bin\ufffdend"
            assert repeated == "line a\nb"
            assert long.endswith("\u20ac[truncated]")
            assert 16384 - 3 < len(long.encode()) <= 16384
            assert last == "line last"

    def test_filtered_entries_move_the_position(self, journald: Journald, tmp_path: Path) -> None:
        with journald:
            for line in lines(0, 10):
                journald.write(line, PRIORITY="7")
            journald.write("line 10", PRIORITY="3")
            wanted = Filter(4, [], [], "plexd.service")
            assert messages(read(journald.directory, tmp_path / "t", "line 10", wanted=wanted)) == ["line 10"]
            assert messages(read(journald.directory, tmp_path / "u", "line 10")) == lines(0, 11)

    async def test_missing_program_is_a_property_of_the_host(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(journalctl, "is_installed", lambda: False)
        reader = Reader(tmp_path, tmp_path / "t", Plane())
        await reader.journal.collect()
        assert reader.stage.pipeline.status()["sources"][1]["state"] == "unavailable"
