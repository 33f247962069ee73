"""Network namespaces to try the linux room in, and links with names that no other test uses."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.namespaces import inside as entered
from tests.namespaces import why_not

_numbers = itertools.count()


@pytest.fixture
def make_namespace() -> Iterator[Callable[[], str]]:
    """Makes a network namespace with loopback up; all are deleted at the end."""
    if reason := why_not("wg", "ping", "nft"):
        pytest.skip(reason)
    made: list[str] = []

    def make() -> str:
        name = f"plxl-{os.getpid()}-{next(_numbers)}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        made.append(name)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        return name

    yield make
    for name in made:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def inside() -> Callable[[str], AbstractContextManager[None]]:
    return entered


@pytest.fixture
def namespace(make_namespace: Callable[[], str]) -> Iterator[str]:
    """The test itself runs in a namespace of its own."""
    name = make_namespace()
    with entered(name):
        yield name


@pytest.fixture
def interface() -> Iterator[str]:
    """A name that no other test uses: sockets of userspace WireGuards share one directory across namespaces."""
    name = f"plxl{os.getpid() % 1_000_000}n{next(_numbers)}"
    yield name
    subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
    Path(f"/var/run/wireguard/{name}.sock").unlink(missing_ok=True)
