"""IPv4 and IPv6 above and below, and hosts that have only one of them."""

from __future__ import annotations

import asyncio
import json

import pytest

from plexd.node.health import Condition
from tests.namespaces import inside
from tests.tunnel.harness import Living, Member, Network, cable, live, members, until
from tests.tunnel.underlays import endpoint, mesh_over

pytestmark = pytest.mark.namespaces


def source_towards(member: Member, address: str) -> str:
    """Which address packets of the host itself get."""
    (found,) = json.loads(member.namespace.run("ip", "-json", "route", "get", address))
    return str(found["prefsrc"])


def addresses(member: Member) -> list[str]:
    (link,) = json.loads(member.namespace.run("ip", "-json", "address", "show", "dev", member.interface))
    return [f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"] if each["scope"] == "global"]


@pytest.mark.parametrize("underlay", [4, 6], ids=lambda version: f"over IPv{version}")
@pytest.mark.parametrize("mesh", [4, 6], ids=lambda version: f"IPv{version}")
def test_mesh_of_either_family_works_over_either(network: Network, interface: str, mesh: int, underlay: int) -> None:
    one, other = network.namespace(), network.namespace()
    cable(one, other, "net", (2, 1))
    left, right = mesh_over((one, other, 2), interface, underlay=underlay, mesh=mesh)
    with members(left, right):
        for near, far in ((left, right), (right, left)):
            asyncio.run(until(lambda near=near, far=far: near.reaches(far)))  # type: ignore[misc]
            assert addresses(near) == [f"{near.mesh_ip}/{32 if mesh == 4 else 128}"]
            assert source_towards(near, far.mesh_ip) == near.mesh_ip


@pytest.fixture
def pair(tunable: Network, interface: str) -> tuple[Member, Member]:
    """The second has an IPv6 network behind it."""
    one, other = tunable.namespace(), tunable.namespace()
    cable(one, other, "net", (2, 1))
    return (
        Member(one, f"{interface}a", "10.100.0.1", endpoint(4, 2, 1)),
        Member(other, f"{interface}b", "10.100.0.2", endpoint(4, 2, 2), "fd00:200::/64"),
    )


def ipv6_routes(member: Member) -> list[str]:
    shown = member.namespace.run("ip", "-6", "route", "show", "dev", member.interface, "proto", "112")
    return [line.split()[0] for line in shown.splitlines()]


def test_host_without_ipv6_keeps_the_rest_of_its_mesh_and_routes_it_once_there_is_some(
    pair: tuple[Member, Member],
) -> None:
    one, other = pair

    async def script(living: Living) -> None:
        await until(lambda: one.reaches(other))
        for _ in range(5):
            result = await living.converger.converge()
            assert (result.changed, result.failed) == (0, 0)
        assert (living.health.findings(), living.reports) == ((), [])
        assert "fd00:200::/64" in one.namespace.run("wg", "show", one.interface, "allowed-ips")
        assert ipv6_routes(one) == []
        one.switch_ipv6(on=True)
        assert (await living.converger.converge()).failed == 0
        assert ipv6_routes(one) == ["fd00:200::/64"]

    one.switch_ipv6(on=False)
    live(one, other, script)


def test_ipv6_that_goes_takes_nothing_else_along(pair: tuple[Member, Member]) -> None:
    """Somebody switches it off under a running mesh."""
    one, other = pair

    async def script(living: Living) -> None:
        await until(lambda: one.reaches(other))
        assert ipv6_routes(one) == ["fd00:200::/64"]
        one.switch_ipv6(on=False)
        for _ in range(5):
            assert (await living.converger.converge()).failed == 0
        assert await asyncio.to_thread(one.reaches, other)
        assert living.health.findings() == ()

    live(one, other, script)


def test_mesh_address_without_ipv6_is_said_and_mended_by_switching_it_on(tunable: Network, interface: str) -> None:
    one, other = tunable.namespace(), tunable.namespace()
    cable(one, other, "net", (2, 1))
    left, right = mesh_over((one, other, 2), interface, underlay=4, mesh=6)

    async def scenario() -> None:
        living = Living(left, right)
        try:
            for _ in range(3):
                assert (await living.converger.converge()).failed == 1
            details = {finding.condition: finding.detail for finding in living.health.findings()}
            assert details[Condition.MESH_DOWN].startswith("the mesh address fd00:100::1 needs IPv6")
            assert living.door.netlink_writes == 0
            left.switch_ipv6(on=True)
            assert (await living.converger.converge()).failed == 0
            assert living.health.findings() == ()
            await until(lambda: left.reaches(right))
        finally:
            await living.door.close()

    right.join(left)
    try:
        left.switch_ipv6(on=False)
        with inside(one.name):
            asyncio.run(scenario())
    finally:
        left.leave()
        right.leave()
