"""auditd's log, read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from plexd.audit.records import EventId
from plexd.linux import audit_log
from plexd.linux.audit_log import AuditLog


def line(number: int) -> bytes:
    return f"type=CWD msg=audit({number}.000:{number}): cwd=/\n".encode()


def numbers(log: AuditLog) -> list[int]:
    return [int(text.split(b":")[1].split(b")")[0]) for chunk in log.chunks() for text in chunk]


def test_the_rotated_log_comes_first(tmp_path: Path) -> None:
    (tmp_path / "audit.log.1").write_bytes(line(1) + line(2))
    (tmp_path / "audit.log").write_bytes(line(3) + b"type=CWD msg=au")
    log = AuditLog(tmp_path / "audit.log")
    assert numbers(log) == [1, 2, 3]
    assert log.holds(EventId(1000, 1))
    assert not log.holds(EventId(4000, 4))
    log.close()


def test_a_log_rotated_meanwhile_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_bytes(line(1))
    log = AuditLog(path)
    path.rename(tmp_path / "audit.log.1")
    path.write_bytes(line(2))
    assert numbers(log) == [1]
    log.close()


def test_of_a_large_log_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "LIMIT_BYTES", len(line(10)) * 5 + 3)
    (tmp_path / "audit.log.1").write_bytes(b"".join(map(line, range(10, 20))))
    (tmp_path / "audit.log").write_bytes(b"".join(map(line, range(20, 23))))
    log = AuditLog(tmp_path / "audit.log")
    assert numbers(log) == [18, 19, 20, 21, 22]
    log.close()


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "audit.log.1").write_bytes(line(1))
    with pytest.raises(FileNotFoundError):
        AuditLog(tmp_path / "audit.log")
