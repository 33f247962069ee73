"""The API socket as a file with rights, and what the kernel says about who is at the other end (node API, 1.1, 2.1)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import grp
import os
import pwd
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

from plexd.errors import ListenerError
from plexd.log import get_logger

log = get_logger("api")

SO_PEERGROUPS = 59  # since Linux 4.13; Python has no name for it
USUAL_GROUPS = 256
LOOK_UP_SECONDS = 2.0
BACKLOG = 128
_libc = ctypes.CDLL(None, use_errno=True)
_CREDENTIALS = struct.Struct("=iII")


class Credentials(NamedTuple):
    """Who connected, as it was at that moment. `groups` are the supplementary ones, None where the kernel won't say."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] | None


class Options(Protocol):
    """The part of a socket that tells about its peer."""

    def fileno(self) -> int: ...

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def peer_credentials(sock: Options) -> Credentials:
    """Raises OSError when the kernel does not know them."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Credentials(pid, uid, gid, _peer_groups(sock.fileno()))


def _peer_groups(descriptor: int) -> frozenset[int] | None:
    """Through libc: Python's own call takes 1024 bytes at most, and a user may be in 65536 groups."""
    count = USUAL_GROUPS
    while True:
        groups, size = (ctypes.c_uint32 * count)(), ctypes.c_uint32(4 * count)
        if not _libc.getsockopt(descriptor, socket.SOL_SOCKET, SO_PEERGROUPS, ctypes.byref(groups), ctypes.byref(size)):
            return frozenset(groups[: size.value // 4])
        code = ctypes.get_errno()
        if code == errno.ENOPROTOOPT:
            return None
        if code != errno.ERANGE or size.value <= 4 * count:
            raise OSError(code, os.strerror(code))
        count = size.value // 4  # so many there are


async def is_member(caller: Credentials, group: int) -> bool:
    """Whether the caller is in the group. The user database is asked only where the kernel won't say."""
    if caller.gid == group:
        return True
    if caller.groups is not None:
        return group in caller.groups
    try:
        async with asyncio.timeout(LOOK_UP_SECONDS):
            return group in await asyncio.to_thread(_groups_of_user, caller.uid)
    except (OSError, KeyError, TimeoutError):
        return False


def _groups_of_user(uid: int) -> list[int]:
    user = pwd.getpwuid(uid)
    return os.getgrouplist(user.pw_name, user.pw_gid)


def group_id(name: str) -> int | None:
    """None when this host has no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


class SocketFile:
    """A listening Unix socket. Connections wait from now on; `close` removes the file, if it is still this one."""

    def __init__(self, path: Path, group: int | None) -> None:
        """Open to `group`, or to this user alone with None. Raises ListenerError, also when another daemon listens."""
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            _make_directory(path.parent)
            _clear_way(path)
            self._bind()
            self._identity = _identity(path)
            self._open_to(group)
            self.socket.listen(BACKLOG)
        except OSError as exc:
            self.socket.close()
            raise ListenerError(
                f"cannot listen on {path}: {exc.strerror}; set node_api.socket to a usable place"
            ) from exc
        except BaseException:
            self.socket.close()
            raise

    def _bind(self) -> None:
        # the mask of the process is changed for this moment: bind knows no mode, and chmod afterwards would be late
        mask = os.umask(0o177)
        try:
            self.socket.bind(str(self.path))
        finally:
            os.umask(mask)

    def _open_to(self, group: int | None) -> None:
        if group is None:
            return
        try:
            os.chown(self.path, -1, group, follow_symlinks=False)
            self.path.chmod(0o660)
        except OSError as exc:
            if os.geteuid() == 0:
                raise
            log.warning("socket not opened to its group", path=str(self.path), error=str(exc.strerror))

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                self.path.unlink()


def _make_directory(path: Path) -> None:
    """With those above it that are missing; whatever the mask says, members of the group have to get through."""
    if not path.exists():
        _make_directory(path.parent)
        path.mkdir()
        path.chmod(0o755)


def _clear_way(path: Path) -> None:
    """Remove what a daemon that died left behind, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenerError(f"{path} is in the way and no socket: remove it, or set node_api.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its queue is full: somebody has one
    raise ListenerError(f"plexd is already running: another daemon listens on {path}; stop it, or set node_api.socket")


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
