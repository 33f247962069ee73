"""A real systemd-journald in a mount namespace of its own, with a journal directory that can be read from outside."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Self

import pytest

PROGRAM = Path("/lib/systemd/systemd-journald")
MACHINE = "1" * 32
PATIENCE = 20.0
MARKS = [
    pytest.mark.namespaces,
    pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces need root"),
    pytest.mark.skipif(
        not PROGRAM.exists() or shutil.which("journalctl") is None or not Path("/etc/machine-id").exists(),
        reason="needs systemd-journald and journalctl (apt-get install systemd)",
    ),
]

_STAGE = r"""
set -e
root=$1
mount --make-rprivate /
for place in /run/systemd /run/log /var/log /etc/systemd; do mkdir -p $place; mount -t tmpfs tmpfs $place; done
mkdir -p /run/systemd/journal /run/log/journal /var/log/journal
touch /run/systemd/journal/flushed
mount --bind $root/journal /var/log/journal
cp $root/journald.conf /etc/systemd/journald.conf
mount --bind $root/machine-id /etc/machine-id
mount --bind $root/boot-id /proc/sys/kernel/random/boot_id
exec /lib/systemd/systemd-journald
"""


class Journald:
    """A context manager; `start` and `stop` may be called in between, `boot` makes the next start another boot."""

    def __init__(self, root: Path, *settings: str) -> None:
        self.directory = root / "journal" / MACHINE
        self._root = root
        self.directory.mkdir(parents=True)
        (root / "machine-id").write_text(f"{MACHINE}\n")
        usual = ("RateLimitIntervalSec=0", "Storage=persistent", "ForwardToSyslog=no", "Audit=no", "ReadKMsg=no",
                 "SyncIntervalSec=1s", "Compress=no")  # fmt: skip
        (root / "journald.conf").write_text("\n".join(["[Journal]", *usual, *settings, ""]))
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self.boot()

    def boot(self) -> None:
        (self._root / "boot-id").write_text(f"{uuid.uuid4()}\n")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._process = subprocess.Popen(["unshare", "-m", "bash", "-c", _STAGE, "stage", str(self._root)])
        place = Path(f"/proc/{self.pid}/root/run/systemd/journal/socket")
        deadline = time.monotonic() + PATIENCE
        while not place.exists():
            assert self._process.poll() is None, "journald did not start"
            assert time.monotonic() < deadline, "journald does not listen"
            time.sleep(0.02)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.connect(str(place))

    def stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(PATIENCE)
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def inside(self) -> list[str]:
        """The words that run a command where this journal is the machine's."""
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--"]

    def write(self, message: str | bytes, **fields: str) -> None:
        """One entry; large ones go the way of large ones, through a file."""
        raw = message if isinstance(message, bytes) else message.encode()
        data = b"MESSAGE\n" + len(raw).to_bytes(8, "little") + raw + b"\n"
        data += b"".join(f"{name}={value}\n".encode() for name, value in fields.items())
        self.send(data)

    def send(self, data: bytes) -> None:
        assert self._socket is not None
        if len(data) < 100_000:
            self._socket.send(data)
            return
        memory = os.memfd_create("entry", os.MFD_ALLOW_SEALING)
        try:
            os.write(memory, data)
            seal = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, SHRINK, GROW, WRITE
            fcntl.fcntl(memory, 1033, seal)
            socket.send_fds(self._socket, [b""], [memory])
        finally:
            os.close(memory)

    def control(self, *arguments: str) -> None:
        """journalctl for the running daemon: --rotate, --sync, --vacuum-size."""
        subprocess.run([*self.inside(), "journalctl", "--quiet", *arguments], check=True, capture_output=True)
