"""Linux audit events on their way to the spool, and what is known of those that were missed."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from plexd.audit import linux, types
from plexd.linux.audit import Overrun
from plexd.masking import register_secret
from plexd.store.cursors import Cursors
from plexd.store.spool import Spool
from plexd.telemetry.audit_encoder import AuditEncoder
from plexd.telemetry.auditd import Events, KernelAudit
from plexd.telemetry.counters import Dropped
from plexd.telemetry.spooled import Spooled
from plexd.telemetry.window import Limits
from tests.audit.captures import CAPTURED, datagram, logged
from tests.node_harness import unix_time
from tests.telemetry.harness import Plane, Stage

pytestmark = pytest.mark.virtual_time

SYSCALL = 'arch=c000003e syscall=257 success=yes exit=3 pid={pid} uid=0 comm="x"'


class FakeStream:
    """What the kernel multicasts, by hand."""

    def __init__(self, *items: bytes | Overrun) -> None:
        self.items: list[bytes | Overrun] = list(items)
        self.arrived = asyncio.Event()

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.items.clear()

    def send(self, *items: bytes | Overrun) -> None:
        self.items += items
        self.arrived.set()

    async def read(self) -> list[bytes | Overrun]:
        while not self.items:
            self.arrived.clear()
            await self.arrived.wait()
        found, self.items = self.items, []
        return found


class Life:
    """One life of the agent over `directory`; `log_path` is where auditd would write."""

    def __init__(
        self,
        directory: Path,
        exclude_types: frozenset[int] = frozenset(),
        *,
        backfill: bool = True,
        batch_seconds: float = 10.0,
        max_raw: int = 65536,
    ) -> None:
        self.cursors = Cursors(directory / "telemetry")
        self.cursors.load()
        self.plane = Plane()
        self.stage = Stage(self.plane, Limits(100, 1 << 20, batch_seconds, 1000, 16 << 20))
        self.pipeline = self.stage.pipeline
        form = AuditEncoder("host", max_raw, unix_time)
        self.pipeline._form = form
        self.spool = Spool(directory / "telemetry" / "spool", 4 << 20)
        self.spooled = Spooled("spool", self.pipeline, self.spool, self.cursors, "s")
        self.events = Events(form, directory, exclude_types)
        self.log = directory / "audit.log"
        self.audit = KernelAudit(self.pipeline, self.spooled, self.cursors, self.events, self.log if backfill else None)
        self.stage.pipeline.sources[:] = [self.spooled]

    @property
    def told(self) -> list[str]:
        """Of each entry that arrived what it says, in order."""
        return [
            f"gap {entry['object']['reason']}"
            if entry["event_type"] == "TELEMETRY_GAP"
            else entry["object"].get("n", "?")
            for entry in self.plane.taken
        ]


async def live(life: Life, stream: FakeStream, seconds: float = 15.0) -> None:
    """Listen that long, then end in order."""
    async with life.stage:
        listening = asyncio.create_task(life.audit.collect(stream))  # type: ignore[arg-type]
        await asyncio.sleep(seconds)
        listening.cancel()
        await asyncio.wait({listening})
        assert listening.cancelled()
        await life.spooled.flush()
        await asyncio.sleep(20)
        await life.cursors.save()


def said(n: int, at: int | None = None) -> bytes:
    """Event n, at that second."""
    return datagram(types.USER, f"audit({at or n}.000:{n}): pid=7 uid=0 msg='n={n} res=success'".encode())


def line(n: int, at: int | None = None) -> str:
    return f"type=USER msg=audit({at or n}.000:{n}): pid=7 uid=0 msg='n={n} res=success'\n"


async def test_events_reach_the_control_plane_in_order(tmp_path: Path) -> None:
    life = Life(tmp_path)
    stream = FakeStream(*(said(n) for n in range(1, 3000)))
    await live(life, stream)
    assert life.told == [str(n) for n in range(1, 3000)]
    row = life.pipeline.row("auditd").as_json()
    assert (row["entries"], row["position"]) == (2999, "2999.000:2999")


async def test_an_event_is_one_entry_with_all_its_records(tmp_path: Path) -> None:
    life = Life(tmp_path)
    records = [datagram(int(raw[:4]), raw[5:]) for raw in (CAPTURED / "multicast.txt").read_bytes().splitlines()]
    await live(life, FakeStream(*records))
    assert len(life.plane.taken) == 24
    assert sum(entry["raw"].count("\n") + 1 for entry in life.plane.taken) == len(logged())


async def test_an_overrun_is_marked_where_it_was_and_counted(tmp_path: Path) -> None:
    life = Life(tmp_path)
    await live(life, FakeStream(said(1), Overrun(), said(5)))
    assert life.told == ["1", "gap kernel_overrun", "5"]
    marker = life.plane.taken[1]
    assert marker["object"]["source"] == "auditd"
    assert marker["object"]["lost"] == -1
    assert marker["object"]["since"] == "1970-01-01T00:00:01Z"
    assert life.pipeline.counters.kernel_lost == 1


async def test_many_overruns_in_a_minute_make_two_markers(tmp_path: Path) -> None:
    life = Life(tmp_path)
    await live(life, FakeStream(*[Overrun()] * 30), seconds=90)
    assert life.told == ["gap kernel_overrun"] * 2
    assert life.pipeline.counters.kernel_lost == 30


async def test_an_event_without_end_is_sent_when_the_agent_stops(tmp_path: Path) -> None:
    life = Life(tmp_path)
    await live(life, FakeStream(datagram(types.SYSCALL, b"audit(1.000:1): syscall=1 arch=c000003e")), seconds=0.5)
    assert [entry["action"] for entry in life.plane.taken] == ["write"]


async def test_what_is_excluded_is_filtered(tmp_path: Path) -> None:
    life = Life(tmp_path, frozenset({1124}))
    await live(life, FakeStream(datagram(1124, b"audit(1.000:1): pid=7 msg='data=7073'"), said(2)))
    assert life.told == ["2"]
    assert life.pipeline.counters.filtered == 1


async def test_the_agents_own_writing_makes_no_entries(tmp_path: Path) -> None:
    life = Life(tmp_path)
    own = [
        datagram(types.SYSCALL, b"audit(1.000:1): " + SYSCALL.format(pid=os.getpid()).encode()),
        datagram(types.PATH, f'audit(1.000:1): item=0 name="{tmp_path}/telemetry/x" nametype=CREATE'.encode()),
        datagram(types.EOE, b"audit(1.000:1): "),
    ]
    await live(life, FakeStream(*own, said(2)))
    assert life.told == ["2"]
    assert +life.pipeline.counters.dropped == {Dropped.SELF: 1}


async def test_a_malformed_datagram_is_counted(tmp_path: Path) -> None:
    life = Life(tmp_path)
    await live(life, FakeStream(datagram(types.USER, b"nonsense"), said(2)))
    assert life.told == ["2"]
    assert +life.pipeline.counters.dropped == {Dropped.MALFORMED: 1}


async def test_an_event_that_cannot_be_understood_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = linux.normalise

    def wrong(event: Any, hostname: str) -> Any:
        if event.id.serial == 2:
            raise IndexError("a mistake")
        return right(event, hostname)

    monkeypatch.setattr(linux, "normalise", wrong)
    life = Life(tmp_path)
    await live(life, FakeStream(said(1), said(2), said(3)))
    assert life.told == ["1", "3"]
    assert +life.pipeline.counters.dropped == {Dropped.MALFORMED: 1}


async def test_long_text_is_cut_and_counted(tmp_path: Path) -> None:
    life = Life(tmp_path, max_raw=1024)
    await live(life, FakeStream(datagram(types.USER, f"audit(1.000:1): pid=7 msg='n={'é' * 2000}'".encode())))
    raw = life.plane.taken[0]["raw"]
    assert 1022 <= len(raw.encode()) <= 1024
    assert raw.endswith("é[truncated]")
    assert life.pipeline.counters.truncated == 1


async def test_the_nodes_own_secrets_do_not_travel(tmp_path: Path) -> None:
    register_secret("the-bootstrap-token")
    life = Life(tmp_path)
    command = b'audit(1.000:1): argc=2 a0="plexd" a1="the-bootstrap-token"'
    await live(life, FakeStream(datagram(types.EXECVE, command)))
    assert 'a1="[redacted]"' in life.plane.taken[0]["raw"]


async def test_what_the_disk_refused_is_not_taken_for_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    life = Life(tmp_path)
    stream = FakeStream(said(1))
    with monkeypatch.context() as full:
        full.setattr(life.spool, "append", refuse)
        async with life.stage:
            listening = asyncio.create_task(life.audit.collect(stream))  # type: ignore[arg-type]
            await asyncio.sleep(5)
            assert life.pipeline.row("auditd").position() == ""
            full.undo()
            stream.send(said(2))
            await asyncio.sleep(20)
            assert life.pipeline.row("auditd").position() == "2.000:2"
            listening.cancel()
            await asyncio.wait({listening})
    assert life.told == ["1", "2"]


# what was missed


async def after(directory: Path, *live_events: bytes, **settings: Any) -> Life:
    """A life that was told events 1 to 3, and another one after it."""
    await live(Life(directory), FakeStream(*(said(n) for n in range(1, 4))))
    life = Life(directory, **settings)
    await live(life, FakeStream(*live_events))
    return life


async def test_what_happened_meanwhile_is_read_from_the_log_of_auditd(tmp_path: Path) -> None:
    (tmp_path / "audit.log.1").write_text(line(1) + line(2) + line(3))
    (tmp_path / "audit.log").write_text(line(4) + line(5))
    life = await after(tmp_path, said(6))
    assert life.told == ["4", "5", "6"]


async def test_what_both_bring_comes_once(tmp_path: Path) -> None:
    await live(Life(tmp_path), FakeStream(said(1)))
    now = int(unix_time())
    whole = f"type=SYSCALL msg=audit({now}.000:3): arch=c000003e syscall=1 success=yes\n"
    (tmp_path / "audit.log").write_text(line(1) + line(2, now) + whole + "type=CWD msg=audit(")
    stream = FakeStream(
        said(2, now),
        datagram(types.SYSCALL, f"audit({now}.000:3): arch=c000003e syscall=1 success=yes".encode()),
        datagram(types.CWD, f'audit({now}.000:3): cwd="/"'.encode()),
        datagram(types.EOE, f"audit({now}.000:3): ".encode()),
        said(4, now),
    )
    life = Life(tmp_path)
    await live(life, stream)
    assert life.told == ["2", "?", "4"]
    assert life.plane.taken[1]["raw"].count("\n") == 1


@pytest.mark.parametrize("content", [None, "", line(9), line(2)])
async def test_what_the_log_cannot_tell_is_a_gap(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "audit.log").write_text(content)
    life = await after(tmp_path, said(12))
    assert life.told == ["gap agent_down", *(["9"] if content == line(9) else []), "12"]
    assert life.plane.taken[0]["object"]["since"] == "1970-01-01T00:00:03Z"


async def test_lines_of_the_log_that_are_no_records_are_counted(tmp_path: Path) -> None:
    (tmp_path / "audit.log").write_text("junk\n" + line(3) + "junk\n" + line(4) + "type=?\n")
    life = await after(tmp_path)
    assert life.told == ["4"]
    assert +life.pipeline.counters.dropped == {Dropped.MALFORMED: 2}


async def test_without_backfill_every_start_shows_the_gap(tmp_path: Path) -> None:
    (tmp_path / "audit.log").write_text(line(3) + line(4))
    assert (await after(tmp_path, said(5), backfill=False)).told == ["gap agent_down", "5"]


async def test_the_first_start_has_no_gap(tmp_path: Path) -> None:
    (tmp_path / "audit.log").write_text(line(3) + line(4))
    life = Life(tmp_path)
    await live(life, FakeStream(said(5)))
    assert life.told == ["5"]


async def test_positions_that_cannot_be_read_are_a_gap(tmp_path: Path) -> None:
    await live(Life(tmp_path), FakeStream(said(1)))
    (tmp_path / "telemetry" / "cursors.json").write_text("{")
    life = Life(tmp_path)
    await live(life, FakeStream(said(2)))
    assert life.told == ["1", "gap corrupt_state", "2"]  # where reading the spool began is not known either


async def test_the_last_event_is_kept_with_the_positions(tmp_path: Path) -> None:
    await live(Life(tmp_path), FakeStream(said(1), said(2)))
    stored = json.loads((tmp_path / "telemetry" / "cursors.json").read_text())
    assert stored["auditd"] == {"last_event": "2.000:2"}
