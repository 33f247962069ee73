"""An agent that keeps two WireGuard interfaces and two tables: `python -m tests.two_interfaces NAME BACKEND`.

It runs until it is killed, and prints a line when the first pass has ended, for every correction, and for every failure
of the second interface.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pydantic import SecretStr

from plexd import log
from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.errors import KernelError
from plexd.linux.interface import InterfaceName
from plexd.mesh import firewall
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Desired, Peer, Policy, PolicyRule
from plexd.mesh.drift import Correction
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.store.identity import Identity
from tests.mesh_kernel import MeshKernel
from tests.second_resources import ALIAS, DeviceSettings, DeviceTarget, SecondDevice, SecondTable

SECOND_TABLE = "plexd_second"
MESH_KEY, SECOND_KEY = PrivateKey(bytes([1] * 32)), PrivateKey(bytes([2] * 32))
MESH_ADDRESS, SECOND_ADDRESS = Prefix.parse("10.100.0.1"), Prefix.parse("10.200.0.1")
PEER = Peer(
    "n_2", PublicKey(bytes([9] * 32)), parse_ip("10.100.0.2"), "", (Prefix.parse("10.100.0.2"),), NO_PRESHARED_KEY
)
ALLOW = Policy("all", (PolicyRule("*", "*", 0, "", "allow"),))


@dataclass(frozen=True)
class Names:
    """The interfaces of one agent: the mesh's, and the second one."""

    mesh: str

    @property
    def second(self) -> str:
        return f"{self.mesh}x"


class Told(SecondDevice):
    def failed(self, error: KernelError, *, is_news: bool) -> None:
        print(f"failed {self.subject.name}", flush=True)


def report(corrections: Sequence[Correction]) -> None:
    for correction in corrections:
        print(f"{correction.type} {correction.detail}", flush=True)


async def main(names: Names, backend: Literal["kernel", "userspace"]) -> None:
    kernel = MeshKernel(names.mesh, backend, "wireguard-go")
    second = kernel.interface(InterfaceName(names.second, ALIAS, "access"), backend, "wireguard-go")
    table = kernel.table(SECOND_TABLE)
    health = Health()
    identity = Identity("n_1", MESH_ADDRESS.packed, SecretStr(""), MESH_KEY)
    node = Node(identity, Desired(peers={PEER.id: PEER}, policies=(ALLOW,)), 0.0, health)

    def settings(_: Identity) -> Settings:
        policy = firewall.Settings(MESH_ADDRESS.packed, (names.mesh,))
        return Settings("n_1", names.mesh, MESH_KEY, MESH_ADDRESS.packed, 51820, 1420, 0, None, policy=policy)

    mesh = build_mesh(kernel.mesh, kernel.mesh_table, node, settings, health)
    kernel.mesh.is_wanted = mesh.wanted.is_wanted
    target = DeviceTarget(DeviceSettings(SECOND_KEY, SECOND_ADDRESS, interface=names.second))
    ruleset = firewall.ruleset(firewall.Settings(SECOND_ADDRESS.packed, (names.second,)), table=SECOND_TABLE)
    resources = (mesh.resource, Told(second, target), SecondTable(table, ruleset))
    converger = Converger(resources, health)
    async with asyncio.TaskGroup() as group:
        group.create_task(kernel.watch())
        group.create_task(kernel.watch_firewall())
        report((await converger.converge()).corrections)
        print("converged", flush=True)
        group.create_task(Repair(kernel, converger, mesh.resource.up, report).run())


if __name__ == "__main__":
    log.set_up("error", "console")
    asyncio.run(main(Names(sys.argv[1]), cast("Literal['kernel', 'userspace']", sys.argv[2])))
