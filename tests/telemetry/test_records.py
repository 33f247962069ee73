"""Entries as text: cut, cleaned, stamped, filtered."""

import calendar
import json
import time

import pytest

from plexd import masking
from plexd.telemetry.gaps import Gap, Reason
from plexd.telemetry.lines import Lines
from plexd.telemetry.records import LogEncoder, audit_marker, log_marker, metric_point, shortened, truncate
from plexd.telemetry.severity import NAMES, Filter, parse_severity
from plexd.telemetry.timestamps import parse_stamp, split_priority
from plexd.wire.models import AuditEntry, LogEntry, MetricPoint
from plexd.wire.reading import load, read_value

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
@pytest.mark.parametrize("size", [100, 101, 102, 103, 1000])
def test_cut_text_never_exceeds_the_limit_nor_splits_a_character(character: str, size: int) -> None:
    text, cut = truncate(character * size, 100)
    raw = text.encode()
    assert len(raw) <= 100
    assert cut == (len((character * size).encode()) > 100)
    assert not cut or (text.endswith("[truncated]") and len(raw) > 100 - 4)


def test_log_entry_is_what_the_wire_wants() -> None:
    body, cut = LogEncoder("journald", "edge-03", 16384).write(
        1772615702118402, "ssh.service", 'a "b"\n\0c\ud800', "info"
    )
    entry = json.loads(body)
    assert not cut
    assert entry == {
        "timestamp": "2026-03-04T09:15:02.118402Z", "source": "journald", "unit": "ssh.service",
        "message": 'a "b"\nc\ufffd', "severity": "info", "hostname": "edge-03",
    }  # fmt: skip
    read_value(LogEntry, load(body))


@pytest.mark.parametrize(
    ("microseconds", "stamp"),
    [(0, "1970-01-01T00:00:00Z"), (1_500_000, "1970-01-01T00:00:01.5Z"), (10**18, "9999-12-31T23:59:59Z")],
)
def test_stamp_has_no_trailing_zeros(microseconds: int, stamp: str) -> None:
    body, _ = LogEncoder("a", "b", 1000).write(microseconds, "", "m", "info")
    assert json.loads(body)["timestamp"] == stamp


def test_own_secrets_are_redacted_before_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_secrets", set())
    monkeypatch.setattr(masking, "_pattern", None)
    masking.register_secret("s3cr3t-token-value")
    body, _ = LogEncoder("a", "b", 300).write(0, "", "x" * 280 + "s3cr3t-token-value" + "y" * 50, "info")
    message = json.loads(body)["message"]
    assert "s3cr3t" not in message
    assert json.loads(LogEncoder("a", "b", 300).write(0, "", "key=s3cr3t-token-value.", "info")[0])["message"] == (
        "key=[redacted]."
    )


def test_markers_and_points_are_what_the_wire_wants() -> None:
    gap = Gap("app.log", Reason.ROTATED_AWAY, None, NOW, None)
    assert json.loads(log_marker(gap, NOW, "h", "plexd.service"))["message"] == (
        "telemetry gap: source=app.log reason=rotated_away lost=unknown"
    )
    marker = json.loads(audit_marker(gap._replace(lost=3), NOW, "h"))
    assert marker["object"] == {
        "source": "app.log", "reason": "rotated_away", "lost": 3, "since": "2027-01-15T08:00:00Z", "until": "",
    }  # fmt: skip
    read_value(AuditEntry, load(audit_marker(gap, NOW, "h")))
    point = metric_point("2027-01-15T08:00:00Z", "system", {"a": 1.5, "b": float("nan"), "c": float("inf")})
    assert json.loads(point) == {"timestamp": "2027-01-15T08:00:00Z", "group": "system", "data": {"a": 1.5}}
    read_value(MetricPoint, load(point))


def test_only_an_entry_with_much_text_can_be_shortened() -> None:
    assert shortened(b'{"message":"short"}', "message") is None
    assert shortened(b'{"group":"system","data":{}}', "message") is None
    cut = shortened(json.dumps({"raw": "x" * 5000, "action": "a"}).encode(), "raw")
    assert cut is not None
    assert json.loads(cut) == {"raw": "x" * 1013 + "[truncated]", "action": "a"}


