"""The MTU that the ways to the peers leave: what is remembered of them, and what a real kernel makes of routes."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from plexd.linux import network
from plexd.linux.links import LinkState
from plexd.linux.network import Network
from plexd.linux.routes import Way
from plexd.linux.underlay import WAYS_KEPT_SECONDS, Underlay, narrowest
from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import PutPeer
from plexd.mesh.keys import NO_PRESHARED_KEY, PublicKey
from tests.mesh_kernel import MeshKernel

A, B, C6 = map(parse_ip, ("192.0.2.1", "198.51.100.1", "2001:db8::1"))
WIDE, NARROW = Way(0, (2,)), Way(1300, (3,))
NOW = 10_000.0


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# what is remembered


def knowing(**ways: Way | None) -> Underlay:
    underlay = Underlay()
    answers = {{"a": A, "b": B, "c6": C6}[name]: way for name, way in ways.items()}
    underlay.follow(answers.keys(), NOW)
    underlay.learn(answers, underlay.epoch)
    return underlay


def test_way_is_asked_for_once() -> None:
    underlay = Underlay()
    assert set(underlay.follow({A, B}, NOW)) == {A, B}
    underlay.learn({A: WIDE, B: None}, underlay.epoch)
    assert underlay.follow({A, B, C6}, NOW + 1) == [C6]
    assert underlay.ways == {WIDE}


def test_address_that_is_gone_counts_no_more() -> None:
    underlay = knowing(a=WIDE, b=NARROW)
    assert underlay.follow({A}, NOW + 1) == []
    assert underlay.ways == {WIDE}
    assert underlay.follow({A, B}, NOW + 2) == [B]


def test_what_was_asked_before_a_change_is_no_answer_after_it() -> None:
    underlay = Underlay()
    underlay.follow({A}, NOW)
    epoch = underlay.epoch
    assert underlay.leads_to_any(Prefix.parse("192.0.2.0/24"))  # a change is told while the answer is under way
    underlay.forget()
    underlay.learn({A: WIDE}, epoch)
    assert underlay.ways == frozenset()
    assert underlay.follow({A}, NOW + 1) == [A]


def test_ways_are_asked_for_anew_after_ten_minutes() -> None:
    underlay = knowing(a=WIDE)
    assert underlay.follow({A}, NOW + WAYS_KEPT_SECONDS - 1) == []
    assert underlay.follow({A}, NOW + WAYS_KEPT_SECONDS + 1) == [A]


@pytest.mark.parametrize(
    ("prefix", "leads"),
    [
        ("0.0.0.0/0", True),
        ("::/0", True),
        ("192.0.2.0/24", True),
        ("192.0.2.1", True),
        ("192.0.2.0", False),
        ("192.0.2.2", False),
        ("198.51.100.0/23", True),
        ("203.0.113.0/24", False),
        ("2001:db8::/32", True),
        ("2001:db9::/32", False),
    ],
)
def test_route_leads_to_the_addresses_inside_its_prefix(prefix: str, leads: bool) -> None:
    assert knowing(a=WIDE, b=None, c6=WIDE).leads_to_any(Prefix.parse(prefix)) == leads


def test_narrowest_way_is_by_its_route_or_else_its_links() -> None:
    links = {2: LinkState(1500, 1), 3: LinkState(1200, 1), 4: LinkState(9000, 1)}
    assert narrowest([WIDE, Way(0, (4,))], links) == 1500
    assert narrowest([WIDE, NARROW], links) == 1300
    assert narrowest([Way(0, (4, 3, 2))], links) == 1200
    assert narrowest([Way(0, (9,)), WIDE], links) == 1500  # a link that is gone
    assert narrowest([Way(0, (9,))], links) is None
    assert narrowest([], links) is None


# what the kernel says


@pytest.fixture
def links(namespace: str, interface: str) -> str:
    """`{i}a` (MTU 1450) has the addresses 192.0.2.1/24 and 2001:db8::1/64, `{i}b` 1450, `{i}c` 1440, `{i}d` 9000."""
    i = interface
    run("ip", "link", "add", f"{i}a", "mtu", "1450", "type", "veth", "peer", "name", f"{i}b")
    run("ip", "link", "set", f"{i}b", "mtu", "1450", "up")
    for name, mtu in (("c", "1440"), ("d", "9000")):
        run("ip", "link", "add", f"{i}{name}", "mtu", mtu, "type", "bridge")
        run("ip", "link", "set", f"{i}{name}", "up")
    run("ip", "address", "add", "192.0.2.1/24", "dev", f"{i}a")
    run("ip", "address", "add", "2001:db8::1/64", "dev", f"{i}a", "nodad")
    run("ip", "link", "set", f"{i}a", "up")
    return interface


def ip(links: str, command: str) -> None:
    run("ip", *command.format(i=links).split())


DEFAULT = "route add default via 192.0.2.254"
FAR, FAR6, NEAR = "198.51.100.1", "2001:db8:1::1", "192.0.2.7"


@pytest.mark.parametrize(
    ("commands", "endpoints", "mtu"),
    [
        # no endpoint: the default route
        ([], [], None),
        ([DEFAULT], [], 1450),
        ([f"{DEFAULT} mtu 1390"], [], 1390),
        ([f"{DEFAULT} metric 50 mtu 1300", "route add default dev {i}b metric 10"], [], 1450),
        ([DEFAULT, "-6 route add default via 2001:db8::fe mtu 1380"], [], 1380),
        (["route add default nexthop dev {i}a nexthop dev {i}c"], [], 1440),
        # the ways to the endpoints, and only they
        ([DEFAULT, "-6 route add default via 2001:db8::fe mtu 1380"], [FAR], 1450),
        ([DEFAULT, "-6 route add default via 2001:db8::fe mtu 1380"], [FAR, FAR6], 1380),
        ([f"{DEFAULT} mtu 1300"], [NEAR], 1450),
        ([f"{DEFAULT} mtu 1300"], [NEAR, FAR], 1300),
        ([DEFAULT, "route add 198.51.100.0/24 dev {i}c"], [FAR], 1440),
        ([DEFAULT, "route add 198.51.100.0/24 dev {i}c"], [NEAR, FAR], 1440),
        ([DEFAULT, "route add 198.51.100.0/24 dev {i}d"], [FAR], 9000),
        ([DEFAULT, "-6 route add 2001:db8:1::/48 dev {i}c mtu 1290"], [FAR6], 1290),
        (["route add 198.51.100.0/24 nexthop dev {i}d nexthop dev {i}c"], [FAR], 1440),
        # rules and tables
        ([DEFAULT, "route add default dev {i}c table 77", "rule add not fwmark 7 lookup 77"], [FAR], 1440),
        ([DEFAULT, "route add default dev {i}c table 77"], [FAR], 1450),
        ([DEFAULT, "-6 route add default dev {i}c table 77", "-6 rule add lookup 77"], [FAR6], 1440),
        # no way: the default route
        ([], [FAR], None),
        (["route add unreachable 198.51.100.0/24", DEFAULT], [FAR], 1450),
        (["route add blackhole 198.51.100.0/24", f"{DEFAULT} mtu 1400"], [FAR, NEAR], 1450),
        # this host itself
        ([DEFAULT], ["192.0.2.1"], 1450),
    ],
)
async def test_underlay_mtu_is_that_of_the_narrowest_way_to_a_peer(
    links: str, commands: list[str], endpoints: list[str], mtu: int | None
) -> None:
    for command in commands:
        ip(links, command)
    wanted = frozenset(map(parse_ip, endpoints))
    door = Network()
    assert (await door.observe(links, wanted)).underlay_mtu == mtu
    assert (await door.observe(links, wanted)).underlay_mtu == mtu  # by what it remembers
    assert (await door.observe(links)).underlay_mtu is None


async def test_way_through_the_mesh_itself_is_none(links: str) -> None:
    ip(links, DEFAULT)
    ip(links, "tuntap add {i} mode tun")
    ip(links, "link set {i} mtu 1300 up")
    ip(links, "route add 198.51.100.0/24 dev {i}")
    assert (await Network().observe(links, frozenset({parse_ip(FAR)}))).underlay_mtu == 1450


async def test_mtu_of_a_link_is_read_at_every_look(links: str) -> None:
    ip(links, DEFAULT)
    door, wanted = Network(), frozenset({parse_ip(FAR)})
    assert (await door.observe(links, wanted)).underlay_mtu == 1450
    ip(links, "link set {i}a mtu 1400")
    assert (await door.observe(links, wanted)).underlay_mtu == 1400


def put(number: int, endpoint: str) -> PutPeer:
    key = PublicKey(bytes([number] * 32))
    at = Endpoint(parse_ip(endpoint), 51820)
    return PutPeer(f"n_{number}", key, True, NO_PRESHARED_KEY, at, 25, (), ("added",))


async def test_peer_at_the_end_of_a_narrower_way_makes_a_look_due(links: str) -> None:
    ip(links, DEFAULT)
    ip(links, "route add 198.51.100.0/25 dev {i}c")
    ip(links, "route add 198.51.100.128/25 dev {i}d")
    door = MeshKernel(links, "userspace", "wireguard-go")
    await door.apply([put(1, FAR)])
    assert not door.noticed.is_set()  # nobody asked for the MTU
    await door.observe(frozenset({parse_ip(NEAR)}), device=False)
    for endpoint, is_due in (("203.0.113.1", False), ("198.51.100.200", False), (FAR, True), (FAR, False)):
        door.noticed.clear()
        await door.apply([put(1, endpoint)])
        assert door.noticed.is_set() == is_due, endpoint
        if is_due:
            wanted = frozenset(map(parse_ip, (NEAR, FAR)))
            assert (await door.observe(wanted, device=False)).underlay_mtu == 1440
    await door.close()


def test_peer_that_roamed_to_a_narrower_way_counts(links: str) -> None:
    """Where it is, only a dump of the device tells; the look after it knows."""
    ip(links, DEFAULT)
    ip(links, "route add 198.51.100.0/24 dev {i}c")
    process = subprocess.Popen(["wireguard-go", "-f", links], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        async def scenario() -> None:
            door = MeshKernel(links, "userspace", "wireguard-go")
            async with asyncio.timeout(10):
                while (await door.observe()).device is None:  # noqa: ASYNC110 - the program sets no asyncio.Event
                    await asyncio.sleep(0.02)
            run("wg", "set", links, "peer", str(PublicKey(bytes([1] * 32))), "endpoint", f"{FAR}:1")
            wanted = frozenset({parse_ip(NEAR)})
            assert (await door.observe(wanted)).underlay_mtu == 1450
            assert (await door.observe(wanted, device=False)).underlay_mtu == 1440
            run("wg", "set", links, "peer", str(PublicKey(bytes([1] * 32))), "endpoint", f"{NEAR}:1")
            await door.observe(wanted)
            assert (await door.observe(wanted, device=False)).underlay_mtu == 1450
            await door.close()

        asyncio.run(scenario())
    finally:
        process.terminate()
        process.wait()


# IPv6


@pytest.mark.parametrize(
    ("switches", "ipv6"),
    [
        ({}, True),
        ({"default": 1}, False),
        ({"all": 1}, False),
        ({"all": 1, "default": 0}, True),
        ({"{i}a": 1}, True),  # that of another link
    ],
)
def test_link_to_be_made_has_ipv6_unless_it_is_switched_off(links: str, switches: dict[str, int], ipv6: bool) -> None:
    for name, value in switches.items():
        switch = Path(f"/proc/sys/net/ipv6/conf/{name.format(i=links)}/disable_ipv6")
        if not os.access(switch, os.W_OK):
            pytest.skip("/proc/sys is read-only here (a container)")
        switch.write_text(str(value))
    assert asyncio.run(Network().observe(links)).ipv6 == ipv6


def test_link_has_a_switch_of_its_own(links: str) -> None:
    switch = Path(f"/proc/sys/net/ipv6/conf/{links}a/disable_ipv6")
    if not os.access(switch, os.W_OK):
        pytest.skip("/proc/sys is read-only here (a container)")
    assert asyncio.run(Network().observe(f"{links}a")).ipv6
    switch.write_text("1")
    assert not asyncio.run(Network().observe(f"{links}a")).ipv6


def test_link_with_an_mtu_too_small_for_ipv6_is_no_host_without_it(links: str) -> None:
    ip(links, "link set {i}a mtu 1200")
    assert not Path(f"/proc/sys/net/ipv6/conf/{links}a").exists()
    assert asyncio.run(Network().observe(f"{links}a")).ipv6


def test_kernel_without_ipv6_has_no_switches(links: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "IPV6_SWITCHES", "/proc/sys/net/nothing/{}/disable_ipv6")
    assert not asyncio.run(Network().observe(links)).ipv6
