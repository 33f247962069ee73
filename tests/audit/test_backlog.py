"""What of auditd's log is new."""

from __future__ import annotations

import pytest

from plexd.audit.backlog import Backlog, holds
from plexd.audit.records import EventId


def lines(*records: str) -> list[bytes]:
    """`7a` is record a of event 7, which came a second after event 6."""
    return [f"type=CWD msg=audit({record[:-1]}.000:{record[:-1]}): cwd={record}\n".encode() for record in records]


def fresh(known: str, *records: str, is_complete: bool = True) -> list[str]:
    backlog = Backlog(EventId(int(known) * 1000, int(known)), is_complete=is_complete)
    return [record.body.partition("=")[2] for record in backlog.records(lines(*records))]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (["1a", "2a", "2b", "3a", "4a"], ["3a", "4a"]),
        (["1a", "2a", "3a", "2b", "3b"], ["3a", "3b"]),
        (["1a", "2a", "1b", "3a"], ["3a"]),  # 1 began before 2, so it has come out already
        (["9a", "2a", "1a", "3a"], ["1a", "3a"]),  # the clock was set back
        (["2a"], []),
        ([], []),
    ],
)
def test_what_follows_the_last_known_event_is_new(records: list[str], expected: list[str]) -> None:
    assert fresh("2", *records) == expected


def test_without_the_last_known_event_time_decides() -> None:
    assert fresh("2", "1a", "3a", "4a", "1b", is_complete=False) == ["3a", "4a"]


def test_lines_that_are_no_records_are_counted_once_they_are_new() -> None:
    backlog = Backlog(EventId(2000, 2), is_complete=True)
    taken = list(backlog.records([b"junk\n", *lines("2a"), b"junk\n", *lines("3a"), b"\n"]))
    assert [record.event.serial for record in taken] == [3]
    assert backlog.malformed == 1


def test_whether_an_event_is_there() -> None:
    assert holds(lines("1a", "12a"), EventId(12000, 12))
    assert not holds(lines("1a", "12a"), EventId(2000, 2))
