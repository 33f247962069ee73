"""A mesh over an underlay that changes, and on a host without IPv6."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.mesh.address import parse_ip
from plexd.mesh.changes import PutPeer
from plexd.mesh.desired import Peer
from plexd.mesh.events import PeerAdded, PeerRemoved
from plexd.mesh.target import Settings
from plexd.node.health import Condition, Health
from plexd.store.identity import Identity
from tests.fakes import FakeKernel
from tests.node_harness import make_identity, make_node, middle, peer, settings_of, unix_time

pytestmark = pytest.mark.virtual_time

NARROW = parse_ip("198.51.100.7")
IPV6_PEER = peer(2, "fd00:200::/64")


class Stage:
    """A converger and its repair loop over a kernel in memory, after the first pass."""

    def __init__(self, *peers: Peer, identity: Identity | None = None, mtu: int = 0) -> None:
        self.health = Health()
        self.node = make_node(health=self.health, identity=identity)
        for known in peers:
            self.node.fold(PeerAdded(known))
        self.kernel = FakeKernel()
        self._mtu = mtu
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, self._settings, self.health, unix_time)
        self.converger = Converger([self.mesh.resource], self.health, middle)
        ready = asyncio.Event()
        ready.set()
        self.repair = Repair(self.kernel, self.converger, ready, lambda _: None)

    def _settings(self, identity: Identity) -> Settings | None:
        settings = settings_of(identity)
        return replace(settings, mtu=self._mtu) if settings is not None else None

    async def during(self, script: Callable[[], Awaitable[None]]) -> None:
        await self.converger.converge()
        loop = asyncio.create_task(self.repair.run())
        await asyncio.sleep(1)
        await script()
        assert not loop.done(), loop
        loop.cancel()
        await asyncio.wait({loop})

    @property
    def mtu(self) -> int:
        assert self.kernel.link is not None
        return self.kernel.link.mtu

    @property
    def routes(self) -> set[str]:
        return {str(prefix) for prefix, _ in self.kernel.routes}

    @property
    def conditions(self) -> set[Condition]:
        return {finding.condition for finding in self.health.findings()}


# MTU


async def test_mtu_leaves_room_on_the_narrowest_way_to_a_peer_from_the_start() -> None:
    stage = Stage(peer(2, endpoint="192.0.2.2:1"), peer(3, endpoint="198.51.100.7:1"))
    stage.kernel.ways[NARROW] = 1400
    await stage.converger.converge()
    assert stage.mtu == 1320
    assert (await stage.converger.converge()).changed == 0


async def test_peer_of_an_event_at_the_end_of_a_narrower_way_lowers_the_mtu_and_a_pass_without_it_raises_it() -> None:
    stage = Stage(peer(2, endpoint="192.0.2.2:1"))
    stage.kernel.ways[NARROW] = 1400

    async def script() -> None:
        assert stage.mtu == 1420
        looks, applied = stage.kernel.looks, len(stage.kernel.applied)
        stage.node.fold(PeerAdded(peer(4, endpoint="192.0.2.4:1")))
        assert await stage.converger.apply_event()
        await asyncio.sleep(10)
        assert (stage.kernel.looks, stage.mtu) == (looks + 1, 1420)  # the look that its route earns
        stage.node.fold(PeerAdded(peer(3, endpoint="198.51.100.7:1")))
        assert await stage.converger.apply_event()
        await asyncio.sleep(0.06)
        assert stage.mtu == 1320
        assert sum(isinstance(change, PutPeer) for change in stage.kernel.applied[applied:]) == 2
        stage.node.fold(PeerRemoved("n_3"))
        assert await stage.converger.apply_event()
        await stage.converger.converge()
        assert stage.mtu == 1420

    await stage.during(script)


async def test_configured_mtu_does_not_follow() -> None:
    stage = Stage(peer(2, endpoint="198.51.100.7:1"), mtu=1380)
    stage.kernel.ways[NARROW] = 1400
    await stage.converger.converge()
    assert stage.mtu == 1380


# IPv6


@pytest.mark.virtual_time
async def test_host_without_ipv6_is_told_once_and_everything_else_works() -> None:
    with capture_logs() as lines:
        stage = Stage(IPV6_PEER, peer(3))
        stage.kernel.switch_ipv6(on=False)
        assert (await stage.converger.converge()).failed == 0
        assert stage.routes == {"10.100.0.2/32", "10.100.0.3/32"}
        writes = stage.kernel.netlink_writes
        for _ in range(10):
            result = await stage.converger.converge()
            assert (result.changed, result.failed, result.corrections) == (0, 0, ())
        assert stage.kernel.netlink_writes == writes
        stage.node.fold(PeerAdded(peer(4, "fd00:400::/64")))
        assert await stage.converger.apply_event()
        assert stage.routes == {"10.100.0.2/32", "10.100.0.3/32", "10.100.0.4/32"}
        assert stage.conditions == set()
    assert [line["detail"] for line in lines if line["log_level"] in {"warning", "error"}] == [
        "this host has no IPv6: none of it is routed"
    ]


@pytest.mark.virtual_time
async def test_ipv6_that_is_switched_off_and_on_again_is_followed_without_a_failed_change() -> None:
    with capture_logs() as lines:
        stage = Stage(IPV6_PEER)

        async def script() -> None:
            assert "fd00:200::/64" in stage.routes
            stage.kernel.switch_ipv6(on=False)
            await asyncio.sleep(1)
            assert "fd00:200::/64" not in stage.routes
            stage.kernel.switch_ipv6(on=True)
            await asyncio.sleep(1)
            assert "fd00:200::/64" in stage.routes
            assert stage.conditions == set()

        await stage.during(script)
    assert [line for line in lines if line["log_level"] == "error"] == []


@pytest.mark.virtual_time
async def test_mesh_address_without_ipv6_is_one_line_and_one_condition_until_there_is_some() -> None:
    with capture_logs() as lines:
        identity = replace(make_identity(), mesh_ip=parse_ip("fd00:100::1"))
        stage = Stage(IPV6_PEER, identity=identity)
        stage.kernel.switch_ipv6(on=False)
        for _ in range(10):
            assert (await stage.converger.converge()).failed == 1
        assert stage.kernel.netlink_writes == 0
        (down,) = [finding for finding in stage.health.findings() if finding.condition is Condition.MESH_DOWN]
        assert down.detail.startswith("the mesh address fd00:100::1 needs IPv6")
        stage.kernel.switch_ipv6(on=True)
        assert (await stage.converger.converge()).failed == 0
        assert (stage.mesh.resource.up.is_set(), stage.conditions) == (True, set())
    assert len([line for line in lines if line["event"] == "mesh failed" and line["log_level"] == "error"]) == 1


@pytest.mark.parametrize("on", [True, False])
async def test_interface_damaged_below_the_smallest_mtu_of_ipv6_is_no_host_without_it(on: bool) -> None:
    stage = Stage(IPV6_PEER)
    stage.kernel.ipv6 = on
    await stage.converger.converge()
    sound = str(stage.kernel)
    stage.kernel.set_link(mtu=1000)
    assert (await stage.converger.converge()).failed == 0
    assert str(stage.kernel) == sound
