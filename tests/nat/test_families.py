"""Real agents that register with IPv6 addresses, over IPv6 and behind NATs of IPv4."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.nat.conftest import World
from tests.nat.internet import MASQUERADE, MESH_PORT, SERVERS, SERVERS_IPV6, Agent, until

pytestmark = [pytest.mark.namespaces]

MESH_IPV6 = "fd00:100::/64"


def addresses(agent: Agent) -> list[str]:
    (link,) = json.loads(agent.host.namespace.run("ip", "-json", "address", "show", "dev", agent.interface))
    return [f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"] if each["scope"] == "global"]


def routes(agent: Agent) -> list[tuple[str, str, int]]:
    """Destination, preferred source and metric."""
    shown = agent.host.namespace.run("ip", "-json", "-6", "route", "show", "dev", agent.interface, "proto", "112")
    return [(each["dst"], each["prefsrc"], each["metric"]) for each in json.loads(shown)]


async def meet(world: World, *agents: Agent, servers: list[str]) -> list[tuple[str, str]]:
    """What they report; afterwards each reaches the other."""
    for agent in agents:
        agent.start(servers)
    reports = [await agent.report() for agent in agents]
    one, other = agents
    await until(lambda: one.reaches(other))
    await until(lambda: other.reaches(one))
    return reports


def test_nodes_with_ipv6_addresses_meet_over_ipv6(run_world: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        one, other = world.agent(), world.agent()
        async with world.responder(*SERVERS_IPV6) as servers:
            reports = await meet(world, one, other, servers=servers)
        assert reports == [(f"[{agent.host.address_ipv6}]:{MESH_PORT}", "none") for agent in (one, other)]
        for near, far in ((one, other), (other, one)):
            assert near.mesh_ip().startswith("fd00:100::")
            assert addresses(near) == [f"{near.mesh_ip()}/128"]
            assert routes(near) == [(far.mesh_ip(), near.mesh_ip(), 2048)]
            assert f"[{far.host.address_ipv6}]:{MESH_PORT}" in near.host.namespace.run("wg", "show", near.interface)

    run_world(test, host=SERVERS_IPV6[0], mesh=MESH_IPV6)


def test_nodes_with_ipv6_addresses_meet_behind_nats_of_ipv4(run_world: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        one, other = world.agent(MASQUERADE), world.agent(MASQUERADE)
        async with world.responder() as servers:
            reports = await meet(world, one, other, servers=servers)
        assert reports == [(f"{agent.host.address}:{MESH_PORT}", "full_cone") for agent in (one, other)]
        assert routes(one) == [(other.mesh_ip(), one.mesh_ip(), 2048)]

    run_world(test, host=SERVERS[0], mesh=MESH_IPV6)


def test_nodes_with_ipv4_addresses_meet_over_ipv6(run_world: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        one, other = world.agent(), world.agent()
        for agent in (one, other):
            agent.host.namespace.run("ip", "-4", "address", "flush", "dev", "eth0")
        async with world.responder(*SERVERS_IPV6) as servers:
            await meet(world, one, other, servers=[f"{SERVERS[0]}:3478", *servers])
        assert addresses(one) == [f"{one.mesh_ip()}/32"]
        assert one.mesh_ip().startswith("10.100.")

    run_world(test, host=SERVERS_IPV6[0])
