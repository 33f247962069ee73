"""The filter in a real kernel: what passes, what is counted, and that nothing from outside can change its text."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from ipaddress import ip_address
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plexd.linux.nftables import Nftables
from plexd.mesh import firewall
from plexd.mesh.desired import Policy, PolicyRule
from plexd.mesh.firewall import Json, Opening, Openings, hits, render, rule_comment
from plexd.mesh.policy import Action, Protocol, resolve
from plexd.mesh.visibility import visible_peers
from tests.linux.wires import MESH, NODE, OUTSIDE, Wires, arrive, run
from tests.mesh.nft_interpreter import Table
from tests.mesh.packets import ICMP, ICMPV6, TCP, UDP, Packet
from tests.mesh.policies import LOCAL, LOCAL_IPV6, PEERS, world_of
from tests.mesh.policy_reference import Filter

pytestmark = pytest.mark.namespaces

Inside = Callable[[str], AbstractContextManager[None]]

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


@pytest.fixture
def wires(make_namespace: Callable[[], str], inside: Inside) -> Iterator[Wires]:
    wires = Wires(make_namespace, inside)
    yield wires
    wires.close()


@pytest.mark.parametrize("seed", range(20))
def test_kernel_decides_and_counts_as_the_reference_does(
    wires: Wires, inside: Inside, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    local = random.choice((LOCAL, LOCAL, LOCAL_IPV6))
    policies = (Policy("pol", tuple(draw_rules(random, 4 if local is LOCAL else 6))),)
    default = random.choice(("allow", "deny", "deny"))
    traffic = dict(enumerate(islice(draw_packets(random), 150), start=1))
    resolved = resolve(policies, local, PEERS)
    visible = visible_peers(resolved.rules, local, {p.id: p.allowed_ips for p in PEERS.values()}, Action(default))
    monkeypatch.setattr(firewall, "FEW", random.choice((1, 3)))
    document = render(
        firewall.Settings(local.mesh_ip, (MESH,), Action(default)),
        resolved.rules,
        visible=(PEERS[each].mesh_ip for each in visible),
    )

    async def judge() -> tuple[set[int], dict[str, Any]]:
        door = Nftables()
        try:
            await door.apply(document)
            for number, packet in traffic.items():
                wires.send(packet, number)
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


# text from outside

FRAGMENTS = (
    '"', "'", "\\", "\n", "\r", "\0", "{", "}", ";", "#", "@", "*", "$(reboot)", '" accept comment "', "\u2028",
    "\ud7ff", '"}}},{"flush":{"ruleset":null}},', "\n} table inet x {", "-f /etc/passwd", "é", "x" * 10_000,
)  # fmt: skip
hostile = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join))


def hostile_rules(policy_id: str, text: str, node_id: str, action: str) -> tuple[Policy, ...]:
    """Rules that mean the same whatever the texts are, as long as `action` is no action."""
    lines = [PolicyRule(node_id, "n_a", port, "tcp", "allow") for port in range(1, 6)]  # a set
    lines += [PolicyRule(node_id, "n_a", 0, "icmp", "allow"), PolicyRule("n_a", node_id, 0, "", action)]
    lines += [PolicyRule(f"/{text}", "n_a", 0, "", "allow"), PolicyRule("n_a", f"{text}/", 0, "", "allow")]
    lines += [PolicyRule(node_id, "n_a", 0, f"?{text}", "allow")]
    return (Policy(policy_id, tuple(lines)),)


@pytest.mark.usefixtures("namespace")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy_id=hostile, name=hostile, text=hostile, node_id=hostile, action=hostile)
def test_text_from_outside_stands_in_comments_and_changes_nothing_else(
    policy_id: str, name: str, text: str, node_id: str, action: str
) -> None:
    def document(policy_id: str, name: str, text: str, node_id: str, action: str) -> Json:
        peers = {node_id: PEERS["n_b"]}
        rules = resolve(hostile_rules(policy_id, text, node_id, action), LOCAL, peers).rules
        openings = Openings().open(Opening(name, Protocol.UDP, 53, LOCAL.mesh_ip))
        settings_ = firewall.Settings(LOCAL.mesh_ip, (MESH,))
        return render(settings_, rules, visible=[PEERS["n_b"].mesh_ip], openings=openings)

    async def listed(document: Json) -> str:
        door = Nftables()
        try:
            await door.apply(document)
        finally:
            await door.close()
        return run("nft", "-s", "list", "ruleset")

    harmless = asyncio.run(listed(document("pol", "name", "text", "node", "act")))
    # a node id is what is no address and not empty
    told = asyncio.run(listed(document(policy_id, name, text, f"n {node_id}".replace("/", ""), f"?{action}")))
    comments = re.compile(r' comment "([^"]*)"')
    assert comments.sub("", told) == comments.sub("", harmless)
    assert len(comments.findall(harmless)) >= 8
    assert all(re.fullmatch(r"[A-Za-z0-9_.:#-]{0,100}", comment) for comment in comments.findall(told))
