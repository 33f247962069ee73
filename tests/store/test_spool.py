"""A queue of lines on disk: order, groups, room, torn lines, kill -9."""

import errno
import os
from pathlib import Path

import pytest

from plexd.store import spool as spools
from plexd.store.spool import Spool, SpoolPosition
from tests.store.crash import crashes

MAX = 4 << 20


def opened(path: Path, position: SpoolPosition | None = None, max_bytes: int = MAX) -> Spool:
    spool = Spool(path, max_bytes)
    spool.open(position)
    return spool


def lines(start: int, count: int, size: int = 20) -> list[bytes]:
    return [b'{"n":%d,"pad":"%s"}' % (n, b"x" * size) for n in range(start, start + count)]


def read_all(spool: Spool) -> list[bytes]:
    found: list[bytes] = []
    while chunk := spool.read():
        found += [line.body for line in chunk]
    return found


def test_lines_come_out_in_order_over_segments(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    for start in range(0, 3000, 100):
        assert spool.append(lines(start, 100, 900)) == 0
    assert len(list((tmp_path / "spool").iterdir())) > 2
    assert spool.unread == 3000
    assert read_all(spool) == lines(0, 3000, 900)
    assert spool.unread == 0


def test_reader_goes_on_where_an_earlier_process_was(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    spool.append(lines(0, 10))
    position = spool.read()[3].end
    again = opened(tmp_path / "spool", position)
    assert again.unread == 6
    assert read_all(again) == lines(4, 6)
    again.append(lines(10, 2))
    assert read_all(again) == lines(10, 2)


def test_reader_of_a_directory_that_was_emptied_misses_nothing_that_comes_after(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool", SpoolPosition(5, 4000))
    spool.append(lines(0, 10))
    assert read_all(spool) == lines(0, 10)
    assert spool.unread == 0


def test_trim_deletes_what_was_delivered_and_nothing_else(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    for start in range(0, 3000, 100):
        spool.append(lines(start, 100, 900))
    ends = []
    while chunk := spool.read():
        ends += [line.end for line in chunk]
    spool.trim(ends[1500])
    left = sorted(int(path.stem) for path in (tmp_path / "spool").iterdir())
    assert left[0] == ends[1500].segment
    assert read_all(opened(tmp_path / "spool", ends[1500])) == lines(1501, 1499, 900)


def test_end_of_a_finished_segment_is_named_as_the_start_of_the_next(tmp_path: Path) -> None:
    """Else a segment deleted after its delivery would look like one that is missing."""
    spool = opened(tmp_path / "spool")
    for start in range(0, 3000, 100):
        spool.append(lines(start, 100, 900))
    first = [line.end for line in iter_lines(spool) if line.end.segment == 1]
    position = spool.normalise(first[-1])
    assert position == SpoolPosition(2, 0)
    spool.trim(position)
    assert not Spool(tmp_path / "spool", MAX).open(position).is_gap
    assert Spool(tmp_path / "spool", MAX).open(first[0]).is_gap


def iter_lines(spool: Spool) -> list[spools.Line]:
    found: list[spools.Line] = []
    while chunk := spool.read():
        found += chunk
    return found


def test_oldest_segment_gives_way_and_its_unread_lines_are_counted(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    spool.append(lines(0, 10, 900))
    read = len(spool.read())
    lost = sum(spool.append(lines(start, 100, 900)) for start in range(10, 6010, 100))
    assert spool.bytes <= MAX
    assert lost > 0
    assert read + lost + spool.unread == 6010
    assert read_all(spool) == lines(6010 - (6010 - read - lost), 6010 - read - lost, 900)


def test_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    spool.append(lines(0, 3))
    (segment,) = (tmp_path / "spool").iterdir()
    segment.write_bytes(segment.read_bytes() + b'{"n":3,')
    again = Spool(tmp_path / "spool", MAX)
    assert again.open(None).torn == 1
    again.append(lines(3, 1))
    assert read_all(again) == lines(0, 4)


def test_full_disk_leaves_nothing_of_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path / "spool")
    spool.append(lines(0, 3))
    real = os.pwrite

    def full(file: int, data: memoryview, offset: int) -> int:
        if len(data) > 10:
            return real(file, data[:10], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        spool.append(lines(3, 3))
    monkeypatch.undo()
    assert spool.unread == 3
    spool.append(lines(6, 1))
    assert read_all(spool) == lines(0, 3) + lines(6, 1)


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    opened(tmp_path / "spool").append(lines(0, 1))
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "spool").iterdir()} == {0o600}


def test_kill_at_any_moment_loses_nothing_that_append_returned_for(tmp_path: Path) -> None:
    everything = lines(0, 8, 300)

    def work(n: int) -> None:
        spool = opened(tmp_path / str(n), max_bytes=4000)
        for number, line in enumerate(everything):
            spool.append([line])
            (tmp_path / f"{n}.done").write_bytes(b"%d" % (number + 1))

    deaths = 0
    for n in crashes(work):
        deaths += 1
        done = tmp_path / f"{n}.done"
        acknowledged = int(done.read_bytes() or b"0") if done.exists() else 0
        found = read_all(opened(tmp_path / str(n), max_bytes=4000))
        assert found == everything[: len(found)]
        assert len(found) >= acknowledged
    assert deaths > 20
