"""The guest is what it claims to be: nothing done in there reaches the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel.image import REPO


@pytest.mark.parametrize("directory", ["/tmp", "/run", "/var/lib", str(REPO)])
def test_file_system_is_writable(directory: str) -> None:
    probe = Path(directory) / "plexd-kernel-probe"
    probe.write_text("x")
    probe.unlink()


def test_cgroup_version_2_is_mounted() -> None:
    assert "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
