"""Echo requests through a real interface: peers that answer, peers that do not, both families, many at once."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from plexd.linux.icmp import checksum, probe, seconds_for
from plexd.mesh.address import parse_ip

pytestmark = [pytest.mark.namespaces, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]
_numbers = itertools.count(1)


@pytest.fixture
def pair() -> Iterator[str]:
    """A namespace whose veth end has 10.9.0.1 and fd09::1; the other end, elsewhere, .2 to .5 and ::2."""
    name = f"plxi-{os.getpid()}-{next(_numbers)}"
    far = f"{name}-far"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    ip("netns", "add", far)
    try:
        ip("-n", name, "link", "add", "mesh0", "type", "veth", "peer", "name", "far0", "netns", far)
        ip("-n", name, "address", "add", "10.9.0.1/16", "dev", "mesh0")
        ip("-n", name, "address", "add", "fd09::1/64", "dev", "mesh0", "nodad")
        for number in range(2, 6):
            ip("-n", far, "address", "add", f"10.9.0.{number}/16", "dev", "far0")
        ip("-n", far, "address", "add", "fd09::2/64", "dev", "far0", "nodad")
        ip("-n", name, "link", "set", "mesh0", "up")
        ip("-n", far, "link", "set", "far0", "up")
        yield name
    finally:
        for namespace in (name, far):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


def probe_inside(namespace: str, own: list[str], peers: list[str], probes: int, group_range: str = "1 0") -> list[str]:
    """A line for each peer, and one with the seconds it took. `group_range`: who may open datagram ICMP sockets."""
    program = (
        "import asyncio, sys, time; from plexd.linux.icmp import probe; from plexd.mesh.address import parse_ip\n"
        "own, peers, probes = eval(sys.argv[1])\n"
        "started = time.monotonic()\n"
        "found = asyncio.run(probe('mesh0', [parse_ip(a) for a in own], {a: parse_ip(a) for a in peers}, probes))\n"
        "for peer, echoes in found.items(): print(peer, echoes.sent, len(echoes.rtts), max(echoes.rtts, default=-1))\n"
        "print(time.monotonic() - started)\n"
    )
    inside = ["ip", "netns", "exec", namespace]
    subprocess.run([*inside, "sysctl", "-qw", f"net.ipv4.ping_group_range={group_range}"], check=True)
    done = subprocess.run(
        [*inside, sys.executable, "-c", program, repr((own, peers, probes))], check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("group_range", ["1 0", "0 0"], ids=["raw", "datagram"])
def test_peers_that_answer_have_a_round_trip_time(pair: str, group_range: str) -> None:
    *lines, _ = probe_inside(
        pair, ["10.9.0.1", "fd09::1"], ["10.9.0.2", "10.9.0.5", "fd09::2", "10.9.0.77"], 3, group_range
    )
    found = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in lines}
    for peer in ("10.9.0.2", "10.9.0.5", "fd09::2"):
        sent, received, slowest = found[peer]
        assert (sent, received) == (3, 3), peer
        assert 0 < slowest < 2_000_000_000
    assert found["10.9.0.77"] == (3, 0, -1)


def test_unreachable_peers_are_probed_side_by_side(pair: str) -> None:
    *lines, seconds = probe_inside(pair, ["10.9.0.1"], [f"10.9.1.{n}" for n in range(1, 201)], 3)
    assert len(lines) == 200
    assert float(seconds) < seconds_for(200, 3) + 5


def test_peer_without_an_address_of_our_family_is_left_out(pair: str) -> None:
    *lines, _ = probe_inside(pair, ["10.9.0.1"], ["fd09::2", "10.9.0.2"], 1)
    assert [line.split()[0] for line in lines] == ["10.9.0.2"]


def test_missing_interface_is_an_error() -> None:
    with pytest.raises(OSError, match="No such device"):
        asyncio.run(probe("nowhere0", [parse_ip("10.9.0.1")], {"p": parse_ip("10.9.0.2")}, 1))


def test_checksum_is_that_of_the_internet() -> None:
    packet = bytes.fromhex("0800000012340001") + b"abcdefgh"
    whole = packet[:2] + checksum(packet).to_bytes(2, "big") + packet[4:]
    assert checksum(whole) == 0


def test_more_peers_take_more_rounds() -> None:
    assert seconds_for(64, 3) == pytest.approx(2.4)
    assert seconds_for(65, 3) == pytest.approx(4.8)