def test_lines_are_split_however_they_arrive() -> None:
    data = b"one\n\nthree is long\nrest"
    for size in range(1, len(data) + 1):
        lines = Lines(5)
        found = [line for start in range(0, len(data), size) for line in lines.feed(data[start : start + size])]
        assert found == [(b"one", 3), (b"", 0), (b"three ", 13)]
        assert lines.unfinished == (b"rest", 4)


def test_endless_line_keeps_only_its_beginning() -> None:
    lines = Lines(100)
    for _ in range(1000):
        assert lines.feed(b"x" * 1000) == []
    assert lines.unfinished == (b"x" * 101, 1_000_000)
    assert lines.feed(b"\nnext\n") == [(b"x" * 101, 1_000_000), (b"next", 4)]


@pytest.mark.parametrize(
    ("line", "severity", "rest"),
    [("<0>a", 0, "a"), ("<191>a", 7, "a"), ("<192>a", None, "<192>a"), ("<x>a", None, "<x>a"), ("a<3>", None, "a<3>")],
)
def test_priority_in_front_of_a_line_is_taken_off(line: str, severity: int | None, rest: str) -> None:
    assert split_priority(line) == (severity, rest)


def local(year: int, month: int, day: int) -> int:
    return int(time.mktime((year, month, day, 9, 15, 2, 0, 0, -1))) * 1_000_000


@pytest.mark.parametrize(
    ("line", "microseconds"),
    [
        ("2026-03-04T09:15:02Z x", calendar.timegm((2026, 3, 4, 9, 15, 2)) * 1_000_000),
        ("2026-03-04T09:15:02.118402123+02:00 x", calendar.timegm((2026, 3, 4, 7, 15, 2)) * 1_000_000 + 118402),
        ("2026-03-04 09:15:02 x", None),
        ("2026-13-04T09:15:02Z", None),
        ("Jan 15 09:15:02 host x", local(2027, 1, 15)),
        ("Jan  6 09:15:02 host x", local(2027, 1, 6)),
        ("Dec 31 09:15:02 host x", local(2026, 12, 31)),
        ("Feb 29 09:15:02 host x", local(2024, 2, 29)),
        ("Foo 15 09:15:02", None),
        ("Jan 15 25:15:02", None),
        ("hello", None),
        ("", None),
        ("3", None),
    ],
)
def test_time_a_line_begins_with_is_read(line: str, microseconds: int | None) -> None:
    assert parse_stamp(line, NOW) == microseconds


def test_severities_have_names_and_aliases() -> None:
    assert [parse_severity(name) for name in NAMES] == list(range(8))
    assert [parse_severity(name) for name in ("panic", "Critical", "ERROR", "warn", "informational")] == [0, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="loud"):
        parse_severity("loud")


@pytest.mark.parametrize(
    ("include", "exclude", "unit", "wanted"),
    [
        ([], [], "ssh.service", True),
        (["ssh"], [], "ssh.service", True),
        (["ssh"], [], "sshd.service", False),
        (["ssh.service"], [], "ssh.service", True),
        (["docker-*"], [], "docker-abc.scope", True),
        (["ssh"], ["ssh"], "ssh.service", False),
        ([], ["cron*"], "cron.service", False),
        (["/var/log/*"], [], "ssh.service", False),
        (["ssh"], [], "plexd.service", True),
        ([], ["plexd"], "plexd.service", True),
        ([], ["a?b[c]"], "axb[c].service", True),
    ],
)
def test_units_are_filtered(include: list[str], exclude: list[str], unit: str, wanted: bool) -> None:
    assert Filter(None, include, exclude, "plexd.service").wants_unit(unit, 6) is wanted


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ([], [], True),
        (["ssh"], [], True),
        (["/var/log/a*"], [], True),
        (["/srv/*"], [], False),
        ([], ["/var/*"], False),
    ],
)
def test_files_are_filtered_by_path(include: list[str], exclude: list[str], wanted: bool) -> None:
    assert Filter(None, include, exclude, "plexd.service").wants_file("/var/log/app.log", 6) is wanted


def test_less_severe_entries_are_not_wanted() -> None:
    wanted = Filter(4, [], [], "plexd.service")
    assert [wanted.wants_unit("a.service", n) for n in (3, 4, 5)] == [True, True, False]
    assert [wanted.wants_file("/a", n) for n in (4, 5)] == [True, False]
    assert wanted.wants_unit("plexd.service", 7)
