"""STUN from the port that WireGuard in the kernel holds."""

from __future__ import annotations

import asyncio

import pytest

from plexd.lab.stun import StunServer
from plexd.linux.stun import StunClient
from plexd.mesh.address import Endpoint, parse_ip
from tests.kernel.mesh import Agent, mesh_of, numbered_peer, run

pytestmark = pytest.mark.usefixtures("namespace")


@pytest.mark.parametrize(("own", "server"), [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")])
def test_port_that_the_kernels_wireguard_holds_is_asked_from(own: str, server: str) -> None:
    agent = Agent(mesh_of([numbered_peer(1)]))
    agent.corrections()
    for address in (own, server):
        run("ip", "address", "add", address, "dev", "lo")

    async def ask() -> Endpoint:
        async with StunServer(server, 3478):
            return await StunClient(51820).ask(Endpoint(parse_ip(server), 3478), 5.0)

    seen = asyncio.run(ask())
    assert seen.port == 51820
    assert seen.packed in {parse_ip(own), parse_ip(server)}  # it is its own server here
    assert agent.converge() == []
