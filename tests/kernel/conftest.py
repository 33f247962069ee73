"""Everything here needs the guest's kernel; each test gets a network namespace of its own."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.coroutine_tests import pytest_pyfunc_call  # noqa: F401 - a hook
from tests.namespaces import inside
from tests.tunnel.harness import Network

IN_GUEST = "plexd.guest" in Path("/proc/cmdline").read_text().split()
pytest.register_assert_rewrite("tests.kernel.agents", "tests.kernel.mesh")
_numbers = itertools.count()


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
    try:
        with inside(name):
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def network() -> Iterator[Network]:
    """Namespaces that a test joins as it likes, for nodes that use the kernel's WireGuard."""
    subprocess.run(["modprobe", "wireguard"], check=True)
    network = Network(f"plexd-kernel-{next(_numbers)}")
    yield network
    network.remove()
