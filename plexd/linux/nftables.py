"""The door to nftables: the table `inet plexd`, whole through the program `nft`, elements of its sets without.

A program of its own, not libnftables in this process: the library ends its process when something surprises it, and
to replace one table it reads everybody's. What that costs is mostly the end of `nft`, which the kernel holds up until
the rules of before are freed (10 to 20 ms); so a change counts as done when the kernel announces it, about 3 ms after
the start, and the rest goes on behind. Elements are few and plain: the kernel hears of them from us, in 0.2 ms.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import BinaryIO, Self

from plexd.errors import FirewallUnavailable, KernelError, NotPermitted, PolicyRejected
from plexd.linux.netlink import RECEIVE_BYTES, Message, NetlinkSocket, attribute, attributes, split
from plexd.linux.set_elements import NFGENMSG, NFNL_SUBSYS_NFTABLES, NFPROTO_INET, NFPROTO_UNSPEC, Batch, batch
from plexd.linux.wireguard.program import SEARCH_PATH
from plexd.mesh.firewall import SetChange
from plexd.mesh.nft_commands import FAMILY, Json
from plexd.runtime.threads import in_mesh_thread

TIMEOUT_SECONDS = 10.0
MAX_MESSAGE = 300  # characters of what nft says

_NO_PROGRAM = {errno.ENOENT, errno.EACCES, errno.ENOEXEC}
_USED_UP = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}

NETLINK_NETFILTER = 12
NFNLGRP_NFTABLES = 7
NFT_MSG_GETTABLE, NFT_MSG_NEWGEN, NFT_MSG_GETGEN = (NFNL_SUBSYS_NFTABLES << 8 | kind for kind in (1, 15, 16))
NFTA_TABLE_NAME, NFTA_TABLE_HANDLE = 1, 4
NFTA_GEN_ID = 1

SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
_INSTRUCTION = struct.Struct("=HBBI")  # classic BPF: code, jump if true, jump if false, operand
_NLMSG_TYPE = 4  # its place in the header
# 10 000 rules are announced one by one; only the one message that ends a transaction is let through
_ONLY_NEWGEN = (
    (0x28, 0, 0, _NLMSG_TYPE),  # load a half word, which takes it for big-endian
    (0x15, 0, 1, socket.htons(NFT_MSG_NEWGEN)),  # jump if equal
    (0x06, 0, 0, 0x40000),  # pass it
    (0x06, 0, 0, 0),
)
_BURST = 64  # read in one go before others have their turn
_BUFFER_BYTES = 1 << 20  # room for the announcement of some thousand rules

_INET = bytes([NFPROTO_INET])


class Nftables:
    """One table of family inet, by its name.

    Every method but `generation` and `close` raises FirewallUnavailable, NotPermitted or another KernelError.
    """

    def __init__(self, table: str, program: str = "nft") -> None:
        self._table = table
        self._program = program
        self._asking: NetlinkSocket | None = None  # those two kept open: to close one waits as nft does
        self._amending: NetlinkSocket | None = None
        self._amends = threading.Lock()
        self._ending: set[asyncio.Future[None]] = set()

    async def apply(self, document: Json) -> None:
        """One transaction, all of it or nothing. PolicyRejected says what the kernel had against it."""
        loop = asyncio.get_running_loop()
        announced: asyncio.Future[None] = loop.create_future()
        announce = partial(loop.call_soon_threadsafe, _settle, announced)
        work = asyncio.ensure_future(in_mesh_thread(self._apply, document, announce))
        self._ending.add(work)
        work.add_done_callback(self._ended)
        await asyncio.wait({work, announced}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()

    def _ended(self, work: asyncio.Future[None]) -> None:
        self._ending.discard(work)
        if not work.cancelled():
            work.exception()  # has been raised, or came after the change was done

    async def amend(self, changes: Sequence[SetChange], generation: int | None = None) -> bool:
        """One transaction, as in `apply`. With the number of a generation it is done only if that one still stands, and
        makes the next one; False where another does."""
        return await in_mesh_thread(self._amend, batch(self._table, changes, generation))

    async def read_table(self) -> Json | None:
        """What `nft -j list table` says; None when there is no such table."""
        return await in_mesh_thread(self._read_table)

    async def delete_table(self) -> bool:
        """Whether there was one; deleting what is not there succeeds."""
        table: Json = {"table": {"family": FAMILY, "name": self._table}}
        was_there = await in_mesh_thread(self._is_there)
        if was_there:
            await self.apply({"nftables": [{"add": table}, {"delete": table}]})
        return was_there

    def generation(self) -> int:
        """The number of the rule set as it stands, of all tables; another one means that something was changed.

        It costs some microseconds and never waits. KernelError as above.
        """
        with _translated():
            if self._asking is None:
                self._asking = NetlinkSocket(NETLINK_NETFILTER)
            return _generation(self._asking)

    async def close(self) -> None:
        """Waits for what is still ending."""
        if self._ending:
            await asyncio.wait(self._ending)
        kept, self._asking, self._amending = (self._asking, self._amending), None, None
        for sock in kept:
            if sock is not None:
                await in_mesh_thread(sock.__exit__)

    # in a thread

    def _amend(self, changes: Batch) -> bool:
        with self._amends, _translated():
            if self._amending is None:
                self._amending = NetlinkSocket(NETLINK_NETFILTER)
            refused = self._amending.transact(*changes)
            if refused and refused != errno.ERESTART:
                raise OSError(refused, os.strerror(refused))
            return not refused

    def _apply(self, document: Json, done: Callable[[], object]) -> None:
        with _translated(), NetlinkSocket(NETLINK_NETFILTER) as asking, _open_announcements() as announcements:
            before = _table_handle(asking, self._table)
            with _Run(self._find(), ("-j", "-f", "-"), json.dumps(document).encode()) as run:
                while not run.wait(announcements):
                    # the transaction makes a new table, which has a handle that none before had
                    if _drain(announcements) and _table_handle(asking, self._table) != before:
                        done()
                        run.wait()
                if run.status != 0:
                    raise PolicyRejected(run.complaint())

    def _read_table(self) -> Json | None:
        with _translated(), NetlinkSocket(NETLINK_NETFILTER) as asking:
            if _table_handle(asking, self._table) is None:
                return None
            with _Run(
                self._find(), ("-j", "-p", "list", "table", FAMILY, self._table)
            ) as run:  # -p: protocols as numbers
                run.wait()
                if run.status == 0:
                    return _table(run.output())
                if _table_handle(asking, self._table) is None:
                    return None
                raise KernelError(f"nft cannot list the table: {run.complaint()}")

    def _is_there(self) -> bool:
        with _translated(), NetlinkSocket(NETLINK_NETFILTER) as asking:
            return _table_handle(asking, self._table) is not None

    def _find(self) -> str:
        path = shutil.which(self._program, path=SEARCH_PATH)
        if path is None:
            raise FirewallUnavailable(f"{self._program} not found: install the package nftables")
        return path


async def watch(table: str, is_known: Callable[[int], bool], noticed: asyncio.Event) -> None:
    """Set `noticed` whenever the table may differ from what the last look at it showed, and once at the start.

    The kernel notifies of the changes of a transaction and, at its end, of the generation that it made; `is_known`
    tells whether that is the generation of the last look. Changes of other tables set nothing. Raises OSError.
    """
    loop, own = asyncio.get_running_loop(), table.encode() + b"\0"
    with _open_changes() as sock:
        noticed.set()
        is_ours = False
        while True:
            for _ in range(_BURST):
                try:
                    data = await loop.sock_recv(sock, RECEIVE_BYTES)
                    for kind, _, _, start, end in split(data):
                        if kind != NFT_MSG_NEWGEN:
                            is_ours = is_ours or _is_about(own, data[start:end])
                        elif is_ours:
                            is_ours = False
                            if not is_known(_read_generation(data[start:end])):
                                noticed.set()
                except ValueError:
                    noticed.set()
                except OSError as exc:
                    if exc.errno not in {errno.ENOBUFS, errno.EPROTO}:  # some were lost, or not understood
                        raise
                    noticed.set()
            await asyncio.sleep(0)


def _settle(announced: asyncio.Future[None]) -> None:
    if not announced.done():
        announced.set_result(None)


class _Run:
    """One run of nft. Files in memory instead of pipes: nobody has to feed it or to read along."""

    def __init__(self, path: str, arguments: Sequence[str], stdin: bytes = b"") -> None:
        self.status = 0
        self._deadline = time.monotonic() + TIMEOUT_SECONDS
        with ExitStack() as stack:
            given, self._output, self._errors = (stack.enter_context(_memory(name)) for name in ("in", "out", "err"))
            given.write(stdin)
            given.seek(0)
            try:
                self._process = subprocess.Popen(
                    (path, *arguments),
                    stdin=given,
                    stdout=self._output,
                    stderr=self._errors,
                    env={"PATH": SEARCH_PATH, "LC_ALL": "C"},
                    start_new_session=True,  # what ends us must not end a change half-way reported
                )
            except OSError as exc:
                raise _not_run(path, exc) from exc
            self._pidfd = os.pidfd_open(self._process.pid)
            stack.callback(os.close, self._pidfd)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._stack.close()

    def wait(self, also: socket.socket | None = None) -> bool:
        """Until it has ended, or (False) something came in on `also`. KernelError when neither happens in time."""
        watched = [self._pidfd] if also is None else [self._pidfd, also.fileno()]
        ready = _wait_readable(watched, self._deadline - time.monotonic())
        if not ready:
            raise KernelError(f"nft did not end within {TIMEOUT_SECONDS:.0f} s")
        if self._pidfd not in ready:
            return False
        self.status = self._process.wait()
        return True

    def output(self) -> bytes:
        self._output.seek(0)
        return self._output.read()

    def complaint(self) -> str:
        """What it said, in one line."""
        self._errors.seek(0)
        said = " ".join(self._errors.read(4 * MAX_MESSAGE).decode(errors="replace").split())
        return said[:MAX_MESSAGE] or f"nft ended with status {self.status}"


def _not_run(path: str, exc: OSError) -> KernelError:
    """Only what another program in its place would help against says that there is no nftables here."""
    if exc.errno in _NO_PROGRAM:
        return FirewallUnavailable(f"{path} cannot be run ({exc.strerror}): install the package nftables")
    advice = ": give plexd more processes, memory or open files" if exc.errno in _USED_UP else ""
    return KernelError(f"{path} could not be started ({exc.strerror}){advice}")


def _memory(name: str) -> BinaryIO:
    return os.fdopen(os.memfd_create(f"plexd-nft-{name}"), "w+b")


def _wait_readable(fds: Sequence[int], seconds: float) -> list[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(max(seconds, 0) * 1000)]


def _table(output: bytes) -> Json:
    try:
        table: Json = json.loads(output)
    except ValueError as exc:
        raise KernelError(f"nft lists the table in a way that cannot be read: {exc}") from exc
    return table


@contextmanager
def _translated() -> Iterator[None]:
    """What the kernel answers to questions becomes an error that says what to do."""
    try:
        yield
    except OSError as exc:
        if exc.errno in {errno.EPERM, errno.EACCES}:
            raise NotPermitted("nftables needs the capability NET_ADMIN") from exc
        # no netfilter sockets at all, or nobody behind them who knows nf_tables
        if exc.errno in {errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP}:
            raise FirewallUnavailable("this kernel has no nf_tables: load the module nf_tables") from exc
        raise KernelError(f"nftables: {os.strerror(exc.errno) if exc.errno else exc}") from exc


def _open_announcements() -> socket.socket:
    """A socket that hears the end of every transaction, and nothing else. It does not block."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
    )
    try:
        code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in _ONLY_NEWGEN)
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("@HP", len(_ONLY_NEWGEN), ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        sock.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
    except BaseException:
        sock.close()
        raise
    return sock


def _open_changes() -> socket.socket:
    """A socket that hears all of every transaction. It does not block."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
    )
    try:
        with suppress(OSError):  # a smaller buffer only overflows sooner
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER_BYTES)
        sock.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
    except BaseException:
        sock.close()
        raise
    return sock


def _is_about(table: bytes, payload: bytes) -> bool:
    """Whether a notification is about the table or its content: every kind names the table in attribute 1."""
    if payload[:1] != _INET:
        return False
    return any(
        kind == NFTA_TABLE_NAME and payload[start:end] == table
        for kind, start, end in attributes(payload, NFGENMSG.size, len(payload))
    )


def _drain(announcements: socket.socket) -> bool:
    """Whether there were any."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            try:
                announcements.recv(1)
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
            count += 1
    return count > 0


def _table_handle(asking: NetlinkSocket, table: str) -> bytes | None:
    """What the kernel calls our table, never used twice; None while there is none."""
    payload = NFGENMSG.pack(NFPROTO_INET, 0, 0) + attribute(NFTA_TABLE_NAME, table.encode() + b"\0")
    try:
        answer = asking.get(Message(NFT_MSG_GETTABLE, 0, payload))[0]
    except FileNotFoundError:
        return None
    return _value(answer, NFTA_TABLE_HANDLE)


def _generation(asking: NetlinkSocket) -> int:
    return _read_generation(asking.get(Message(NFT_MSG_GETGEN, 0, NFGENMSG.pack(NFPROTO_UNSPEC, 0, 0)))[0])


def _read_generation(payload: bytes) -> int:
    return int.from_bytes(_value(payload, NFTA_GEN_ID), "big")


def _value(answer: bytes, wanted: int) -> bytes:
    for kind, start, end in attributes(answer, NFGENMSG.size, len(answer)):
        if kind == wanted:
            return answer[start:end]
    raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
