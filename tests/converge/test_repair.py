"""The repair loop in virtual time: how soon, how often, what it looks at, and when it gives in."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

import pytest

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.errors import KernelError
from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import Change, SetUp
from plexd.mesh.drift import Correction
from plexd.mesh.events import PeerAdded
from plexd.mesh.observed import ROUTE_METRIC, DevicePeer, Route
from plexd.node.health import Condition, Health
from tests.fakes import FakeKernel
from tests.node_harness import make_node, middle, peer, public_key, settings_of, unix_time

pytestmark = pytest.mark.virtual_time

OWN = Prefix.parse("10.100.0.1")
ROUTE = Route(Prefix.parse("10.100.0.2"), OWN.packed, ROUTE_METRIC)
STRANGER = Route(Prefix.parse("10.9.9.0/24"), None, ROUTE_METRIC)


class Loop:
    """A repair loop over a kernel in memory whose first pass is through."""

    def __init__(self) -> None:
        self.health = Health()
        self.node = make_node(peer(2), peer(3), health=self.health)
        self.kernel = FakeKernel()
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings_of, self.health, unix_time)
        self.converger = Converger([self.mesh.resource], self.health, middle)
        self.after = asyncio.Event()
        self.reports: list[tuple[float, Correction]] = []
        self.repair = Repair(self.kernel, self.converger, self.after, self._report)

    def _report(self, corrections: Sequence[Correction]) -> None:
        self.reports += [(asyncio.get_running_loop().time(), correction) for correction in corrections]

    async def __aenter__(self) -> Loop:
        assert (await self.converger.converge()).failed == 0
        self.after.set()
        self._task = asyncio.create_task(self.repair.run())
        await asyncio.sleep(1)  # the look that our own work earns
        self.sound = str(self.kernel)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert not self._task.done(), self._task
        self._task.cancel()
        await asyncio.wait({self._task})

    @property
    def reported(self) -> list[str]:
        return [f"{correction.type} {correction.detail}" for _, correction in self.reports]

    @property
    def conditions(self) -> set[Condition]:
        return {finding.condition for finding in self.health.findings()}


DAMAGE: dict[str, tuple[Callable[[FakeKernel], None], list[str]]] = {
    "link deleted": (FakeKernel.delete_link, ["interface_repaired plexd0: link, 2 peers, 2 routes"]),
    "link down": (
        lambda kernel: kernel.set_link(up=False),
        ["interface_repaired plexd0: up", "route_added 10.100.0.2/32", "route_added 10.100.0.3/32"],
    ),
    "MTU changed": (lambda kernel: kernel.set_link(mtu=1300), ["interface_repaired plexd0: mtu"]),
    "alias gone": (lambda kernel: kernel.set_link(alias="none"), ["interface_repaired plexd0: alias"]),
    "address deleted": (
        lambda kernel: kernel.remove_address(OWN),
        ["interface_repaired plexd0: address", "route_added 10.100.0.2/32", "route_added 10.100.0.3/32"],
    ),
    "route deleted": (lambda kernel: kernel.remove_route(ROUTE), ["route_added 10.100.0.2/32"]),
    "surplus route": (lambda kernel: kernel.add_route(STRANGER), ["route_removed 10.9.9.0/24"]),
}


@pytest.mark.parametrize(("damage", "corrections"), DAMAGE.values(), ids=DAMAGE)
async def test_damage_is_repaired_50_ms_after_its_notification(
    damage: Callable[[FakeKernel], None], corrections: list[str]
) -> None:
    async with Loop() as loop:
        started = asyncio.get_running_loop().time()
        damage(loop.kernel)
        assert str(loop.kernel) != loop.sound
        await asyncio.sleep(1)
        assert str(loop.kernel) == loop.sound
        assert loop.reported == corrections
        assert [at - started for at, _ in loop.reports] == pytest.approx([0.05] * len(corrections))


async def test_repair_ends_with_a_look_that_finds_nothing() -> None:
    """What is written for it comes back as a notification, once."""
    async with Loop() as loop:
        looks = loop.kernel.looks
        loop.kernel.remove_route(ROUTE)
        await asyncio.sleep(3600)
        assert loop.kernel.looks == looks + 2


async def test_peers_are_left_out_while_the_link_stands() -> None:
    async with Loop() as loop:
        looks = loop.kernel.device_looks
        loop.kernel.remove_route(ROUTE)
        await asyncio.sleep(1)
        assert loop.kernel.device_looks == looks
        loop.kernel.delete_link()
        await asyncio.sleep(1)
        assert loop.kernel.device_looks == looks + 1


async def test_event_not_yet_in_the_kernel_is_not_taken_for_done() -> None:
    """A pass that leaves the peers out must not count as one that brought them."""
    async with Loop() as loop:
        loop.node.fold(PeerAdded(peer(4)))
        loop.kernel.remove_route(ROUTE)
        await asyncio.sleep(1)
        assert public_key(4) in loop.kernel.peers


async def test_much_damage_at_once_is_one_pass() -> None:
    async with Loop() as loop:
        writes = loop.kernel.netlink_writes
        for _ in range(8):
            await asyncio.sleep(0.005)
            loop.kernel.set_link(mtu=1300)
        await asyncio.sleep(1)
        assert loop.kernel.netlink_writes == writes + 1


async def test_dead_program_is_replaced_without_debounce() -> None:
    async with Loop() as loop:
        started = asyncio.get_running_loop().time()
        loop.kernel.kill_program()
        await asyncio.sleep(1)
        assert str(loop.kernel) == loop.sound
        assert loop.reports[0][0] == pytest.approx(started)


async def test_nothing_is_repaired_before_the_first_pass() -> None:
    loop = Loop()
    task = asyncio.create_task(loop.repair.run())
    loop.kernel.noticed.set()
    await asyncio.sleep(10)
    assert loop.kernel.looks == 0
    task.cancel()
    await asyncio.wait({task})


# --- fights


class Fight:
    """Another program that undoes a repair 10 ms after it notices, as long as it runs."""

    def __init__(self, loop: Loop, damage: Callable[[FakeKernel], None]) -> None:
        self.rounds: list[float] = []
        self._loop = loop
        self._damage = damage

    async def run(self) -> None:
        while True:
            if str(self._loop.kernel) == self._loop.sound:
                self.rounds.append(asyncio.get_running_loop().time())
                self._damage(self._loop.kernel)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("damage", "subject"),
    [
        (DAMAGE["link deleted"][0], "link plexd0"),
        (DAMAGE["link down"][0], "up state of plexd0"),
        (DAMAGE["MTU changed"][0], "mtu of plexd0"),
        (DAMAGE["address deleted"][0], "address 10.100.0.1/32"),
        (DAMAGE["route deleted"][0], "route 10.100.0.2/32"),
    ],
)
async def test_fight_ends_in_back_off_one_record_and_one_condition(
    damage: Callable[[FakeKernel], None], subject: str
) -> None:
    async with Loop() as loop:
        fight = Fight(loop, damage)
        task = asyncio.create_task(fight.run())
        await asyncio.sleep(600)
        gaps = [later - earlier for earlier, later in itertools.pairwise(fight.rounds)]
        assert gaps[:10] == pytest.approx([0.06] * 10, abs=0.02)
        assert gaps[11:18] == pytest.approx([1, 2, 4, 8, 16, 32, 60], abs=0.1)
        assert set(map(round, gaps[18:])) == {60}
        assert [line for line in loop.reported if line.startswith("repair_contested")] == [
            f"repair_contested {subject}: 11 repairs in 60 s"
        ]
        contested = [f for f in loop.health.findings() if f.condition is Condition.REPAIR_CONTESTED]
        assert [finding.detail for finding in contested] == [f"{subject}: 11 repairs in 60 s"]

        task.cancel()
        await asyncio.sleep(121)  # a rest at most, and a minute in peace
        assert str(loop.kernel) == loop.sound
        assert loop.conditions == set()


@pytest.mark.parametrize("is_noticed", [False, True])
async def test_contested_peer_is_back_after_its_rest_whoever_saw_it_and_whatever_is_noticed_meanwhile(
    is_noticed: bool,
) -> None:
    """The look that a notification earns leaves peers out, and must not take them for left in peace."""
    async with Loop() as loop:
        key = bytes(public_key(2))
        for _ in range(12):
            loop.kernel.remove_peer(key)
            left = await loop.converger.converge()
        assert left.due is not None
        assert key not in loop.kernel.peers
        if is_noticed:
            loop.kernel.noticed.set()
        looks = loop.kernel.looks
        await asyncio.sleep(left.due - asyncio.get_running_loop().time() + 0.1)
        assert key in loop.kernel.peers
        assert loop.kernel.looks <= looks + 3
        assert Condition.REPAIR_CONTESTED in loop.conditions


async def test_mesh_is_called_down_while_its_link_is_left_alone() -> None:
    async with Loop() as loop:
        task = asyncio.create_task(Fight(loop, FakeKernel.delete_link).run())
        await asyncio.sleep(100)
        assert loop.kernel.link is None
        assert Condition.MESH_DOWN in loop.conditions
        task.cancel()


async def test_the_rest_is_repaired_at_once_during_a_fight() -> None:
    async with Loop() as loop:
        task = asyncio.create_task(Fight(loop, lambda kernel: kernel.set_link(mtu=1300)).run())
        await asyncio.sleep(100)
        loop.kernel.remove_route(ROUTE)
        await asyncio.sleep(0.06)
        assert ROUTE in loop.kernel.routes.values()
        task.cancel()


async def test_what_the_control_plane_changes_is_no_fight() -> None:
    async with Loop() as loop:
        for number in range(30):
            loop.node.fold(PeerAdded(peer(2, endpoint=f"192.0.2.1:{1000 + number}")))
            assert (await loop.converger.converge()).changed == 1
        assert loop.conditions == set()


# --- a kernel that refuses


async def test_creation_that_fails_is_tried_every_5_seconds_doubling_to_60() -> None:
    """It makes a link and deletes it again, and hears of both."""

    def no_up(change: Change) -> str | None:
        return "refused" if isinstance(change, SetUp) else None

    async with Loop() as loop:
        clock = asyncio.get_running_loop()
        tries: list[float] = []

        def refuse(change: Change) -> str | None:
            if isinstance(change, SetUp):
                tries.append(clock.time())
            return no_up(change)

        loop.kernel.refuse = refuse
        loop.kernel.delete_link()
        await asyncio.sleep(300)
        gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
        assert gaps == pytest.approx([5, 10, 20, 40, 60, 60, 60], abs=0.1)
        assert Condition.MESH_DOWN in loop.conditions


async def test_success_of_somebody_else_ends_the_wait() -> None:
    async with Loop() as loop:
        loop.kernel.failure = KernelError("no netlink")
        loop.kernel.remove_route(ROUTE)
        await asyncio.sleep(100)
        loop.kernel.failure = None
        await loop.converger.converge()
        loop.kernel.remove_route(ROUTE)
        await asyncio.sleep(0.06)
        assert ROUTE in loop.kernel.routes.values()


async def test_program_that_is_due_ends_the_wait() -> None:
    async with Loop() as loop:
        loop.kernel.failure = KernelError("it is started again in 1 s")
        loop.kernel.delete_link()
        await asyncio.sleep(1)
        loop.kernel.failure = None
        loop.kernel.damaged.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert str(loop.kernel) == loop.sound


async def test_clean_repair_does_not_hide_a_peer_that_failed() -> None:
    async with Loop() as loop:
        loop.kernel.put_peer(
            DevicePeer(bytes([77] * 32), bytes(32), Endpoint(parse_ip("192.0.2.9"), 1), 0, 0, 0, 0, ())
        )
        loop.kernel.refuse = lambda change: "no" if type(change).__name__ == "RemovePeer" else None
        assert (await loop.converger.converge()).failed == 1
        loop.kernel.remove_route(ROUTE)
        await asyncio.sleep(1)
        assert ROUTE in loop.kernel.routes.values()
        assert Condition.CHANGES_FAILED in loop.conditions
