"""Everything here needs the guest's kernel; each test gets a network namespace of its own."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

IN_GUEST = "plexd.guest" in Path("/proc/cmdline").read_text().split()
pytest.register_assert_rewrite("tests.kernel.mesh")
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("kernel")
            if not IN_GUEST:
                item.add_marker(pytest.mark.skip(reason="runs in the QEMU guest: make test-kernel"))


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace that this process lives in for the length of the test; yields its name."""
    name = f"plexd-kernel-{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        _enter(there)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        _enter(home)
        os.close(there)
        os.close(home)
        subprocess.run(["ip", "netns", "delete", name], check=True)


def _enter(namespace_fd: int) -> None:
    if _libc.setns(namespace_fd, 0):  # os.setns() came with Python 3.12
        raise OSError(ctypes.get_errno(), "setns")
