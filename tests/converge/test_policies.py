"""Policies on their way into the kernel: the firewall first, closed where it cannot be had, nobody in beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.converge.results import PassResult
from plexd.mesh import firewall
from plexd.mesh.changes import Change, CreateLink, PutPeer, RemoveTable, ReplaceTable, SetDown, SetUp
from plexd.mesh.desired import EndpointSource, FullState, Peer, Policy, PolicyRule
from plexd.mesh.events import EndpointOffered, PeerAdded
from plexd.mesh.policy import Protocol
from plexd.mesh.target import Settings
from plexd.mesh.temporary_allows import TemporaryAllow
from plexd.node.health import Condition, Health
from plexd.store.identity import Identity
from tests.fakes import FakeKernel
from tests.node_harness import enforcing, make_node, middle, peer, public_key, settings_of, state_of, unix_time
from tests.virtual_time import run_virtual

REFUSED = "could not replace table inet plexd: no such file or directory"
ALLOW_2 = Policy("two", (PolicyRule("n_self", "n_2", 443, "tcp", "allow"),))
ALLOW_3 = Policy("three", (PolicyRule("10.100.0.0/16", "n_3", 0, "", "allow"),))
RELAY, DIRECT = "203.0.113.5:51821", "192.0.2.2:51820"


class Enforced:
    """A node with peers n_2 and n_3 over a kernel in memory."""

    def __init__(self, *policies: Policy, settings: Callable[[Identity], Settings | None] = enforcing) -> None:
        self.health = Health()
        self.node = make_node(health=self.health)
        self.kernel = FakeKernel()
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings, self.health, unix_time)
        self.converger = Converger([self.mesh.resource], self.health, middle)
        self.pull(peer(2), peer(3), policies=policies)

    def pull(self, *peers: Peer, policies: tuple[Policy, ...]) -> None:
        state: FullState = replace(state_of(*peers), policies=policies)
        self.node.replace(state, unix_time())

    async def allow(self, *policies: Policy) -> PassResult:
        self.pull(*self.node.desired.peers.values(), policies=policies)
        return await self.converger.converge()

    async def converge_with_a_choice(self) -> None:
        """To where n_2, which does not answer, is due to move on from DIRECT to RELAY."""
        for endpoint, source in ((RELAY, EndpointSource.EVENT), (DIRECT, EndpointSource.REPORT)):
            self.node.fold(EndpointOffered("n_2", endpoint, source))
        await self.converger.converge()
        await asyncio.sleep(60)

    def refuse_firewalls(self) -> None:
        self.kernel.refuse = lambda change: REFUSED if isinstance(change, ReplaceTable) else None

    def accept_all(self) -> None:
        self.kernel.refuse = lambda change: None

    @property
    def on_interface(self) -> set[str]:
        keys = {p.public_key: p.id for p in self.node.desired.peers.values()}
        return {keys[key] for key in self.kernel.peers}  # type: ignore[index]  # a key is its bytes

    def is_up(self) -> bool:
        return self.kernel.link is not None and self.kernel.link.up

    @property
    def conditions(self) -> dict[Condition, str]:
        return {finding.condition: finding.detail for finding in self.health.findings()}


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    run_virtual(main())


def kinds(changes: list[Change]) -> list[type[Change]]:
    return [type(change) for change in changes]


def said(result: PassResult) -> list[str]:
    return [f"{correction.type} {correction.detail}" for correction in result.corrections]


def test_firewall_is_there_before_the_interface_and_before_any_peer() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        order = kinds(world.kernel.applied)
        assert order[0] is ReplaceTable
        assert order.index(CreateLink) < order.index(SetUp) < order.index(PutPeer)
        assert world.on_interface == {"n_2"}

    run(main)


def test_no_policies_leave_the_interface_up_without_peers_behind_the_baseline() -> None:
    async def main() -> None:
        world = Enforced()
        await world.converger.converge()
        assert world.on_interface == set()
        assert world.is_up()
        assert (
            world.kernel.firewall
            == firewall.ruleset(firewall.Settings(world.node.identity.mesh_ip, ("plexd0",))).digest
        )

    run(main)


def test_peer_that_no_policy_shows_appears_once_one_does_without_being_added_again() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        world.node.fold(PeerAdded(peer(4)))
        assert await world.converger.apply_event()
        assert world.on_interface == {"n_2"}
        await world.allow(Policy("four", (PolicyRule("n_4", "n_self", 0, "", "allow"),)))
        assert world.on_interface == {"n_4"}

    run(main)


def test_event_that_brings_a_visible_peer_replaces_the_firewall_first_and_looks_at_nothing() -> None:
    async def main() -> None:
        world = Enforced(Policy("all", (PolicyRule("*", "*", 0, "", "allow"),)))
        await world.converger.converge()
        world.kernel.applied.clear()
        looks = world.kernel.looks
        world.node.fold(PeerAdded(peer(4)))
        assert await world.converger.apply_event()
        assert kinds(world.kernel.applied)[:2] == [ReplaceTable, PutPeer]
        assert world.kernel.looks == looks

    run(main)


def test_refused_policies_leave_the_old_firewall_and_let_nobody_new_in() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        in_force = world.kernel.firewall
        world.refuse_firewalls()
        result = await world.allow(ALLOW_3)
        assert world.kernel.firewall == in_force
        assert world.on_interface == set()  # n_2 is not allowed any more, n_3 not yet
        assert "peer_removed peer n_2" in said(result)
        assert f"policy_rejected {REFUSED}" in said(result)
        assert Condition.CHANGES_FAILED in world.conditions
        assert Condition.MESH_DOWN not in world.conditions
        assert said(await world.converger.converge()) == []  # told once
        world.accept_all()
        await world.converger.converge()
        assert world.on_interface == {"n_3"}
        assert world.conditions == {}

    run(main)


def test_peer_that_the_old_firewall_was_made_for_is_restored_although_the_new_one_is_refused() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        world.refuse_firewalls()
        world.kernel.remove_peer(peer(2).public_key)
        await world.allow(ALLOW_2, ALLOW_3)
        assert world.on_interface == {"n_2"}

    run(main)


def test_refused_firewall_at_an_event_adds_no_peer_and_asks_for_a_pass() -> None:
    async def main() -> None:
        world = Enforced(Policy("all", (PolicyRule("*", "*", 0, "", "allow"),)))
        await world.converger.converge()
        world.refuse_firewalls()
        world.node.fold(PeerAdded(peer(4)))
        assert not await world.converger.apply_event()
        assert world.on_interface == {"n_2", "n_3"}

    run(main)


def test_move_to_the_next_endpoint_lets_nobody_in_whom_a_refused_firewall_was_for() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converge_with_a_choice()
        in_force = world.kernel.firewall
        world.refuse_firewalls()
        await world.allow(ALLOW_2, ALLOW_3)
        await world.converger.step(world.mesh.resource, world.mesh.resource.look_at_endpoints, "endpoints not changed")
        assert str(world.kernel.peers[public_key(2)].endpoint) == RELAY
        assert world.kernel.firewall == in_force
        assert world.on_interface == {"n_2"}

    run(main)


def test_policies_that_a_move_to_the_next_endpoint_puts_in_force_are_told_like_those_of_an_event() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converge_with_a_choice()
        world.pull(peer(2), peer(3, endpoint="192.0.2.3:51820"), policies=(ALLOW_2, ALLOW_3))
        world.mesh.retries.awaiting.clear()
        await world.converger.step(world.mesh.resource, world.mesh.resource.look_at_endpoints, "endpoints not changed")
        assert world.on_interface == {"n_2", "n_3"}
        assert world.mesh.view.since["n_3"] == world.mesh.view.policies_applied_at == unix_time()
        assert world.mesh.retries.awaiting.is_set()

    run(main)


def test_where_not_even_the_baseline_can_be_had_there_is_no_interface() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        world.refuse_firewalls()
        assert said(await world.converger.converge()) == [f"policy_rejected {REFUSED}"]
        assert said(await world.converger.converge()) == []
        assert said(await world.converger.converge()) == []
        assert world.kernel.link is None
        assert world.conditions[Condition.MESH_DOWN] == REFUSED
        assert not world.mesh.resource.up.is_set()
        world.accept_all()
        await world.converger.converge()
        assert world.on_interface == {"n_2"}
        assert world.conditions == {}

    run(main)


def test_interface_that_lost_its_firewall_for_good_is_taken_down_and_comes_back_with_it() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        world.kernel.flush_ruleset()
        world.refuse_firewalls()
        await world.converger.converge()
        assert not world.is_up()
        assert world.conditions[Condition.MESH_DOWN] == REFUSED
        await world.converger.converge()
        assert not world.is_up()
        world.accept_all()
        await world.converger.converge()
        assert world.is_up()
        assert world.on_interface == {"n_2"}
        assert world.conditions == {}

    run(main)


def test_table_that_is_not_known_and_cannot_be_replaced_takes_no_interface_down() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        world.kernel.touch_firewall()
        world.refuse_firewalls()
        world.kernel.applied.clear()
        await world.allow(ALLOW_2, ALLOW_3)
        assert SetDown not in kinds(world.kernel.applied)
        assert world.is_up()
        assert world.on_interface == {"n_2"}
        assert world.conditions.keys() == {Condition.CHANGES_FAILED}

    run(main)


def test_policies_that_cannot_be_had_at_start_leave_the_baseline_and_no_peers() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        baseline = firewall.ruleset(firewall.Settings(world.node.identity.mesh_ip, ("plexd0",)))
        world.kernel.refuse = lambda change: (
            REFUSED if isinstance(change, ReplaceTable) and change.ruleset != baseline else None
        )
        await world.converger.converge()
        assert world.kernel.firewall == baseline.digest
        assert world.is_up()
        assert world.on_interface == set()

    run(main)


def test_damaged_firewall_is_a_repair_and_changed_policies_are_none() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        assert said(await world.converger.converge()) == []
        world.kernel.touch_firewall()
        assert said(await world.converger.repair()) == ["firewall_repaired inet plexd"]
        assert said(await world.allow(ALLOW_2, ALLOW_3)) == ["peer_added peer n_3", "route_added 10.100.0.3/32"]
        assert (await world.converger.converge()).changed == 0

    run(main)


def test_table_of_an_earlier_run_is_replaced_at_start() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        world.kernel.touch_firewall()
        assert said(await world.converger.converge()) == []
        assert world.kernel.firewall

    run(main)


def test_firewall_flushed_20_times_in_a_minute_is_contested_once_and_repairs_thin_out() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        reports: list[str] = []
        await world.converger.converge()
        after = asyncio.Event()
        after.set()
        repair = Repair(
            world.kernel,
            world.converger,
            after,
            lambda found: reports.extend(map(str, (c.type for c in found))),
        )
        task = asyncio.create_task(repair.run())
        for _ in range(20):
            await asyncio.sleep(3)
            world.kernel.flush_ruleset()
        await asyncio.sleep(1)
        assert reports.count("repair_contested") == 1
        assert 10 < reports.count("firewall_repaired") < 20
        await asyncio.sleep(200)
        assert world.kernel.firewall
        assert world.conditions == {}
        task.cancel()
        await asyncio.wait({task})

    run(main)


async def fight(world: Enforced) -> None:
    """Until the firewall is contested."""
    while Condition.REPAIR_CONTESTED not in world.conditions:
        world.kernel.flush_ruleset()
        await world.converger.repair()


def is_up(world: Enforced) -> bool:
    return world.kernel.link is not None and world.kernel.link.up


def test_interface_is_down_while_the_firewall_is_contested_and_gone() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        await fight(world)
        for _ in range(20):
            world.kernel.flush_ruleset()
            result = await world.converger.repair()
            assert (is_up(world), world.mesh.resource.up.is_set()) == (False, False)
            assert "down until it may be repaired" in world.conditions[Condition.MESH_DOWN]
            assert result.due is not None
            await asyncio.sleep(result.due - asyncio.get_running_loop().time())
            await world.converger.repair()
            assert world.kernel.firewall
            assert is_up(world)
            assert world.kernel.routes
            assert Condition.MESH_DOWN not in world.conditions
        assert world.conditions[Condition.REPAIR_CONTESTED].startswith("table inet plexd")
        assert "," not in world.conditions[Condition.REPAIR_CONTESTED]

    run(main)


def test_new_peer_waits_while_the_firewall_is_contested_and_gone() -> None:
    async def main() -> None:
        world = Enforced(ALLOW_2)
        await world.converger.converge()
        await fight(world)
        world.kernel.flush_ruleset()
        world.kernel.remove_peer(peer(2).public_key)
        await world.converger.converge()
        assert world.kernel.firewall is None
        assert world.on_interface == set()

    run(main)


def test_policy_that_is_not_enforced_removes_the_table_of_an_earlier_run_and_shows_everybody() -> None:
    async def main() -> None:
        world = Enforced(settings=settings_of)
        world.kernel.touch_firewall()
        await world.converger.converge()
        assert world.kernel.firewall is None
        assert world.on_interface == {"n_2", "n_3"}
        await world.converger.converge()
        assert kinds(world.kernel.applied).count(RemoveTable) == 1

    run(main)


def test_table_that_cannot_be_removed_stands_in_nobodys_way_where_no_policy_is_enforced() -> None:
    async def main() -> None:
        world = Enforced(settings=settings_of)
        world.kernel.refuse = lambda change: "no nft here" if isinstance(change, RemoveTable) else None
        assert (await world.converger.converge()).failed == 0
        assert world.on_interface == {"n_2", "n_3"}

    run(main)


def test_opening_is_let_in_and_closed_again_without_a_look() -> None:
    async def main() -> None:
        world = Enforced()
        await world.converger.converge()
        closed, looks = world.kernel.firewall, world.kernel.looks
        own = world.node.identity.mesh_ip
        world.mesh.wanted.temporary_allows = world.mesh.wanted.temporary_allows.open(
            TemporaryAllow("session", Protocol.TCP, 42000, own)
        )
        assert await world.converger.apply_event()
        assert world.kernel.firewall != closed
        world.mesh.wanted.temporary_allows = world.mesh.wanted.temporary_allows.close("session")
        assert await world.converger.apply_event()
        assert world.kernel.firewall == closed
        assert world.kernel.looks == looks

    run(main)
