"""A site that loses power while its control plane is away: the mesh comes back by itself, and nothing is forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from plexd.lab.admin import Admin
from plexd.lab.namespaces import UAPI_SOCKETS, Network, run, stop_processes
from plexd.lab.nodes import PORT, ControlPlaneProcess, NodeProcess
from tests.agents import agents
from tests.namespaces import marks

pytestmark = marks(seconds=240)

LAB = f"plxo{os.getpid() % 100_000}"
BUDGET_SECONDS = 5.0  # from the start of the agents to a ping through the mesh


class Site:
    """Two nodes, and a control plane that can go away."""

    def __init__(self, network: Network, plane: ControlPlaneProcess, nodes: list[NodeProcess]) -> None:
        self.network = network
        self.plane = plane
        self.nodes = nodes
        self.mesh_ips: list[str] = []
        self.node_ids: list[str] = []

    def register(self) -> None:
        with Admin(self.plane.admin_socket) as admin:
            for node in self.nodes:
                node.start()
            until(lambda: len(admin.nodes()) == 2, "both are registered")
            by_name = {node.hostname: node for node in admin.nodes()}
        self.mesh_ips = [by_name[node.name].mesh_ip for node in self.nodes]
        self.node_ids = [by_name[node.name].node_id for node in self.nodes]
        until(self.is_whole, "both reach each other")
        # packets alone may have told a node where the other is, and what they tell is in no snapshot
        until(lambda: all(map(self._knows_endpoint, self.nodes)), "each has the other's endpoint on its disk")

    @staticmethod
    def _knows_endpoint(node: NodeProcess) -> bool:
        path = node.directory / "data/state/desired.json"
        return path.exists() and all(json.loads(path.read_text())["candidates"].values())

    def reaches(self, one: int, other: int) -> bool:
        command = self.nodes[one].namespace.command("ping", "-n", "-c", "1", "-W", "1", self.mesh_ips[other])
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def is_whole(self) -> bool:
        return self.reaches(0, 1) and self.reaches(1, 0)

    def lose_control_plane(self, *, silently: bool) -> None:
        """It refuses connections, or it is not even there to do that."""
        self.order("POST", "/listener/stop")
        if silently:
            rule = f"table inet gone {{ chain in {{ type filter hook input priority 0; tcp dport {PORT} drop; }}; }}"
            self.network.hub.run("nft", rule)

    def bring_control_plane_back(self) -> None:
        self.network.hub.run("nft", "add table inet gone; delete table inet gone")
        self.order("POST", "/listener/start")

    def lose_power(self) -> None:
        """No process, no interface and no socket is left of the nodes; their data directories are."""
        for node in self.nodes:
            node.kill()
            stop_processes(node.namespace.pids())
            self.network.hub.run("ip", "link", "delete", f"n{node.number}")  # and its end in the node
            run("ip", "netns", "delete", node.namespace.name)
            (UAPI_SOCKETS / f"{node.interface}.sock").unlink(missing_ok=True)
            node.api_socket.unlink(missing_ok=True)
            self.network.add_node(node.number)

    def lose_peer(self) -> dict[str, str]:
        """On the first node, by hand; the correction that it asks for."""
        node = self.nodes[0]
        key = self.nodes[1].wg("show", self.nodes[1].interface, "public-key").strip()
        node.wg("set", node.interface, "peer", key, "remove")
        return {"type": "peer_added", "detail": f"peer {self.node_ids[1]}"}

    def unsent(self) -> list[dict[str, str]]:
        path = self.nodes[0].directory / "data/state/drift.json"
        corrections: list[dict[str, str]] = json.loads(path.read_text())["corrections"] if path.exists() else []
        return corrections

    def order(self, method: str, path: str) -> None:
        transport = httpx.HTTPTransport(uds=str(self.plane.admin_socket))
        with httpx.Client(transport=transport, base_url="http://lab") as admin:
            admin.request(method, path).raise_for_status()


@pytest.fixture
def site() -> Iterator[Site]:
    with agents(LAB) as found:
        found.prepare()
        yield Site(*found)


def until(holds: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


@pytest.mark.parametrize("silently", [False, True], ids=["control plane refuses", "control plane is silent"])
def test_mesh_comes_back_without_a_control_plane_and_what_was_queued_arrives_with_it(
    site: Site, silently: bool
) -> None:
    site.register()
    site.lose_control_plane(silently=silently)
    repair = site.lose_peer()
    until(lambda: repair in site.unsent(), "the repair waits to be reported")
    site.lose_power()

    started = time.monotonic()
    for node in site.nodes:
        node.start()
    until(site.is_whole, "both reach each other again", BUDGET_SECONDS)
    seconds = time.monotonic() - started
    print(f"mesh up and pinging {seconds:.2f} s after the start")

    assert repair in site.unsent()
    site.bring_control_plane_back()
    with Admin(site.plane.admin_socket) as admin:
        until(lambda: repair in admin.corrections(site.node_ids[0]), "the repair is reported")
        assert {node.node_id for node in admin.nodes()} == set(site.node_ids)
    until(lambda: site.unsent() == [], "nothing waits any more")
    assert site.is_whole()
