"""Real agents behind real NATs ask real STUN servers; judged by what reaches the control plane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.namespaces import inside
from tests.nat.conftest import World
from tests.nat.internet import MASQUERADE, MESH_PORT, SERVERS, SERVERS_IPV6, SYMMETRIC, Suspension, to_port, until

pytestmark = [pytest.mark.namespaces]

RunWorld = Callable[..., None]


@pytest.mark.parametrize("servers", ["coturn", "responder"])
@pytest.mark.parametrize(
    ("nats", "port", "nat_type"),
    [
        pytest.param([], MESH_PORT, "none", id="no NAT"),
        pytest.param([to_port(40000)], 40000, "full_cone", id="full cone"),
        pytest.param([MASQUERADE], MESH_PORT, "full_cone", id="port-preserving"),
        pytest.param([SYMMETRIC], None, "symmetric", id="symmetric"),
        pytest.param([MASQUERADE, to_port(41000)], 41000, "full_cone", id="double"),
        pytest.param([to_port(42000), MASQUERADE], 42000, "full_cone", id="double, the provider's changing the port"),
        pytest.param([MASQUERADE, SYMMETRIC], None, "symmetric", id="double, symmetric inside"),
    ],
)
def test_endpoint_and_type_are_reported(
    run_world: RunWorld, servers: str, nats: list[str], port: int | None, nat_type: str
) -> None:
    async def test(world: World) -> None:
        agent = world.agent(*nats)
        async with world.servers(servers) as addresses:
            agent.start(addresses)
            endpoint = await agent.report()
            mapped = port or agent.host.mapped_port(SERVERS[0])  # the first answer gives the endpoint
        assert endpoint == (f"{agent.host.address}:{mapped}", nat_type)

    run_world(test)


def test_one_server_tells_no_type(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent(MASQUERADE)
        async with world.responder(SERVERS[0]) as first, world.responder(SERVERS[0], port=3479) as second:
            agent.start([*first, *second])  # two servers, but one IP address
            assert await agent.report() == (f"{agent.host.address}:{MESH_PORT}", "unknown")

    run_world(test)


def test_ipv6_is_asked_when_no_server_answers_over_ipv4(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent()
        async with world.responder(*SERVERS_IPV6) as servers:
            agent.start([f"{SERVERS[0]}:3478", *servers])
            assert await agent.report() == (f"[{agent.host.address_ipv6}]:{MESH_PORT}", "none")

    run_world(test)


def test_new_address_and_port_of_the_nat_are_found_when_the_stream_is_back(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent(to_port(40000))
        agent.host.forget_quickly()
        agent.host.gateways[0].run("ip", "address", "add", "203.0.113.200/24", "dev", "wan")
        async with world.coturn() as servers:
            agent.start(servers)
            assert await agent.report() == (f"{agent.host.address}:40000", "full_cone")
            await until(lambda: world.plane.admin.streams(agent.name) == 1)
            agent.host.translate_anew('meta l4proto udp snat to 203.0.113.200:45000; oifname "wan" masquerade')
            await until(agent.host.has_forgotten)
            await world.plane.stop()
            with inside(world.internet.public.name):
                await world.plane.start()
            assert await agent.report(2) == ("203.0.113.200:45000", "full_cone")
            (first, second) = agent.logged("endpoint found")
            assert (first["endpoint"], second["endpoint"]) == (f"{agent.host.address}:40000", "203.0.113.200:45000")

    run_world(test)


def test_new_mapping_is_found_at_the_next_refresh(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent(to_port(40000))
        agent.host.forget_quickly()
        async with world.responder() as servers:
            agent.start(servers, refresh="10s")
            assert await agent.report() == (f"{agent.host.address}:40000", "full_cone")
            agent.host.translate_anew(SYMMETRIC)
            address, nat_type = await agent.report(2)
            assert nat_type == "symmetric"
            assert address == f"{agent.host.address}:{agent.host.mapped_port(SERVERS[0])}"
            assert (await agent.heartbeat(4))["nat"] == {"public_endpoint": address, "type": "symmetric"}

    run_world(test)


def test_servers_that_come_back_are_found_without_a_restart(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent(MASQUERADE)
        agent.start([f"{address}:3478" for address in SERVERS])
        await until(lambda: len(agent.logged("endpoint not discovered")) == 1)
        assert "nat" not in await agent.heartbeat(1)
        assert not world.plane.admin.arrived("endpoint")
        async with world.responder():
            endpoint, nat_type = await agent.report()
        assert (endpoint, nat_type) == (f"{agent.host.address}:{MESH_PORT}", "full_cone")
        assert (await agent.heartbeat(3))["nat"] == {"public_endpoint": endpoint, "type": nat_type}
        assert len(agent.logged("endpoint not discovered")) == 1

    run_world(test)


def test_without_raw_sockets_nothing_is_reported_and_one_error_says_why(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent(MASQUERADE)
        async with world.responder() as servers:
            agent.start(servers, "setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")
            beats = [await agent.heartbeat(number) for number in range(1, 5)]  # long enough for a second try
        assert all("nat" not in beat and beat["mesh"]["listen_port"] == MESH_PORT for beat in beats[1:])
        (error,) = agent.logged("endpoint cannot be discovered")
        assert error["level"] == "error"
        assert "CAP_NET_RAW" in error["error"]
        assert not world.plane.admin.arrived("endpoint")

    run_world(test)


def test_recreated_interface_is_reason_to_look_at_once(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent(MASQUERADE)
        async with world.responder() as servers:
            agent.start(servers)
            await agent.report()
            agent.host.namespace.run("ip", "link", "delete", agent.interface)
            assert await agent.report(2) == (f"{agent.host.address}:{MESH_PORT}", "full_cone")

    run_world(test)


def test_host_that_changes_its_address_looks_at_once(run_world: RunWorld) -> None:
    async def test(world: World) -> None:
        agent = world.agent()
        host = agent.host.namespace
        async with world.responder() as servers:
            agent.start(servers)
            assert await agent.report() == (f"{agent.host.address}:{MESH_PORT}", "none")
            await until(lambda: world.plane.admin.streams(agent.name) == 1)
            host.run("ip", "address", "delete", f"{agent.host.address}/24", "dev", "eth0")
            host.run("ip", "address", "add", "203.0.113.222/24", "dev", "eth0")
            host.run("ip", "route", "add", "default", "via", SERVERS[0])
            assert await agent.report(2) == (f"203.0.113.222:{MESH_PORT}", "none")
            assert len(agent.logged("host addresses changed")) == 1
            # nothing ends the old one, which would be silent for another minute and a half
            await world.plane.admin.wait_for("events", agent.name, count=2)

    run_world(test)


def test_resumed_host_waits_for_nothing_on_the_connections_from_before(run_world: RunWorld, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        agent, admin = world.agent(), world.plane.admin
        suspension = Suspension(agent.host, tmp_path)
        async with world.responder() as servers:
            agent.start(servers, *suspension.wrapper, reconcile="1m")
            await agent.report()
            await agent.heartbeat(3)  # all that a start does is done
            assert admin.streams(agent.name) == 1
            before = admin.arrivals.count
            suspension.end(3600)
            for endpoint in ("events", "state", "heartbeat", "endpoint"):
                await admin.wait_for(endpoint, agent.name, after=before, timeout=20)
        assert len(agent.logged("time passed unseen")) == 1

    run_world(test)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param([MASQUERADE], [MASQUERADE], id="cone and cone"),
        pytest.param([to_port(40000)], [MASQUERADE, to_port(41000)], id="cone and double cone"),
        pytest.param([], [SYMMETRIC], id="open and symmetric"),
    ],
)
def test_nodes_behind_nats_reach_each_other(run_world: RunWorld, one: list[str], other: list[str]) -> None:
    async def test(world: World) -> None:
        agents = world.agent(*one), world.agent(*other)
        async with world.coturn() as servers:
            for agent in agents:
                agent.start(servers)
            for agent in agents:
                await agent.report()
            await until(lambda: agents[1].reaches(agents[0]))
            await until(lambda: agents[0].reaches(agents[1]))

    run_world(test)
