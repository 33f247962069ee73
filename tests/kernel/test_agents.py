"""What two whole agents make of the kernel's WireGuard, and of damage to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel.agents import Agents, two_agents

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    with two_agents(tmp_path_factory.mktemp("agents")) as agents:
        yield agents


def test_agents_reach_each_other_through_the_kernels_wireguard(mesh: Agents) -> None:
    mesh.wait_until_both_reach_each_other()
    for node in (mesh.one, mesh.other):
        shown = node.namespace.run("ip", "-details", "link", "show", node.interface)
        assert "wireguard" in shown
        assert "alias plexd:mesh" in shown


def test_removed_peer_comes_back_and_is_reported(mesh: Agents) -> None:
    key = mesh.other.wg("show", mesh.other.interface, "public-key").strip()
    mesh.one.wg("set", mesh.one.interface, "peer", key, "remove")
    mesh.wait_for("the peer", lambda: key in mesh.one.wg("show", mesh.one.interface, "peers"))
    node_id, _ = mesh.registered(mesh.one)
    other_id, _ = mesh.registered(mesh.other)
    wanted = {"type": "peer_added", "detail": f"peer {other_id}"}
    mesh.wait_for("the drift report", lambda: wanted in mesh.admin.corrections(node_id))


def test_deleted_link_is_made_anew_and_reported_once(mesh: Agents) -> None:
    mesh.one.namespace.run("ip", "link", "delete", mesh.one.interface)
    mesh.wait_for(f"{mesh.other.name} again", lambda: mesh.reaches(mesh.one, mesh.other))
    node_id, _ = mesh.registered(mesh.one)
    wanted = {"type": "interface_repaired", "detail": f"{mesh.one.interface}: link, 1 peers, 1 routes"}
    mesh.wait_for("the drift report", lambda: wanted in mesh.admin.corrections(node_id))


def test_killed_agent_leaves_the_mesh_up_and_adopts_it_again(mesh: Agents) -> None:
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
