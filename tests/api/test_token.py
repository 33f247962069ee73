"""The token of the TCP listener is read again when its file changes, and a bad change leaves the old one in force."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from plexd.api.token import TokenFile

OLD, NEW = "o" * 32, "n" * 32


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(path: Path, clock: Clock) -> TokenFile:
    path.touch(0o600)
    path.write_text(f" {OLD}\n")
    return TokenFile(path, clock)


def token(file: TokenFile) -> str:
    return asyncio.run(file.token()).decode()


def test_changed_file_is_noticed_after_five_seconds(tmp_path: Path) -> None:
    clock = Clock()
    file = make(tmp_path / "token", clock)
    assert token(file) == OLD
    (tmp_path / "token").write_text(NEW)
    clock.now += 4.9
    assert token(file) == OLD
    clock.now += 0.2
    assert token(file) == NEW


@pytest.mark.parametrize(
    "damage",
    [
        "short",
        "gone",
        "open",
        pytest.param("foreign", marks=pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")),
    ],
)
def test_bad_change_keeps_the_old_token(tmp_path: Path, damage: str) -> None:
    clock = Clock()
    file = make(tmp_path / "token", clock)
    path = tmp_path / "token"
    path.write_text("n" * 31 if damage == "short" else NEW)
    if damage == "gone":
        path.unlink()
    if damage == "open":
        path.chmod(0o604)
    if damage == "foreign":
        os.chown(path, 12345, -1)
    clock.now += 6
    with capture_logs() as records:
        assert token(file) == OLD
    assert [record["event"] for record in records] == ["token not read again"]
    assert NEW not in str(records)
    if damage != "gone":
        path.chmod(0o600)
        if damage == "foreign":
            os.chown(path, os.geteuid(), -1)
        path.write_text(NEW + "!")
        clock.now += 6
        assert token(file) == NEW + "!"
