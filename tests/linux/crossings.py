"""Rules and packets drawn together, sent through a real kernel, and judged by the reference and by the interpreter."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import islice
from random import Random
from typing import Any

import pytest

from plexd.linux.nftables import Nftables
from plexd.mesh import firewall
from plexd.mesh.desired import Policy, PolicyRule
from plexd.mesh.firewall import TABLE, rule_comment
from plexd.mesh.policy import Action, resolve
from plexd.mesh.table_reading import hits
from plexd.mesh.visibility import Visibility
from tests.linux.wires import MESH, NODE, OUTSIDE, Wires, arrive
from tests.mesh.nft_interpreter import Table
from tests.mesh.packets import ICMP, ICMPV6, TCP, UDP, Packet
from tests.mesh.policies import LOCAL, LOCAL_IPV6, PEERS, world_of
from tests.mesh.policy_reference import Filter
from tests.mesh.rendering import render
from tests.namespaces import inside

# by family: what a side may be, alike in length so that rules come in shapes, and who sends and receives
SIDES = {
    4: (
        ("*",),
        ("0.0.0.0/0",),
        ("n_a", "n_b", "n_c", "n_d", "10.100.1.7", "172.16.7.9", "192.0.2.7"),
        ("10.100.1.0/30", "10.100.1.4/30", "172.16.7.8/30", "192.0.2.4/30"),
        ("10.100.1.0/24", "10.100.2.0/24", "172.16.7.0/24", "172.16.8.0/24", "192.0.2.0/24"),
        ("10.100.0.0/16", "172.16.0.0/16", "192.0.0.0/16"),
    ),
    6: (
        ("*",),
        ("::/0",),
        ("n_a", "n_e", "n_g", "fd00:200::1", "2001:db8:7::7"),
        ("fd00:100::/64", "fd00:200::/64", "2001:db8:7::/64"),
        ("fd00:100::/125", "fd00:100::8/125", "fd00:200::/125", "2001:db8:7::/125"),
    ),
}
ENDS = {
    4: (
        "10.100.1.1", "10.100.1.1", "10.100.1.1", "10.100.1.2", "10.100.1.3", "10.100.1.7", "10.100.2.4", "172.16.7.9",
        "172.16.8.1", "192.0.2.7", "198.51.100.1",
    ),
    6: (
        "fd00:100::1", "fd00:100::1", "fd00:100::1", "fd00:100::5", "fd00:100::6", "fd00:200::1", "2001:db8::1",
        "2001:db8:7::7",
    ),
}  # fmt: skip
PORTS = (22, 80, 443)


def draw_rules(random: Random, family: int) -> Iterator[PolicyRule]:
    """Some rules of each of a few shapes, in any order."""
    shapes = [(random.choice(SIDES[family]), random.choice(SIDES[family]), *draw_protocol(random)) for _ in range(4)]
    for _ in range(30):
        sources, destinations, protocols, ports = random.choice(shapes)
        protocol, port = random.choice(protocols), random.choice(ports)
        action = random.choice(("allow", "allow", "deny"))
        yield PolicyRule(random.choice(sources), random.choice(destinations), port, protocol, action)


def draw_protocol(random: Random) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return random.choice(((("",), (0,)), (("",), PORTS), (("tcp", "udp", "icmp"), (0,)), (("tcp", "udp"), PORTS)))


def draw_packets(random: Random) -> Iterator[Packet]:
    """First packets of connections that have a way through the node of the wires."""
    while True:
        family = random.choice((4, 6))
        src, dst = (ip_address(random.choice(ENDS[family])) for _ in range(2))
        way = arrive(random.choice((MESH, MESH, NODE, NODE, OUTSIDE)), src, dst)
        l4proto = random.choice((TCP, TCP, UDP, ICMP if family == 4 else ICMPV6))
        if way is None:
            continue
        if l4proto in {TCP, UDP}:
            yield Packet(*way, src, dst, l4proto, random.choice((*PORTS, 8080)))
        elif random.random() < 0.8:
            yield Packet(*way, src, dst, l4proto, 0, icmp_type="echo-request")
        else:  # an answer that nobody asked for
            yield Packet(*way, src, dst, l4proto, 0, state="invalid", icmp_type="echo-reply")


def cross(wires: Wires, seed: int) -> None:
    """150 packets against 30 rules or so: those that should pass do, and every rule counts what it decided."""
    random = Random(seed)
    local = random.choice((LOCAL, LOCAL, LOCAL_IPV6))
    policies = (Policy("pol", tuple(draw_rules(random, 4 if local is LOCAL else 6))),)
    default = random.choice(("allow", "deny", "deny"))
    traffic = dict(enumerate(islice(draw_packets(random), 150), start=1))
    resolved = resolve(policies, local, PEERS)
    visible = Visibility(resolved.rules, local, Action(default)).among({p.id: p.allowed_ips for p in PEERS.values()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firewall, "FEW", random.choice((1, 3)))
        document = render(
            firewall.Settings(local.mesh_ip, (MESH,), Action(default)),
            resolved.rules,
            visible=(PEERS[each].mesh_ip for each in visible),
        )

    async def judge() -> tuple[set[int], dict[str, Any]]:
        door = Nftables(TABLE)
        try:
            await door.apply(document)
            for number, packet in traffic.items():
                wires.send(packet, number)
            wires.wait_until_taken()
            table = await door.read_table()
            assert table is not None
            return wires.passed(), table
        finally:
            await door.close()

    with inside(wires.node):
        passed, table = asyncio.run(judge())
    world, reference = world_of(policies, local, default), Filter((MESH,))
    expected = {number for number, packet in traffic.items() if reference.decide(world, packet) == "accept"}
    assert {n: traffic[n] for n in passed ^ expected} == {}
    counted = hits(table, resolved.rules)
    interpreted = Table(document)
    reached = Counter(
        comment for packet in traffic.values() if interpreted.judge(packet) for comment in interpreted.reached
    )
    assert {rule_comment(*rule): count.packets for rule, count in counted.items() if count.packets} == reached
