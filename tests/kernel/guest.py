"""Runs a command inside the guest: boots QEMU without KVM, shows the serial console live, finds out how it ended."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.kernel.image import Image, write_initramfs

VERDICT = re.compile(r"^plexd-guest: exit (\d+)\n", re.MULTILINE)
SILENCE_SECONDS = 240  # longer than any one test may take in there


class Verdict(NamedTuple):
    """`status` is the command's exit status, None when the guest ended without one and `reason` says how."""

    status: int | None
    reason: str
    console: str


def boot(image: Image, command: Sequence[str], deadline_seconds: float, parameters: Sequence[str] = ()) -> Verdict:
    """Run `command` in the guest, from the repository's directory; the console goes to standard output as it comes.

    `parameters` are further ones of the guest's kernel.
    """
    with tempfile.TemporaryDirectory(prefix="plexd-guest-") as scratch:
        initramfs = Path(scratch) / "initramfs"
        write_initramfs(image, command, initramfs)
        with subprocess.Popen(
            _qemu(image, initramfs, parameters), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as emulator:
            try:
                console, reason = _follow(emulator, time.monotonic() + deadline_seconds)
            finally:
                emulator.kill()
    verdicts = VERDICT.findall(console)
    if verdicts:
        return Verdict(int(verdicts[-1]), "", console)
    if "Kernel panic" in console:
        reason = "the kernel panicked"
    return Verdict(None, reason, console)


def _qemu(image: Image, initramfs: Path, parameters: Sequence[str]) -> list[str]:
    # the emulator must not outlive a killed runner
    return [
        "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64",
        "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072",
        "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-nic", "none",
        "-kernel", str(image.kernel), "-initrd", str(initramfs),
        "-append", " ".join(("console=ttyS0 loglevel=3 panic=-1 mitigations=off plexd.guest", *parameters)),
        "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
    ]  # fmt: skip


def _follow(emulator: subprocess.Popen[bytes], deadline: float) -> tuple[str, str]:
    """The console's text, and why it ended."""
    assert emulator.stdout is not None
    received = b""
    while True:
        patience = min(SILENCE_SECONDS, deadline - time.monotonic())
        ready, _, _ = select.select([emulator.stdout], [], [], max(patience, 0))
        if not ready:
            reason = "the deadline passed" if patience < SILENCE_SECONDS else f"silent for {SILENCE_SECONDS} s"
            break
        chunk = os.read(emulator.stdout.fileno(), 65536)
        if not chunk:
            reason = f"the emulator ended with status {emulator.wait()}"
            break
        text = chunk.replace(b"\r", b"")
        received += text
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        if VERDICT.search(received.decode(errors="replace")):
            return received.decode(errors="replace"), ""
    return received.decode(errors="replace"), reason
