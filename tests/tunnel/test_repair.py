"""Damage done by hand under a running agent, and what an undamaged mesh is spared; judged by ping and `ip`."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from plexd.lab.namespaces import LabError
from tests.tunnel.harness import Living, Member, Network, cable, live, pinging, until
from tests.tunnel.underlays import endpoint

pytestmark = pytest.mark.namespaces

IDLE_PASSES = 100


@pytest.fixture
def pair(network: Network, interface: str) -> tuple[Member, Member]:
    one, other = network.namespace(), network.namespace()
    cable(one, other, "net", (2, 1))
    return (
        Member(one, f"{interface}a", "10.100.0.1", endpoint(4, 2, 1)),
        Member(other, f"{interface}b", "10.100.0.2", endpoint(4, 2, 2), "10.50.0.0/16", "fd00:200::/64"),
    )


def shown(member: Member) -> str:
    """Everything about the interface that may be damaged, by `ip`."""

    def ip(*words: str) -> str:
        return member.namespace.run("ip", *words, "dev", member.interface)

    try:
        (link,) = json.loads(ip("-json", "link", "show"))
        routes = [ip(family, "route", "show", "proto", "112") for family in ("-4", "-6")]
        addresses = ip("-o", "address", "show", "scope", "global")
    except LabError:
        return "gone"
    facts = (link.get("ifalias"), link["mtu"], "UP" in link["flags"], re.findall(r"inet6? (\S+)", addresses))
    return f"{facts}\n{''.join(routes)}"


DAMAGE = {  # commands, and the corrections they lead to
    "link deleted": ("ip link delete {i}", ["interface_repaired {i}: link, 1 peers, 3 routes"]),
    "address deleted": (
        "ip address delete 10.100.0.1/32 dev {i}",
        ["interface_repaired {i}: address", "route_added 10.50.0.0/16", "route_added 10.100.0.2/32"],
    ),
    "address added": ("ip address add 10.9.9.9/24 dev {i}", ["interface_repaired {i}: address"]),
    "route deleted": ("ip route delete 10.100.0.2 dev {i}", ["route_added 10.100.0.2/32"]),
    "IPv6 route deleted": ("ip -6 route delete fd00:200::/64 dev {i}", ["route_added fd00:200::/64"]),
    "MTU changed": ("ip link set {i} mtu 1300", ["interface_repaired {i}: mtu"]),
    "MTU too small for IPv6": (
        "ip link set {i} mtu 1000",
        ["interface_repaired {i}: mtu", "route_added fd00:200::/64"],
    ),
    "alias changed": ("ip link set {i} alias nobody", ["interface_repaired {i}: alias"]),
    "link down": (
        "ip link set {i} down",
        [
            "interface_repaired {i}: up",
            "route_added 10.50.0.0/16",
            "route_added 10.100.0.2/32",
            "route_added fd00:200::/64",
        ],
    ),
    "link down and up": (
        "ip link set {i} down && ip link set {i} up",
        ["route_added 10.50.0.0/16", "route_added 10.100.0.2/32", "route_added fd00:200::/64"],
    ),
}


@pytest.mark.parametrize(("command", "corrections"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_repaired_without_being_asked(
    pair: tuple[Member, Member], command: str, corrections: list[str]
) -> None:
    one, other = pair

    async def script(living: Living) -> None:
        await until(lambda: one.reaches(other))
        sound = shown(one)
        one.namespace.run("sh", "-c", command.format(i=one.interface))
        await until(lambda: shown(one) == sound)
        await until(lambda: one.reaches(other))
        assert sorted(living.reports) == sorted(line.format(i=one.interface) for line in corrections)
        writes = living.door.netlink_writes
        assert (await living.converger.converge()).changed == 0
        assert living.door.netlink_writes == writes

    live(one, other, script)


def test_undamaged_mesh_is_neither_written_to_nor_loses_a_packet(pair: tuple[Member, Member]) -> None:
    one, other = pair

    async def script(living: Living) -> None:
        await until(lambda: one.reaches(other))
        sound, writes = shown(one), living.door.netlink_writes
        async with pinging(one, other) as answered:
            for _ in range(IDLE_PASSES):
                for a_pass in (living.converger.converge, living.converger.repair):
                    result = await a_pass()
                    assert (result.changed, result.failed, result.corrections) == (0, 0, ())
        assert answered == list(range(1, len(answered) + 1))
        assert len(answered) >= 50  # ping does not wait long for the last ones
        assert living.door.netlink_writes == writes
        assert (shown(one), living.reports) == (sound, [])

    live(one, other, script)


def test_underlay_that_gets_narrower_and_wider_again_is_followed(pair: tuple[Member, Member]) -> None:
    """Its link, the route to the peer, and a rule that sends packets another way."""
    one, other = pair
    run = one.namespace.run

    async def script(living: Living) -> None:
        await until(lambda: one.reaches(other))
        assert one.mtu == 1420
        for narrow, mtu, wide in (
            ("link set net mtu 1400", 1320, "link set net mtu 1500"),
            ("route add 192.0.2.2/32 dev net mtu 1380", 1300, "route delete 192.0.2.2/32 dev net"),
            ("route add 192.0.2.0/24 dev net mtu 1300 table 77", 1420, "route show"),
            ("rule add lookup 77 priority 100", 1280, "rule delete priority 100"),
        ):
            run("ip", *narrow.split())
            await until(lambda mtu=mtu: one.mtu == mtu)  # type: ignore[misc]
            run("ip", *wide.split())
            await until(lambda: one.mtu == 1420)
        assert set(living.reports) == {f"interface_repaired {one.interface}: mtu"}
        assert await asyncio.to_thread(one.reaches, other)

    live(one, other, script)
