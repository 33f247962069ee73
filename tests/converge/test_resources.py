"""A pass over several resources: the mesh, a second WireGuard device and a second table."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.errors import KernelError
from plexd.mesh.address import Prefix
from plexd.mesh.changes import AddAddress
from plexd.mesh.drift import Correction
from plexd.mesh.events import PeerAdded
from plexd.mesh.firewall import Settings, ruleset
from plexd.mesh.keys import PrivateKey
from plexd.node.health import Condition, Health
from tests.fakes import FakeKernel
from tests.node_harness import make_node, middle, peer, settings_of, unix_time
from tests.second_resources import ACCESS, ALIAS, DeviceSettings, DeviceTarget, SecondDevice, SecondTable

pytestmark = pytest.mark.virtual_time

OWN = Prefix.parse("10.200.0.1")


class World:
    """Three resources, whose kernels fail and are damaged apart from each other."""

    def __init__(self) -> None:
        self.health = Health()
        self.node = make_node(peer(2), health=self.health)
        self.kernel = FakeKernel()
        self.access = FakeKernel(ACCESS, alias=ALIAS)
        self.bridge = FakeKernel()  # only its table counts
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings_of, self.health, unix_time)
        self.device = SecondDevice(self.access, DeviceTarget(DeviceSettings(PrivateKey.generate(), OWN)))
        self.ruleset = ruleset(Settings(OWN.packed, (ACCESS,)))
        self.table = SecondTable(self.bridge.table, self.ruleset)
        self.converger = Converger([self.device, self.table, self.mesh.resource], self.health, middle)
        self.reports: list[tuple[float, Correction]] = []

    def report(self, corrections: Sequence[Correction]) -> None:
        self.reports += [(asyncio.get_running_loop().time(), correction) for correction in corrections]

    async def repairing(self, seconds: float) -> None:
        """The repair loop, which every one of the kernels notifies."""
        repair = Repair(self.kernel, self.converger, self.mesh.resource.up, self.report)
        task = asyncio.create_task(repair.run())
        await asyncio.sleep(seconds)
        assert not task.done(), task
        task.cancel()
        await asyncio.wait({task})

    def problems(self) -> dict[Condition, str]:
        return {raised.condition: raised.detail for raised in self.health.findings()}


async def test_each_resource_is_brought_up_and_a_second_pass_writes_nothing() -> None:
    world = World()
    assert (await world.converger.converge()).failed == 0
    assert world.access.addresses == {OWN}
    assert world.access.link is not None
    assert world.access.link.alias == ALIAS
    assert world.bridge.firewall == world.ruleset.digest
    assert len(world.kernel.peers) == 1
    assert world.converger.clean.is_set()
    result = await world.converger.converge()
    assert (result.changed, result.failed) == (0, 0)


async def test_repairs_are_reported_by_the_name_of_their_resource() -> None:
    world = World()
    await world.converger.converge()
    world.access.delete_link()
    world.bridge.flush_ruleset()
    world.kernel.set_link(mtu=1300)
    result = await world.converger.converge()
    assert [str(c.detail) for c in result.corrections] == [
        "plexd-access: link, 0 peers, 0 routes",
        "inet plexd",  # the name that the fake table has
        "plexd0: mtu",
    ]


async def test_resource_that_fails_costs_the_others_nothing() -> None:
    world = World()
    world.access.failure = KernelError("no netlink today")
    result = await world.converger.converge()
    assert (result.failed, world.device.errors) == (1, ["no netlink today"])
    assert world.bridge.firewall == world.ruleset.digest
    assert world.mesh.resource.up.is_set()
    assert not world.converger.clean.is_set()
    assert world.problems() == {Condition.CHANGES_FAILED: "plexd-access: no netlink today"}
    world.access.failure = None
    assert (await world.converger.converge()).failed == 0
    assert world.problems() == {}


async def test_health_names_the_resource_whose_change_failed() -> None:
    world = World()
    world.access.refuse = lambda change: "not today" if isinstance(change, AddAddress) else None
    await world.converger.converge()
    assert world.problems()[Condition.CHANGES_FAILED].startswith("plexd-access: ")
    assert Condition.MESH_DOWN not in world.problems()


async def test_resource_that_keeps_failing_does_not_delay_the_repair_of_another() -> None:
    world = World()
    await world.converger.converge()
    world.access.failure = KernelError("no netlink today")
    loop = asyncio.get_running_loop()
    for second in range(1, 60, 5):
        loop.call_at(second, world.kernel.delete_link)
    await world.repairing(60)
    repaired = [at for at, correction in world.reports if correction.type == "interface_repaired"]
    assert repaired == pytest.approx([second + 0.05 for second in range(1, 60, 5)][: len(repaired)])
    assert len(repaired) >= 10  # until the limiter takes it for flapping
    assert len(world.device.errors) < 10  # it rests between its tries


async def test_failing_resource_is_tried_again_when_its_rest_is_over() -> None:
    world = World()
    await world.converger.converge()
    world.access.delete_link()
    world.access.failure = KernelError("no netlink today")
    loop = asyncio.get_running_loop()
    loop.call_at(1, world.kernel.noticed.set)
    loop.call_at(2, world.kernel.noticed.set)
    loop.call_at(3, setattr, world.access, "failure", None)
    await world.repairing(30)
    assert world.access.link is not None


async def test_flapping_of_one_resource_leaves_the_others_repairs_alone() -> None:
    world = World()
    await world.converger.converge()
    for _ in range(12):
        world.access.delete_link()
        await world.converger.converge()
    assert "link plexd-access" in world.problems()[Condition.REPAIR_CONTESTED]
    assert world.access.link is None
    world.kernel.delete_link()
    result = await world.converger.converge()
    assert [c.type for c in result.corrections] == ["interface_repaired"]
    assert world.kernel.link is not None


async def test_event_of_the_mesh_touches_no_other_resource() -> None:
    world = World()
    await world.converger.converge()
    looks = world.access.looks
    world.access.applied.clear()
    world.node.fold(PeerAdded(peer(3)))
    assert await world.converger.apply_event()
    assert (world.access.looks, world.access.applied) == (looks, [])
    assert len(world.kernel.peers) == 2
