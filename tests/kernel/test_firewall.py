"""The filter table beside the kernel's own WireGuard, and a kernel that has not loaded what the table needs."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.mesh import firewall
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Desired, Peer, Policy, PolicyRule
from plexd.mesh.keys import NO_PRESHARED_KEY, PublicKey
from plexd.mesh.target import Settings
from plexd.node.health import Condition, Health
from plexd.node.state import Node
from plexd.store.identity import Identity
from tests.kernel.mesh import INTERFACE, PRIVATE_KEY, run
from tests.mesh_kernel import MeshKernel

pytestmark = pytest.mark.usefixtures("namespace")

OWN_IP = parse_ip("10.100.255.1")
LOADER = Path("/proc/sys/kernel/modprobe")


@pytest.fixture
def without_nf_tables() -> Iterator[None]:
    """Not loaded, and not loaded by the kernel itself when somebody asks for it; afterwards all is as before."""
    loader, modules = LOADER.read_text(), loaded()
    LOADER.write_text("/bin/false\n")
    try:
        remove = ["modprobe", "--remove", "--remove-holders", "nf_tables"]
        subprocess.run(remove, check=False)  # fails where the last of its users has taken it along
        assert "nf_tables" not in loaded()
        yield
    finally:
        LOADER.write_text(loader)
        if missing := modules - loaded():  # on an emulated machine that takes longer than nft may
            run("modprobe", "--all", *missing)


def loaded() -> set[str]:
    return {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}


def settings(identity: Identity) -> Settings:
    own = Settings("n_self", INTERFACE, PRIVATE_KEY, identity.mesh_ip, 51820, 1420, 25, None)
    return replace(own, policy=firewall.Settings(identity.mesh_ip, (INTERFACE,)))


def stage() -> tuple[Converger, Health, MeshKernel]:
    health = Health()
    allowed = Policy("all", (PolicyRule("*", "*", 0, "", "allow"),))
    prefix = Prefix.parse("10.100.0.1")
    peer = Peer("n_1", PublicKey(bytes([1] * 32)), prefix.packed, "", (prefix,), NO_PRESHARED_KEY)
    desired = Desired(peers={peer.id: peer}, policies=(allowed,))
    node = Node(Identity("n_self", OWN_IP, SecretStr(""), PRIVATE_KEY), desired, 0.0, health)
    kernel = MeshKernel(INTERFACE, "kernel", "wireguard-go")
    mesh = build_mesh(kernel.mesh, kernel.mesh_table, node, settings, health)
    return Converger([mesh.resource], health), health, kernel


def links() -> str:
    return run("ip", "-o", "link", "show")


async def test_kernel_without_nf_tables_gets_no_interface_until_the_module_is_there(without_nf_tables: None) -> None:
    converger, health, kernel = stage()
    await converger.converge()
    (down,) = [f for f in health.findings() if f.condition is Condition.MESH_DOWN]
    assert "load the module nf_tables" in down.detail
    assert INTERFACE not in links()
    await asyncio.to_thread(run, "modprobe", "nf_tables")
    await asyncio.to_thread(LOADER.write_text, "/sbin/modprobe\n")  # for the parts that tables consist of
    assert (await converger.converge()).failed == 0
    assert health.findings() == ()
    assert INTERFACE in links()
    await kernel.close()


async def test_table_is_in_place_and_repaired_and_an_idle_pass_writes_nothing() -> None:
    converger, _, kernel = stage()
    assert (await converger.converge()).failed == 0
    table = await asyncio.to_thread(run, "nft", "list", "table", "inet", "plexd")
    assert "jump mesh" in table
    writes = kernel.netlink_writes
    for _ in range(3):
        assert (await converger.converge()).changed == 0
    assert kernel.netlink_writes == writes
    await asyncio.to_thread(run, "nft", "flush", "ruleset")
    result = await converger.repair()
    assert [correction.type for correction in result.corrections] == ["firewall_repaired"]
    again = await asyncio.to_thread(run, "nft", "list", "table", "inet", "plexd")
    assert again == table
    await kernel.close()
