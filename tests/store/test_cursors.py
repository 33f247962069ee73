"""Positions on disk."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from plexd.store import cursors as module
from plexd.store.cursors import Cursors
from plexd.store.files import write_whole
from plexd.store.quarantine import MAX_BYTES, quarantine

pytestmark = pytest.mark.virtual_time


def loaded(directory: Path) -> Cursors:
    cursors = Cursors(directory)
    cursors.load()
    return cursors


def test_first_start_is_known(tmp_path: Path) -> None:
    assert loaded(tmp_path / "telemetry").is_new
    asyncio.run(loaded(tmp_path / "telemetry").save())
    assert not loaded(tmp_path / "telemetry").is_new


async def test_positions_come_back(tmp_path: Path) -> None:
    cursors = loaded(tmp_path / "telemetry")
    assert cursors.register("journald", lambda: {"cursor": "s=1"}) is None
    saved: list[Any] = []
    cursors.register("auditd", lambda: {"last_event": "1:2"}, saved.append)
    assert await cursors.save()
    assert saved == [{"last_event": "1:2"}]
    cursors = loaded(tmp_path / "telemetry")
    assert cursors.register("journald", dict) == {"cursor": "s=1"}
    assert (tmp_path / "telemetry" / "cursors.json").stat().st_mode & 0o777 == 0o600


async def test_position_that_is_registered_during_a_save_is_in_the_next(tmp_path: Path) -> None:
    cursors = loaded(tmp_path / "telemetry")
    saved: list[str] = []
    cursors.register("journald", lambda: {"cursor": "s=1"}, lambda _: saved.append("journald"))
    saving = asyncio.create_task(cursors.save())
    await asyncio.sleep(0)
    cursors.register("auditd", lambda: {"last_event": "1:2"}, lambda _: saved.append("auditd"))
    assert await saving
    assert saved == ["journald"]
    assert await cursors.save()
    assert saved == ["journald", "journald", "auditd"]


def test_positions_of_a_pipeline_that_is_off_stay(tmp_path: Path) -> None:
    first = loaded(tmp_path / "telemetry")
    first.register("journald", lambda: {"cursor": "s=1"})
    asyncio.run(first.save())
    second = loaded(tmp_path / "telemetry")
    second.register("files", lambda: {"/a": {}})
    asyncio.run(second.save())
    assert loaded(tmp_path / "telemetry").register("journald", dict) == {"cursor": "s=1"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version":2}', b"\xff", b"[" * 100_000])
def test_unreadable_file_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    directory = tmp_path / "telemetry"
    directory.mkdir()
    (directory / "cursors.json").write_bytes(content)
    with capture_logs() as logs:
        cursors = loaded(directory)
    assert (cursors.is_new, cursors.was_corrupt) == (True, True)
    assert [line["log_level"] for line in logs] == ["error"]
    (kept,) = directory.iterdir()
    assert kept.name.startswith("cursors.json.corrupt-")
    assert kept.read_bytes() == content


@pytest.mark.virtual_time
async def test_positions_are_written_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    monkeypatch.setattr(module, "write_whole", lambda _path, raw: writes.append(raw))
    cursors = loaded(tmp_path / "telemetry")
    positions: list[int] = []
    cursors.register("journald", lambda: len(positions))
    running = asyncio.create_task(cursors.run())
    for number in range(30):
        positions.append(number)
        cursors.touch()
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)
    running.cancel()
    assert 3 <= len(writes) <= 5
    assert json.loads(writes[-1])["journald"] == 30


async def test_disk_that_refuses_is_said_once_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = write_whole

    def refuse(_path: Path, _raw: bytes) -> None:
        raise OSError(28, "No space left on device")

    with capture_logs() as logs:
        cursors = loaded(tmp_path / "telemetry")
        cursors.register("journald", lambda: 1)
        monkeypatch.setattr(module, "write_whole", refuse)
        running = asyncio.create_task(cursors.run())
        cursors.touch()
        await asyncio.sleep(10)
        assert cursors.problem == "No space left on device"
        monkeypatch.setattr(module, "write_whole", real)
        await asyncio.sleep(2)
        assert cursors.problem == ""
        running.cancel()
    assert [line["event"] for line in logs] == ["positions not saved", "positions saved again"]
    assert json.loads((tmp_path / "telemetry" / "cursors.json").read_bytes())["journald"] == 1


def test_quarantine_is_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    bodies = [os.urandom(500_000).hex().encode() for _ in range(10)]  # half of it is left after compression
    written = [quarantine(tmp_path / "quarantine", "logs", bodies) for _ in range(4)]
    left = set((tmp_path / "quarantine").iterdir())
    assert sum(path.stat().st_size for path in left) <= MAX_BYTES
    assert written[0] not in left
    assert written[-1] in left
    assert written[-1].stat().st_mode & 0o777 == 0o600
