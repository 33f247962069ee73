"""Two whole agents beside a control plane, each in a namespace, with WireGuard of the kernel between them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from plexd.lab.admin import Admin
from plexd.lab.namespaces import Network
from plexd.lab.nodes import ControlPlaneProcess, NodeProcess, remove_leftovers

T = TypeVar("T")

LAB = "plexd-k"
PATIENCE_SECONDS = 100  # starting an agent takes ten seconds in there
pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Mesh:
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


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    directory: Path = tmp_path_factory.mktemp(LAB)
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
            yield Mesh(one, other, admin)
    finally:
        remove_leftovers(LAB, directory, network)
    assert not one.is_running()
    assert not other.is_running()
    assert plane._process is not None
    assert plane._process.poll() is not None


def test_agents_reach_each_other_through_the_kernels_wireguard(mesh: Mesh) -> None:
    for node, other in ((mesh.one, mesh.other), (mesh.other, mesh.one)):
        mesh.wait_for(f"{other.name} from {node.name}", partial(mesh.reaches, node, other))
        shown = node.namespace.run("ip", "-details", "link", "show", node.interface)
        assert "wireguard" in shown
        assert "alias plexd:mesh" in shown


def test_removed_peer_comes_back_and_is_reported(mesh: Mesh) -> None:
    key = mesh.other.wg("show", mesh.other.interface, "public-key").strip()
    mesh.one.wg("set", mesh.one.interface, "peer", key, "remove")
    mesh.wait_for("the peer", lambda: key in mesh.one.wg("show", mesh.one.interface, "peers"))
    node_id, _ = mesh.registered(mesh.one)
    other_id, _ = mesh.registered(mesh.other)
    wanted = {"type": "peer_added", "detail": f"peer {other_id}"}
    mesh.wait_for("the drift report", lambda: wanted in mesh.admin.corrections(node_id))


def test_deleted_link_is_made_anew_and_reported_once(mesh: Mesh) -> None:
    mesh.one.namespace.run("ip", "link", "delete", mesh.one.interface)
    mesh.wait_for(f"{mesh.other.name} again", lambda: mesh.reaches(mesh.one, mesh.other))
    node_id, _ = mesh.registered(mesh.one)
    wanted = {"type": "interface_repaired", "detail": f"{mesh.one.interface}: link, 1 peers, 1 routes"}
    mesh.wait_for("the drift report", lambda: wanted in mesh.admin.corrections(node_id))


def test_killed_agent_leaves_the_mesh_up_and_adopts_it_again(mesh: Mesh) -> None:
    mesh.wait_for("the mesh", lambda: mesh.reaches(mesh.one, mesh.other))
    node_id, _ = mesh.registered(mesh.one)
    index = mesh.one.namespace.run("cat", f"/sys/class/net/{mesh.one.interface}/ifindex")
    mesh.one.kill()
    before = mesh.handshakes(mesh.one)
    assert mesh.reaches(mesh.one, mesh.other)
    heartbeats = mesh.admin.heartbeats(node_id)
    mesh.one.start()
    mesh.wait_for("the agent", lambda: mesh.admin.heartbeats(node_id) > heartbeats)
    assert mesh.one.namespace.run("cat", f"/sys/class/net/{mesh.one.interface}/ifindex") == index
    assert mesh.handshakes(mesh.one) == before
    assert mesh.reaches(mesh.one, mesh.other)
