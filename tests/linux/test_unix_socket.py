"""The API socket as a file: who can open it, whose it is, what it leaves alone. Callers are real processes."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from plexd.errors import ListenerError
from plexd.linux.unix_socket import Credentials, SocketFile, group_id, is_member, peer_credentials

GROUP, OTHER_GROUP, USER = 47011, 47012, 47013  # nobody on this host has them

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away and becomes other users")


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="plexd-socket") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def opened(directory: Path) -> Iterator[Callable[..., SocketFile]]:
    files: list[SocketFile] = []

    def opened(group: int | None = None, path: Path | None = None) -> SocketFile:
        files.append(SocketFile(path or directory / "api.sock", group))
        return files[-1]

    yield opened
    for file in files:
        file.close()


Opened = Callable[..., SocketFile]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def connect_as(path: Path, uid: int, gid: int, groups: Sequence[int] = ()) -> subprocess.Popen[str]:
    """A process of that user that connects, says how it went, and stays until its standard input ends."""
    program = (
        "import os, socket, sys\n"
        "path, uid, gid, groups = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])\n"
        "os.setgroups(groups); os.setgid(gid); os.setuid(uid)\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "try: sock.connect(path)\n"
        "except OSError as exc: print(type(exc).__name__, flush=True)\n"
        "else: print('connected', flush=True)\n"
        "sys.stdin.read()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(uid), str(gid), repr(list(groups))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    process.communicate()
    return said


# the file


def test_socket_without_a_group_is_for_its_user_alone(opened: Opened) -> None:
    file = opened()
    assert stat.S_ISSOCK(file.path.lstat().st_mode)
    assert mode_of(file.path) == 0o600


@needs_root
def test_socket_with_a_group_is_open_to_it_and_nobody_else(opened: Opened) -> None:
    file = opened(GROUP)
    status = file.path.lstat()
    assert (mode_of(file.path), status.st_uid, status.st_gid) == (0o660, os.geteuid(), GROUP)


@needs_root
@pytest.mark.parametrize(
    ("uid", "gid", "groups", "expected"),
    [
        (0, 0, [], "connected"),
        (USER, OTHER_GROUP, [GROUP], "connected"),
        (USER, GROUP, [], "connected"),
        (USER, OTHER_GROUP, [], "PermissionError"),
        (USER, 0, [0], "PermissionError"),
    ],
)
def test_kernel_lets_in_root_and_the_group(
    opened: Opened, uid: int, gid: int, groups: list[int], expected: str
) -> None:
    file = opened(GROUP)
    assert outcome(connect_as(file.path, uid, gid, groups)) == expected


@needs_root
def test_socket_is_never_wider_than_intended(opened: Opened, directory: Path) -> None:
    """Whoever looks all the time, from before there is a socket, sees only modes that let nobody else in."""
    path = directory / "api.sock"
    program = (
        "import os, sys\n"
        "modes, path = set(), sys.argv[1]\n"
        "print('looking', flush=True)\n"
        "while not os.path.exists(path + '.end'):\n"
        "    try: modes.add(os.lstat(path).st_mode & 0o7777)\n"
        "    except FileNotFoundError: pass\n"
        "modes.add(os.lstat(path).st_mode & 0o7777)\n"
        "print(*(f'{mode:o}' for mode in modes))\n"
    )
    watcher = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "looking\n"
    mask = os.umask(0)  # the widest there is
    try:
        for _ in range(500):
            opened(GROUP).close()
            assert os.umask(0) == 0  # bind gave it back
        opened(GROUP)
    finally:
        os.umask(mask)
        path.with_name("api.sock.end").touch()
    seen = set(watcher.communicate()[0].split())
    assert "660" in seen
    assert seen <= {"600", "660"}


def test_missing_directory_is_made_for_everybody_to_enter(opened: Opened, directory: Path) -> None:
    mask = os.umask(0o077)  # as in the daemon
    try:
        opened(path=directory / "run" / "plexd" / "api.sock")
    finally:
        os.umask(mask)
    assert [mode_of(made) for made in (directory / "run", directory / "run" / "plexd")] == [0o755, 0o755]


def test_directory_that_is_there_keeps_its_mode(opened: Opened, directory: Path) -> None:
    directory.chmod(0o700)
    opened()
    assert mode_of(directory) == 0o700


def test_socket_of_a_dead_daemon_is_replaced(opened: Opened, directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "api.sock"))
    file = opened()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(file.path))


def test_socket_of_a_living_daemon_is_not_taken(opened: Opened) -> None:
    first = opened()
    inode = first.path.lstat().st_ino
    with pytest.raises(ListenerError, match="already running"):
        opened()
    assert first.path.lstat().st_ino == inode


def test_daemon_too_busy_to_accept_counts_as_living(opened: Opened, directory: Path) -> None:
    path = directory / "busy.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))  # fills the queue
        with pytest.raises(ListenerError, match="already running"):
            opened(path=path)
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(opened: Opened, directory: Path, kind: str) -> None:
    path = directory / "api.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(directory / "elsewhere")
    with pytest.raises(ListenerError, match="no socket"):
        opened()
    assert path.is_symlink() or path.exists()


def test_place_that_cannot_be_used_is_named_with_the_key_to_set(opened: Opened, directory: Path) -> None:
    (directory / "file").write_text("")
    with pytest.raises(ListenerError, match=r"cannot listen on .*/file/api.sock: .*node_api.socket"):
        opened(path=directory / "file" / "api.sock")


def test_closed_socket_is_gone(opened: Opened) -> None:
    file = opened()
    file.close()
    assert not file.path.exists()
    file.close()


def test_socket_that_took_our_place_stays(opened: Opened) -> None:
    first = opened()
    first.path.unlink()
    second = opened()
    first.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(second.path))


# who is there


async def _credentials_of(file: SocketFile, process: subprocess.Popen[str]) -> Credentials:
    file.socket.setblocking(False)
    sock, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(file.socket), 20)
    with sock:
        return peer_credentials(sock)


@needs_root
@pytest.mark.parametrize("groups", [[], [GROUP], [GROUP, OTHER_GROUP], list(range(50_000, 51_000))])
def test_kernel_tells_user_process_and_all_groups(opened: Opened, groups: list[int]) -> None:
    file = opened(GROUP)
    process = connect_as(file.path, USER, GROUP, groups)
    try:
        found = asyncio.run(_credentials_of(file, process))
    finally:
        assert outcome(process) == "connected"
    assert found == Credentials(process.pid, USER, GROUP, frozenset(groups))


def test_caller_that_is_gone_is_still_known(opened: Opened) -> None:
    file = opened()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(file.path))
        sock, _ = file.socket.accept()
    with sock:
        assert peer_credentials(sock).pid == os.getpid()


@pytest.mark.parametrize(
    ("gid", "groups", "expected"),
    [
        (GROUP, frozenset[int](), True),
        (OTHER_GROUP, frozenset({GROUP}), True),
        (OTHER_GROUP, frozenset({1, 2}), False),
        (OTHER_GROUP, frozenset[int](), False),
        (GROUP, None, True),
        (OTHER_GROUP, None, False),  # a user nobody knows
    ],
)
def test_member_by_first_or_by_further_group(gid: int, groups: frozenset[int] | None, expected: bool) -> None:
    assert asyncio.run(is_member(Credentials(1, USER, gid, groups), GROUP)) is expected


def test_user_database_is_asked_where_the_kernel_says_nothing() -> None:
    listed = next((g for g in grp.getgrall() for name in g.gr_mem if _exists(name)), None)
    user = pwd.getpwuid(1)
    assert asyncio.run(is_member(Credentials(1, user.pw_uid, OTHER_GROUP, None), user.pw_gid)) is True
    if listed is not None:
        member = pwd.getpwnam(listed.gr_mem[0])
        assert asyncio.run(is_member(Credentials(1, member.pw_uid, OTHER_GROUP, None), listed.gr_gid)) is True


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def test_group_that_is_missing_has_no_id() -> None:
    assert group_id("no-such-group-here") is None
    assert group_id("root") == 0
