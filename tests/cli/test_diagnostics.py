"""`plexd diagnostics`: what is in the archive, with and without a daemon, and that no secret is."""

from __future__ import annotations

import argparse
import errno
import gzip
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from plexd.cli import diagnostics
from tests.api.test_assembly import with_token
from tests.api.test_secrets import NSK
from tests.api_harness import TOKEN, House

PLEXD = Path(sys.executable).with_name("plexd")
SECRET = "a-bootstrap-token-that-nobody-sees"


def collect(directory: Path, *words: str) -> dict[str, str]:
    """The archive's members by name, without the directory they are in."""
    path = directory / "out.tar.gz"
    done = subprocess.run(
        [PLEXD, "diagnostics", "--output", path, *words], capture_output=True, text=True, check=True, cwd=directory
    )
    assert done.stdout == f"{path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: (archive.extractfile(member) or gzip.GzipFile()).read().decode()
            for member in archive.getmembers()
        }


def test_archive_has_what_helps_and_no_secret(tmp_path: Path) -> None:
    with House(tmp_path, node_api=with_token(tmp_path)) as house:
        config = tmp_path / "config.yaml"
        config.write_text(
            f"token: {{value: {SECRET}}}\nnode_api: {{socket: {house.socket}}}\nsystemd: {{unit: none-such}}\n"
        )
        found = collect(tmp_path, "--config", str(config))
    assert json.loads(found["status.json"]) == {"node_id": "n_self"}
    assert json.loads(found["peers.json"]) == []
    assert found["versions.txt"].startswith("plexd ")
    assert "value: '[redacted]'" in found["config.yaml"]
    assert "lo:" in found["links.txt"]
    assert {"routes.txt", "nftables.txt", "log.txt", "wg.txt"} <= set(found)
    for secret in (SECRET, NSK, TOKEN):
        assert [name for name, content in found.items() if secret in content] == []


def test_without_daemon_and_configuration_it_says_what_is_missing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("nonsense: [\n")
    found = collect(tmp_path, "--config", str(broken), "--socket", str(tmp_path / "none.sock"))
    assert found["status.json"] == f"daemon not reachable at {tmp_path / 'none.sock'}\n"
    assert found["config.yaml"].startswith("# ")
    assert "lo:" in found["links.txt"]


@pytest.mark.parametrize("path", ["out.tar.gz", "none/out.tar.gz"])
def test_file_that_is_there_or_cannot_be_is_no_place(tmp_path: Path, path: str) -> None:
    (tmp_path / "out.tar.gz").touch()
    done = subprocess.run(
        [PLEXD, "diagnostics", "--output", path], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"plexd: cannot write {path}: ")
    assert (tmp_path / "out.tar.gz").read_bytes() == b""


def test_archive_that_is_not_whole_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect_until_the_disk_is_full(_: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        yield "versions.txt", "plexd"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(diagnostics, "_collect", collect_until_the_disk_is_full)
    with pytest.raises(diagnostics.NotWritten, match="No space left"):
        diagnostics.diagnostics(argparse.Namespace(output=str(tmp_path / "out.tar.gz")))
    assert list(tmp_path.iterdir()) == []


def test_what_other_programs_say_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    (tmp_path / "node_secret_key").write_text(NSK)
    config = tmp_path / "config.yaml"
    config.write_text(f"token: {{file: {tmp_path}/token}}\ndata_dir: {tmp_path}\n")
    journal = tmp_path / "bin" / "journalctl"
    journal.parent.mkdir()
    journal.write_text(f"#!/bin/sh\necho 'refused: {SECRET}, {NSK}'\n")
    journal.chmod(0o755)
    monkeypatch.setenv("PATH", f"{journal.parent}:{os.environ['PATH']}")
    found = collect(tmp_path, "--config", str(config))
    assert found["log.txt"] == "refused: [redacted], [redacted]\n"
