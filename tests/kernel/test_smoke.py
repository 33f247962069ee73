"""The guest is what it claims to be: a kernel with WireGuard, and a system that leaves the host alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kernel.image import REPO

pytestmark = pytest.mark.usefixtures("namespace")


def test_kernel_makes_a_wireguard_link() -> None:
    subprocess.run(["ip", "link", "add", "wg0", "type", "wireguard"], check=True)
    subprocess.run(["wg", "set", "wg0", "listen-port", "51820"], check=True)
    shown = subprocess.run(["wg", "show", "wg0", "listen-port"], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "51820"


def test_nftables_takes_a_table() -> None:
    subprocess.run(["nft", "add", "table", "inet", "smoke"], check=True)
    shown = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True)
    assert "inet smoke" in shown.stdout


@pytest.mark.parametrize("directory", ["/tmp", "/run", "/var/lib", str(REPO)])
def test_file_system_is_writable(directory: str) -> None:
    probe = Path(directory) / "plexd-kernel-probe"
    probe.write_text("x")
    probe.unlink()


def test_cgroup_version_2_is_mounted() -> None:
    assert "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
