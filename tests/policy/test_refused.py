"""A firewall that cannot be had: closed, with the cause in health, until it can."""

from __future__ import annotations

import shutil
import subprocess
import sys

from plexd.lab.admin import Admin
from plexd.lab.nodes import NodeProcess
from tests.namespaces import marks
from tests.policy.conftest import Mesh, allow, eventually

pytestmark = marks("nft", seconds=240)


def start_without_nft(node: NodeProcess) -> str:
    """For this agent alone there is nothing where the program was; its path."""
    nft = shutil.which("nft")
    assert nft is not None
    hidden = 'mount --bind /dev/null "$0" && exec "$@"'
    agent = (sys.executable, "-m", "plexd", "up", "--config", str(node.directory / "config.yaml"))
    with node.log.open("ab") as log:
        node._process = subprocess.Popen(
            node.namespace.command("unshare", "--mount", "sh", "-c", hidden, nft, *agent), stdout=log, stderr=log
        )
    return nft


def test_without_nft_there_is_no_mesh_health_says_what_to_install_and_the_rest_goes_on(mesh: Mesh) -> None:
    node = mesh.one
    mesh.set_policies(allow("*", "*"))
    eventually(lambda: mesh.peers_of(node) == 1)
    node.kill()
    node.namespace.run("ip", "link", "delete", node.interface)
    node.namespace.run("nft", "delete", "table", "inet", "plexd")
    with Admin(mesh.plane.admin_socket) as admin:
        heartbeats = admin.heartbeats(mesh.ids[node.name])
        nft = start_without_nft(node)
        eventually(lambda: "install the package nftables" in mesh.conditions(node).get("mesh_down", ""))
        eventually(lambda: admin.heartbeats(mesh.ids[node.name]) > heartbeats)
    links = node.namespace.run("ip", "-o", "link", "show")
    assert node.interface not in links
    subprocess.run(["nsenter", "--mount", f"--target={node.pid}", "umount", nft], check=True)
    eventually(lambda: mesh.peers_of(node) == 1)
    eventually(lambda: mesh.conditions(node) == {})
    node.namespace.run("nft", "list", "table", "inet", "plexd")


def test_too_many_rules_leave_the_old_ones_in_force_and_are_reported(mesh: Mesh) -> None:
    kept = allow(mesh.ids["node-1"], mesh.ids["node-2"], 7001, "udp")
    mesh.set_policies(kept)
    eventually(lambda: mesh.peers_of(mesh.one) == 1)
    before = eventually(lambda: mesh.one.namespace.run("nft", "-s", "list", "table", "inet", "plexd"))
    mesh.set_policies(kept, *(allow("*", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 80, "tcp") for n in range(33_000)))
    eventually(lambda: "more than 32768" in mesh.conditions(mesh.one).get("changes_failed", ""))
    assert mesh.one.namespace.run("nft", "-s", "list", "table", "inet", "plexd") == before
    assert mesh.peers_of(mesh.one) == 1
    rejected = eventually(lambda: [c for c in mesh.corrections(mesh.one) if c.startswith("policy_rejected ")])
    assert len(rejected) == 1
    mesh.set_policies(kept)
    eventually(lambda: mesh.conditions(mesh.one) == {})
