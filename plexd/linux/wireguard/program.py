"""The process of a userspace WireGuard: found, started so that it outlives the agent, watched, ended.

It is started in a session of its own with nothing of ours attached, under systemd in a scope of its own, because
stopping the agent's unit kills what is left in it. It may also be one that an earlier agent started: then its pid is
that of whoever listens on its socket, and it is watched by a pidfd, since only a parent can wait for a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import time
from pathlib import Path

from plexd.errors import KernelError
from plexd.log import get_logger
from plexd.runtime.backoff import Backoff

log = get_logger("mesh")

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": SEARCH_PATH, "LOG_LEVEL": "error"}
SOCKET_DIRECTORY = Path("/var/run/wireguard")
TUN = Path("/dev/net/tun")
SYSTEMD_RUNNING = Path("/run/systemd/system")  # what sd_booted(3) looks at

START_SECONDS = 5.0
END_SECONDS = 2.0
POLL_SECONDS = 0.005
STEADY_SECONDS = 60.0  # who ran this long did not fail at its start
_CREDENTIALS = struct.Struct("=iII")


class Program:
    """`damaged` is set when the process died and the time has come to start it again."""

    def __init__(self, interface: str, program: str, damaged: asyncio.Event, section: str) -> None:
        self.socket_path = SOCKET_DIRECTORY / f"{interface}.sock"
        self.pid: int | None = None
        self._interface = interface
        self._program = program
        self._section = section
        self._damaged = damaged
        self._backoff = Backoff(1.0, 60.0)
        self._not_before = 0.0
        self._since = 0.0
        self._pidfd: int | None = None
        self._gone = asyncio.Event()
        self._ending = False
        self._exit: str | None = None
        self._due: asyncio.TimerHandle | None = None

    def missing(self) -> str | None:
        """Why it cannot be started here; None when it can."""
        if self._find() is None:
            return f"{self._program} not found"
        if not TUN.exists():
            return f"{TUN} not found"
        return None

    def _find(self) -> str | None:
        return shutil.which(self._program, path=SEARCH_PATH)

    async def start(self) -> None:
        """Returns when the link is there and the socket answers. KernelError when that does not come about."""
        path = self._find()
        if path is None:
            raise KernelError(f"{self._program} not found")
        await self._gone_within(END_SECONDS)  # the link goes a moment before its process
        if (wait := self._not_before - time.monotonic()) > 0:
            raise KernelError(f"{self._program} ended; it is started again in {wait:.0f} s")
        if await self._is_answered_for(1.0):
            raise KernelError(
                f"{self.socket_path} is answered by another program: "
                f"stop it or choose another {self._section}.interface"
            )
        _make_socket_directory()
        argv = [*_scope(self._interface), path, "-f", self._interface]
        try:
            pid = _spawn(argv)
        except OSError as exc:
            raise KernelError(f"{argv[0]} could not be started: {exc.strerror}") from exc
        self._watch(pid)
        try:
            async with asyncio.timeout(START_SECONDS):
                while not self.answers():
                    if self._gone.is_set():
                        raise KernelError(f"{self._program} ended at its start ({self._exit or 'reason unknown'})")
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            await self.end()
            raise KernelError(
                f"{self._program} did not answer on {self.socket_path} within {START_SECONDS:.0f} s"
            ) from None

    def answers(self) -> bool:
        try:
            self.connect().close()
        except OSError:
            return False
        return True

    def connect(self) -> socket.socket:
        """OSError when nobody listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(self.socket_path))  # at once, for a Unix socket
        except BaseException:
            sock.close()
            raise
        return sock

    def adopt(self, sock: socket.socket) -> None:
        """Watch the process at the other end, unless it is watched already."""
        pid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
        if pid != self.pid and pid > 0:  # 0: in a PID namespace out of sight
            with contextlib.suppress(ProcessLookupError):
                self._watch(pid)

    async def _is_answered_for(self, seconds: float) -> bool:
        """Whether somebody keeps answering; one that is about to end is given the time."""
        deadline = time.monotonic() + seconds
        while self.answers():
            if time.monotonic() > deadline:
                return True
            await asyncio.sleep(POLL_SECONDS)
        return False

    def _watch(self, pid: int) -> None:
        self._unwatch()
        self._pidfd = os.pidfd_open(pid)
        self.pid = pid
        self._since = time.monotonic()
        self._gone = asyncio.Event()
        self._ending = False
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    def _unwatch(self) -> None:
        if self._pidfd is not None and self.pid is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._exit = _reap(self.pid)
        self._pidfd = self.pid = None

    def _ended(self) -> None:
        pid = self.pid
        self._unwatch()
        self._gone.set()
        if self._ending:
            return
        now = time.monotonic()
        if now - self._since >= STEADY_SECONDS:
            self._backoff.reset()
        # without complaint it ends when somebody deletes its link: no reason to be wary of starting it again
        delay = 0.0 if self._exit == _exit_text(0) else self._backoff.next()
        self._not_before = now + delay
        self._due = asyncio.get_running_loop().call_later(delay, self._damaged.set)
        log.warning("userspace wireguard ended", interface=self._interface, pid=pid, exit=self._exit, retry_in=delay)

    async def end(self) -> None:
        """See the process out. Call it after deleting the link, at which a WireGuard program ends by itself."""
        self._ending = True
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if self._pidfd is None:
                break
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)
            await self._gone_within(END_SECONDS)
        if not self.answers():
            self.socket_path.unlink(missing_ok=True)

    async def _gone_within(self, seconds: float) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._gone.wait()

    def expect_end(self) -> None:
        """The link is about to be deleted: that its process ends is no damage."""
        self._ending = True

    def close(self) -> None:
        """Stop watching; the process goes on."""
        self._unwatch()
        if self._due is not None:
            self._due.cancel()


def _scope(interface: str) -> list[str]:
    """What to put before the command so that systemd gives it a scope; nothing when the agent is not a unit."""
    if "INVOCATION_ID" not in os.environ or not SYSTEMD_RUNNING.is_dir():
        return []
    systemd_run = shutil.which("systemd-run", path=SEARCH_PATH)
    if systemd_run is None:
        return []
    return [systemd_run, "--scope", "--quiet", "--collect", f"--description=WireGuard of {interface}, for plexd", "--"]


def _make_socket_directory() -> None:
    SOCKET_DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)


def _spawn(argv: list[str]) -> int:
    """Not the subprocess module: its objects complain about a child that goes on, and asyncio's kill it."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    return os.posix_spawn(
        argv[0],
        argv,
        ENVIRONMENT,
        file_actions=null,
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1),
    )


def _reap(pid: int) -> str | None:
    """How our child ended; None when it goes on, was not ours, or somebody else waited for it."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    if reaped == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    return _exit_text(code) if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _exit_text(code: int) -> str:
    return f"exit status {code}"
