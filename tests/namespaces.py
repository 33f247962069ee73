"""Entering a network namespace for a while."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000


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
