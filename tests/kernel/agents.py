"""Two whole agents beside a control plane, each in a namespace, with WireGuard of the kernel between them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from plexd.lab.admin import Admin
from plexd.lab.namespaces import Network
from plexd.lab.nodes import ControlPlaneProcess, NodeProcess, remove_leftovers

T = TypeVar("T")

LAB = "plexd-k"
PATIENCE_SECONDS = 100  # starting an agent takes ten seconds in there


@dataclass(frozen=True)
class Agents:
    one: NodeProcess
    other: NodeProcess
    admin: Admin

    def registered(self, node: NodeProcess) -> tuple[str, str]:
        """Node id and mesh address."""
        found = self.wait_for("the registration", lambda: [n for n in self.admin.nodes() if n.hostname == node.name])
        return found[0].node_id, found[0].mesh_ip

    def handshakes(self, node: NodeProcess) -> str:
        return node.wg("show", node.interface, "latest-handshakes")

    def reaches(self, node: NodeProcess, other: NodeProcess) -> bool:
        _, address = self.registered(other)
        done = subprocess.run(
            node.namespace.command("ping", "-n", "-c", "1", "-W", "2", address), capture_output=True, check=False
        )
        return done.returncode == 0

    def wait_for(self, what: str, look: Callable[[], T]) -> T:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (seen := look()):
            logs = "\n".join(node.last_log_lines() for node in (self.one, self.other))
            assert time.monotonic() < deadline, f"no sign of {what}\n{logs}"
            time.sleep(0.2)
        return seen

    def status(self, node: NodeProcess) -> Any:
        asked = [sys.executable, "-m", "plexd", "status", "--json", "--socket", str(node.api_socket)]
        return json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)

    def wait_until_both_reach_each_other(self) -> None:
        for node, other in ((self.one, self.other), (self.other, self.one)):
            self.wait_for(f"{other.name} from {node.name}", partial(self.reaches, node, other))


@contextlib.contextmanager
def two_agents(directory: Path) -> Iterator[Agents]:
    """Registered, and started."""
    network = Network(LAB)
    try:
        network.build(2)
        plane = ControlPlaneProcess(network, directory)
        plane.start()
        one, other = (NodeProcess(n, network, directory, plane.url, plane.tls / "ca.pem", LAB) for n in (1, 2))
        with Admin(plane.admin_socket) as admin:
            for node in (one, other):
                node.prepare(admin.issue_token())
                node.start()
            yield Agents(one, other, admin)
    finally:
        remove_leftovers(LAB, directory, network)
    assert not one.is_running()
    assert not other.is_running()
    assert plane._process is not None
    assert plane._process.poll() is not None
