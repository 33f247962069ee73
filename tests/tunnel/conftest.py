"""What it takes to have a tunnel on this host."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from tests.namespaces import why_not
from tests.tunnel.harness import Network

_numbers = itertools.count()


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_not("nft", "wg", "ping"):
        pytest.skip(reason)
    network = Network(f"plxt-{os.getpid()}-{next(_numbers)}")
    yield network
    network.remove()


@pytest.fixture
def interface() -> str:
    """The start of names that no other test uses: sockets of userspace WireGuards share one directory."""
    return f"plxt{os.getpid() % 1_000_000}n{next(_numbers)}"


@pytest.fixture
def tunable(network: Network) -> Network:
    """Whose hosts can be made routers, and lose their IPv6."""
    if not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        pytest.skip("/proc/sys is read-only here (a container)")
    return network
