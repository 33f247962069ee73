"""What it takes to have network namespaces with tunnels between them, and how to enter one for a while."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000


def why_not(*programs: str, routers: bool = False) -> str:
    """What is missing here, of these programs and in general; empty when nothing is. `routers` forward packets."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    if routers and not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        return "a router forwards, and /proc/sys is read-only here (a container)"
    absent = [program for program in ("ip", "wireguard-go", *programs) if shutil.which(program) is None]
    return f"needs {', '.join(absent)}" if absent else ""


def marks(*programs: str, seconds: int, routers: bool = False) -> list[pytest.MarkDecorator]:
    """Of a file whose tests cannot do without, and take at most so long each."""
    reason = why_not(*programs, routers=routers)
    return [pytest.mark.namespaces, pytest.mark.timeout(seconds), pytest.mark.skipif(bool(reason), reason=reason)]


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread, and every thread and process it starts, lives in the namespace; sockets it makes belong there."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns() came with Python 3.12
    with Path("/proc/self/ns/net").open() as home, Path("/run/netns", name).open() as there:
        if libc.setns(there.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)
