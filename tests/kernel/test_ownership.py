"""What is ours is adopted with its sessions, what is not stays untouched, and what we leave leaves nothing."""

from __future__ import annotations

import socket
import time

import pytest

from plexd.errors import ForeignLink, PortInUse
from plexd.mesh.address import Endpoint, parse_ip
from plexd.mesh.changes import SetAlias
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey
from tests.kernel.mesh import (
    INTERFACE,
    PRIVATE_KEY,
    Agent,
    assert_in_kernel,
    ip_json,
    mesh_of,
    numbered_peer,
    run,
    wg_dump,
)

pytestmark = pytest.mark.usefixtures("namespace")


def handshakes() -> dict[str, int]:
    lines = run("wg", "show", INTERFACE, "latest-handshakes").splitlines()
    return {key: int(seconds) for key, seconds in (line.split("\t") for line in lines)}


def test_adopted_interface_keeps_its_sessions(namespace: str) -> None:
    """A second agent, and even the alias lost meanwhile, costs no handshake."""
    other, other_key = f"{namespace}-peer", PrivateKey.generate()
    run("ip", "netns", "add", other)
    try:
        run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", other)
        run("ip", "address", "add", "192.0.2.1/24", "dev", "up0")
        run("ip", "link", "set", "up0", "up")
        there = ("ip", "netns", "exec", other)
        run(*there, "ip", "address", "add", "192.0.2.2/24", "dev", "up0")
        run(*there, "ip", "link", "set", "up0", "up")
        run(*there, "ip", "link", "add", "wg0", "type", "wireguard")
        run(*there, "wg", "set", "wg0", "private-key", "/dev/stdin", "listen-port", "51820",
            "peer", str(PRIVATE_KEY.public()), "allowed-ips", "10.100.255.1/32",
            stdin=other_key.reveal())  # fmt: skip
        run(*there, "ip", "address", "add", "10.100.0.0/32", "dev", "wg0")
        run(*there, "ip", "link", "set", "wg0", "up")
        run(*there, "ip", "route", "add", "10.100.255.1", "dev", "wg0")

        peer = numbered_peer(0)._replace(
            public_key=other_key.public(), psk=NO_PRESHARED_KEY, endpoint=Endpoint(parse_ip("192.0.2.2"), 51820)
        )
        Agent(mesh_of([peer])).corrections()
        run("ping", "-c", "1", "-W", "10", "10.100.0.0")
        before = handshakes()
        assert before[str(peer.public_key)] > 0

        assert Agent(mesh_of([peer])).converge() == []
        run("ip", "link", "set", INTERFACE, "alias", "")
        outcomes = Agent(mesh_of([peer, numbered_peer(3)])).converge()
        assert SetAlias() in [outcome.change for outcome in outcomes]
        run("ping", "-c", "1", "-W", "10", "10.100.0.0")
        assert handshakes() == before | {str(numbered_peer(3).public_key): 0}
    finally:
        run("ip", "netns", "delete", other)


@pytest.mark.parametrize("kind", ["dummy", "wireguard"])
def test_link_of_somebody_else_is_refused_and_left_as_it_is(kind: str) -> None:
    run("ip", "link", "add", INTERFACE, "type", kind)
    if kind == "wireguard":
        run("wg", "set", INTERFACE, "private-key", "/dev/stdin", stdin=run("wg", "genkey"))
    before = ip_json("-details", "link", "show", INTERFACE)
    agent = Agent(mesh_of([numbered_peer(1)]))
    with pytest.raises(ForeignLink, match="ip link delete plexd0"):
        agent.converge()
    assert agent.tear_down() == []
    assert ip_json("-details", "link", "show", INTERFACE) == before
    assert agent.kernel.netlink_writes == 0


def test_busy_port_is_told_as_such_and_leaves_nothing_half_built() -> None:
    agent = Agent(mesh_of([numbered_peer(1)], listen_port=40001))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("0.0.0.0", 40001))
        outcomes = agent.converge()
        assert {type(outcome.cause) for outcome in outcomes} == {PortInUse}
        assert outcomes[0].error == "UDP port 40001 is in use by another program: stop it or set mesh.listen_port"
        assert INTERFACE not in [link["ifname"] for link in ip_json("link", "show")]
    agent.corrections()
    assert_in_kernel(agent.target)


def test_port_taken_under_a_living_interface_fails_that_change_alone() -> None:
    agent = Agent(mesh_of([numbered_peer(1)], listen_port=40002))
    agent.corrections()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("0.0.0.0", 40003))
        agent.target = mesh_of([numbered_peer(1), numbered_peer(2)], listen_port=40003)
        failed = [outcome for outcome in agent.converge() if outcome.error]
    assert [type(outcome.cause) for outcome in failed] == [PortInUse]
    assert str(numbered_peer(2).public_key) in wg_dump()
    agent.corrections()
    assert_in_kernel(agent.target)


def test_tear_down_of_a_thousand_peers_is_quick_and_leaves_nothing() -> None:
    agent = Agent(mesh_of([numbered_peer(number) for number in range(1000)]))
    agent.corrections()
    begun = time.monotonic()
    assert agent.tear_down() == [INTERFACE]
    took = time.monotonic() - begun
    assert INTERFACE not in [link["ifname"] for link in ip_json("link", "show")]
    assert ip_json("route", "show", "table", "all", "proto", "112") == []
    assert ip_json("-6", "route", "show", "table", "all", "proto", "112") == []
    assert agent.tear_down() == []
    assert took < 8  # with the peers still on it the kernel takes 17 s to delete the link
