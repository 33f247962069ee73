"""A file that grows, is rotated, cut and replaced, while it is read and while it is not."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.linux import logfiles, tail
from plexd.linux.logfiles import FilePosition, LogFile
from plexd.linux.tail import AFTERGLOW_SECONDS, HELD_SECONDS, Hole, Item, Line, Oversized, Tail

MAX_LINE = 1 << 20
STAMPS = itertools.count(1)


class Reader:
    """Reads `path`, and remembers where it was."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self.path = path
        self.now = 0.0
        self.mark: FilePosition | None = None
        self.tail = Tail(path, None, MAX_LINE, at_end=at_end)

    def read(self, seconds: float = 0.0) -> list[str]:
        self.now += seconds
        items = self.tail.read(self.now)
        if items:
            self.mark = items[-1].mark
        return [told(item) for item in items]

    def restart(self) -> None:
        self.tail.close()
        stored = json.loads(json.dumps(self.mark._asdict())) if self.mark is not None else None
        self.tail = Tail(self.path, FilePosition.parse(stored) if stored else None, MAX_LINE, at_end=stored is not None)


def told(item: Item) -> str:
    match item:
        case Line(text):
            return text.decode()
        case Oversized():
            return "too long"
        case Hole(reason):
            return reason.value


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
    # the kernel's own stamps may be the same for some milliseconds
    os.utime(path, ns=(0, next(STAMPS)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.log"


def test_lines_come_once_and_complete(path: Path) -> None:
    add(path, "one\ntwo\nthr")
    reader = Reader(path)
    assert reader.read() == ["one", "two"]
    assert reader.read() == []
    add(path, "ee\nfour\n")
    assert reader.read() == ["three", "four"]


def test_reading_begins_behind_what_was_there(path: Path) -> None:
    add(path, "old\nbegun")
    reader = Reader(path, at_end=True)
    assert reader.read() == []
    add(path, " ended\nnew\n")
    assert reader.read() == ["begun ended", "new"]


def test_a_file_that_appears_later_is_read_from_its_beginning(path: Path) -> None:
    reader = Reader(path, at_end=True)
    assert reader.read() == []
    assert not reader.tail.is_there
    add(path, "one\n")
    assert reader.read() == ["one"]
    assert reader.tail.is_there


def test_a_line_without_end_is_one_after_a_while(path: Path) -> None:
    add(path, "one\nhalf")
    reader = Reader(path)
    assert reader.read() == ["one"]
    assert reader.read(HELD_SECONDS - 1) == []
    assert reader.read(2) == ["half"]


def test_a_line_that_is_too_long_is_skipped(path: Path) -> None:
    add(path, "one\n" + "x" * (3 * MAX_LINE) + "\ntwo\n")
    reader = Reader(path)
    found = [text for _ in range(5) for text in reader.read()]
    assert found == ["one", "too long", "two"]


def test_a_file_renamed_is_read_to_its_end_before_the_new_one(path: Path) -> None:
    add(path, "one\n")
    reader = Reader(path)
    assert reader.read() == ["one"]
    path.rename(path.with_name("a.log.1"))
    add(path, "three\n")
    assert reader.read() == []
    add(path.with_name("a.log.1"), "two\nhalf")  # whoever writes has not noticed yet
    assert reader.read() == ["two"]
    assert reader.read(AFTERGLOW_SECONDS + 1) == ["half", "three"]


def test_a_file_cut_by_copytruncate_begins_anew_with_a_hole(path: Path) -> None:
    add(path, "one\ntwo\nhalf")
    reader = Reader(path)
    assert reader.read() == ["one", "two"]
    shutil.copy(path, path.with_name("a.log.1"))
    path.write_text("three\n")
    assert reader.read() == ["half", "truncated_file", "three"]


def test_a_file_rewritten_to_more_than_was_read_is_noticed(path: Path) -> None:
    add(path, "one\n")
    reader = Reader(path)
    assert reader.read() == ["one"]
    path.write_text("two\nthree\n")
    assert reader.read() == ["truncated_file", "two", "three"]


def test_a_file_rotated_twice_between_two_looks_is_read_with_those_after_it(path: Path) -> None:
    add(path, "one\n")
    reader = Reader(path)
    reader.read()
    path.rename(path.with_name("a.log.2"))
    add(path, "two\n")
    path.rename(path.with_name("a.log.1"))
    add(path, "three\n")
    assert reader.read() == []
    assert reader.read(AFTERGLOW_SECONDS + 1) == ["two", "three"]


# across restarts


@pytest.mark.parametrize("when", ["before rotated files are listed", "before the path is opened"])
def test_a_rotation_while_an_earlier_one_is_looked_into_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    once_more = ["three\n"]

    def rotate_once_more() -> None:
        if once_more:
            path.with_name("a.log.1").rename(path.with_name("a.log.2"))
            path.rename(path.with_name("a.log.1"))
            add(path, once_more.pop())

    def list_late(path: Path) -> list[Path]:
        rotate_once_more()
        return siblings(path)

    def open_late(file: LogFile, opening: Path) -> None:
        if opening == path:
            rotate_once_more()
        opened(file, opening)

    siblings, opened = logfiles.siblings, LogFile.__init__
    add(path, "one\n")
    reader = Reader(path)
    assert reader.read() == ["one"]
    path.rename(path.with_name("a.log.1"))
    add(path, "two\n")
    assert reader.read() == []
    if when == "before the path is opened":
        monkeypatch.setattr(LogFile, "__init__", open_late)
    else:
        monkeypatch.setattr(logfiles, "siblings", list_late)
    assert reader.read(AFTERGLOW_SECONDS) + reader.read(AFTERGLOW_SECONDS) == ["two", "three"]
    assert once_more == []


def test_rotated_files_are_let_go_where_one_may_not_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_some(file: LogFile, opening: Path) -> None:
        if opening.name == "a.log.1":
            raise PermissionError(errno.EACCES, "no")
        opened(file, opening)

    opened = LogFile.__init__
    for number in (1, 2, 3):
        add(path.with_name(f"a.log.{number}"), f"{number}\n")
    monkeypatch.setattr(LogFile, "__init__", open_some)
    held = Path("/proc/self/fd")
    before = len(list(held.iterdir()))
    with pytest.raises(PermissionError):
        logfiles.open_rotated(path)
    assert len(list(held.iterdir())) == before


def test_a_restart_goes_on_where_reading_ended(path: Path) -> None:
    add(path, "one\ntwo\nhalf")
    reader = Reader(path)
    reader.read()
    reader.restart()
    add(path, " whole\n")
    assert reader.read() == ["half whole"]


def test_rotations_during_the_restart_lose_nothing(path: Path) -> None:
    add(path, "one\n")
    reader = Reader(path)
    reader.read()
    add(path, "two\n")
    path.rename(path.with_name("a.log.2"))
    add(path.with_name("a.log.1"), "three\n")
    add(path.with_name("a.log.0.gz"), "packed\n")
    add(path, "four\n")
    reader.restart()
    assert reader.read() == ["two", "three", "four"]


def test_a_log_rotated_by_date_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    add(path, "one\n")
    reader = Reader(path)
    reader.read()
    add(path, "two\n")
    path.rename(tmp_path / "audit-2026-03-01T10-20-30.123.log")
    add(path, "three\n")
    add(tmp_path / "audit-policy.log", "of no concern\n")
    reader.restart()
    assert reader.read() == ["two", "three"]


def test_a_file_that_is_gone_after_the_restart_is_a_hole(path: Path) -> None:
    add(path, "one\n")
    reader = Reader(path)
    reader.read()
    path.unlink()
    reader.restart()
    assert reader.read() == []
    add(path.with_name("b.log"), "takes the inode\n")
    add(path, "two\n")
    assert reader.read() == ["rotated_away", "two"]


def test_a_reused_inode_is_no_known_file(path: Path) -> None:
    add(path, "one\ntwo\n")
    reader = Reader(path)
    reader.read()
    assert reader.mark is not None
    path.write_text("something else\nand more\n")  # the same inode
    reader.restart()
    assert reader.read() == ["rotated_away", "something else", "and more"]


def test_a_file_cut_during_the_restart_is_a_hole(path: Path) -> None:
    add(path, "one\ntwo\n")
    reader = Reader(path)
    reader.read()
    path.write_text("x\n")
    reader.restart()
    assert reader.read() == ["truncated_file", "x"]


def test_a_file_first_seen_empty_is_known_again(path: Path) -> None:
    path.touch()
    reader = Reader(path)
    reader.read()
    add(path, "one\n")
    assert reader.read() == ["one"]
    path.write_text("two\n")
    reader.restart()
    assert reader.read() == ["rotated_away", "two"]


def test_what_is_no_file_is_not_read(path: Path) -> None:
    path.mkdir()
    assert Reader(path).read() == []


def test_a_large_file_is_read_in_turns(path: Path) -> None:
    add(path, "x" * 99 + "\n")
    with path.open("a") as file:
        file.writelines("x" * 99 + "\n" for _ in range(30_000))
    reader = Reader(path)
    sizes = []
    while found := reader.read():
        sizes.append(100 * len(found))
    assert sum(sizes) == 3_000_100
    assert max(sizes) <= tail.TURN_BYTES + 100


STEPS = st.lists(
    st.sampled_from(["add", "add", "add half", "read", "rename", "rename twice", "cut", "restart", "wait"]), max_size=30
)


@given(STEPS)
def test_no_line_is_lost_or_out_of_order_but_where_a_hole_is_shown(steps: list[str]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "a.log"
        reader = Reader(path)
        written = rotations = 0
        found: list[str] = []

        def rotate() -> None:
            nonlocal rotations
            if path.exists():
                rotations += 1
                path.rename(path.with_name(f"a.log.{10_000 - rotations}"))

        add(path, "begin\n")  # a file that nobody saw before it was rotated is nobody's
        found += reader.read()
        for step in steps:
            match step:
                case "add":
                    add(path, f"{written}\n")
                    written += 1
                case "add half":
                    add(path, f"{written} ")
                case "read":
                    found += reader.read(1)
                case "rename" | "rename twice":
                    rotate()
                    if step == "rename twice":
                        add(path, f"{written}\n")
                        written += 1
                        rotate()
                case "cut":
                    if path.exists():
                        for _ in range(3):  # a file that nobody looked at before it was cut is nobody's
                            found += reader.read(AFTERGLOW_SECONDS + 1)
                        path.write_text("")
                case "restart":
                    reader.restart()
                case "wait":
                    found += reader.read(AFTERGLOW_SECONDS + HELD_SECONDS)
        add(path, f"{written}\n")  # a hole shows where reading goes on
        written += 1
        for _ in range(2 * len(steps) + 4):
            found += reader.read(AFTERGLOW_SECONDS + 1)
        reader.tail.close()
    numbers = [int(text.split()[-1]) for text in found if text[:1].isdigit() and not text.endswith(" ")]
    holes = [text for text in found if text in {"truncated_file", "rotated_away"}]
    firsts = list(dict.fromkeys(numbers))
    if not holes:
        assert set(range(written)) <= set(numbers)
        assert firsts == sorted(firsts)
