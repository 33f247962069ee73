"""Files are written whole or not at all, and the data directory is kept in order and for one daemon."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from plexd.errors import LocalStateError
from plexd.store.files import DataDirectory, move_aside, read_optional, remove_durably, write_whole
from tests.store.crash import crashes

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# writing


@pytest.mark.parametrize("old", [None, b"old content"])
def test_kill_at_any_moment_leaves_the_old_or_the_new_content(tmp_path: Path, old: bytes | None) -> None:
    new = b"new content" * 1000

    def prepare(n: int) -> None:
        (tmp_path / str(n)).mkdir()
        if old is not None:
            (tmp_path / str(n) / "file").write_bytes(old)

    seen = set()
    for n in crashes(lambda n: write_whole(tmp_path / str(n) / "file", new), prepare):
        left = read_optional(tmp_path / str(n) / "file")
        assert left in {old, new}
        seen.add(left)
        with _opened(tmp_path / str(n)):
            assert sorted(path.name for path in (tmp_path / str(n)).iterdir()) == sorted(
                {"plexd.lock", "state"} | ({"file"} if left is not None else set())
            )
    assert seen == {old, new}


def test_content_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        steps.append("sync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    write_whole(tmp_path / "file", b"x")
    assert steps == ["sync file", "rename", "sync directory"]


def test_written_file_is_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_whole(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o600


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_removing_what_is_gone_succeeds(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"x")
    remove_durably(tmp_path / "file")
    remove_durably(tmp_path / "file")
    assert read_optional(tmp_path / "file") is None


def test_file_that_does_not_answer_is_not_taken_for_absent(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(LocalStateError, match="repair"):
        read_optional(tmp_path / "file")


def test_unusable_file_is_kept_under_another_name(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"x")
    with capture_logs() as records:
        kept = move_aside(tmp_path / "file", "not JSON")
    assert kept.name.startswith("file.corrupt-")
    assert kept.read_bytes() == b"x"
    assert [(record["log_level"], record["reason"]) for record in records] == [("error", "not JSON")]


# the directory


class _opened:  # noqa: N801 - reads as a statement
    """`with _opened(path):` the directory is checked and locked, then given back."""

    def __init__(self, path: Path) -> None:
        self._directory = DataDirectory(path)

    def __enter__(self) -> DataDirectory:
        return self._directory

    def __exit__(self, *_: object) -> None:
        self._directory.close()


def test_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    with _opened(tmp_path / "var" / "plexd"):
        for name in ("", "state", "state/data"):
            assert mode(tmp_path / "var" / "plexd" / name) == 0o700
        assert mode(tmp_path / "var" / "plexd" / "plexd.lock") == 0o600


@pytest.mark.parametrize(
    ("name", "was", "becomes"),
    [
        ("identity.json", 0o644, 0o600),
        ("private_key", 0o640, 0o600),
        ("node_secret_key", 0o777, 0o600),
        ("state/desired.json", 0o604, 0o600),
        ("state/data/k.json", 0o660, 0o600),
        ("state", 0o755, 0o700),
        ("state/data", 0o770, 0o700),
        ("", 0o711, 0o700),
        ("identity.json", 0o400, 0o400),
    ],
)
def test_wide_modes_are_narrowed_with_a_warning(tmp_path: Path, name: str, was: int, becomes: int) -> None:
    with _opened(tmp_path):
        pass
    path = tmp_path / name
    if not path.exists():
        path.write_bytes(b"{}")
    tmp_path.chmod(0o700)
    path.chmod(was)
    with capture_logs() as records, _opened(tmp_path):
        assert mode(path) == becomes
    assert [record["path"] for record in records if record["log_level"] == "warning"] == (
        [str(path)] if was != becomes else []
    )


def test_symbolic_link_is_not_followed_to_repair_a_mode(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "elsewhere").chmod(0o644)
    with _opened(tmp_path / "data"):
        pass
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    with _opened(tmp_path / "data"):
        assert mode(tmp_path / "elsewhere") == 0o644


@needs_root
@pytest.mark.parametrize("name", ["identity.json", "state/desired.json", "state", ""])
def test_foreign_owner_is_fatal(tmp_path: Path, name: str) -> None:
    with _opened(tmp_path):
        pass
    path = tmp_path / name
    if not path.exists():
        path.write_bytes(b"{}")
    os.chown(path, 12345, 12345)
    with pytest.raises(LocalStateError, match="belongs to user id 12345") as caught:
        DataDirectory(tmp_path)
    assert caught.value.exit_code == 7
    os.chown(path, 0, 0)
    with _opened(tmp_path):  # the refusal did not keep the lock
        pass


def test_path_that_is_no_directory_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalStateError, match="set data_dir"):
        DataDirectory(tmp_path / "file")


def test_second_daemon_is_refused_until_the_first_is_gone_even_by_kill(tmp_path: Path) -> None:
    holder = "import sys\nfrom pathlib import Path\nfrom plexd.store.files import DataDirectory\n"
    holder += "directory = DataDirectory(Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()\n"
    first = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(LocalStateError, match="already running"):
            DataDirectory(tmp_path)
    finally:
        first.kill()
        first.communicate()
    with _opened(tmp_path):
        pass


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    with _opened(tmp_path):
        child = subprocess.Popen(["sleep", "60"])
    try:
        with _opened(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
