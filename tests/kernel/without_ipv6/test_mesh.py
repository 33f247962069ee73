"""A kernel that was booted without IPv6: no sockets, no addresses, no routes of it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from plexd.errors import StunError
from plexd.linux.stun import StunClient
from plexd.mesh.address import Endpoint, parse_ip
from plexd.node.health import Condition
from tests.namespaces import inside
from tests.tunnel.harness import Living, Member, Network, cable, live, until
from tests.tunnel.underlays import endpoint

pytestmark = pytest.mark.timeout(400)


def test_there_is_none() -> None:
    with pytest.raises(OSError, match="not supported"):
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)


def test_mesh_of_ipv4_works_and_prefixes_of_ipv6_are_left_out(network: Network) -> None:
    one, other = network.namespace(), network.namespace()
    cable(one, other, "net", (2, 1), ipv6=False)
    left = Member(one, "plexdta", "10.100.0.1", endpoint(4, 2, 1))
    right = Member(other, "plexdtb", "10.100.0.2", endpoint(4, 2, 2), "fd00:200::/64")
    nowhere = Member(other, "plexdtc", "10.100.0.3", endpoint(6, 2, 2))

    async def script(living: Living) -> None:
        await until(lambda: left.reaches(right))
        assert left.mtu == 1420
        assert "10.100.0.2" in left.namespace.run("nft", "list", "table", "inet", "plexd")
        for _ in range(3):
            result = await living.converger.converge()
            assert (result.changed, result.failed) == (0, 0)
        assert living.health.findings() == ()
        left.namespace.run("ip", "link", "delete", left.interface)
        await until(lambda: left.reaches(right))
        living.add(nowhere)  # an endpoint that cannot be sent to
        assert await living.converger.apply_event()
        assert (await living.converger.converge()).failed == 0
        assert living.health.findings() == ()

    live(left, right, script)


async def test_mesh_address_of_ipv6_is_said_to_be_impossible(network: Network) -> None:
    left = Member(network.namespace(), "plexdta", "fd00:100::1", endpoint(4, 2, 1))
    with inside(left.namespace.name):
        living = Living(left)
        assert (await living.converger.converge()).failed == 1
        await living.door.close()
        details = {finding.condition: finding.detail for finding in living.health.findings()}
        assert details[Condition.MESH_DOWN].startswith("the mesh address fd00:100::1 needs IPv6")


def test_stun_server_of_ipv6_is_one_that_does_not_answer() -> None:
    with pytest.raises(StunError, match="not supported"):
        asyncio.run(StunClient(51820).ask(Endpoint(parse_ip("2001:db8::1"), 3478), 1.0))
