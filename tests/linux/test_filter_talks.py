"""Connections of real stacks through the filter: begun, withdrawn, answered, translated, forwarded."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import closing

import pytest

from plexd.linux.nftables import Nftables
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Peer, Policy, PolicyRule
from plexd.mesh.firewall import TABLE, Settings
from plexd.mesh.keys import NO_PRESHARED_KEY, PublicKey
from plexd.mesh.nft_commands import Json
from plexd.mesh.policy import Local, Protocol, resolve
from plexd.mesh.temporary_allows import NO_TEMPORARY_ALLOWS, TemporaryAllow, TemporaryAllows
from tests.linux.homes import CONTAINER, MESH, NODE, PEER, Homes, wait_until
from tests.linux.wires import run
from tests.mesh.rendering import render
from tests.namespaces import inside

pytestmark = pytest.mark.namespaces


@pytest.fixture
def homes(make_namespace: Callable[[], str]) -> Homes:
    return Homes(make_namespace)


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class Firewall:
    """The node's filter, for the mesh of one family."""

    def __init__(self, homes: Homes, version: int) -> None:
        self._homes = homes
        self._own = parse_ip(NODE[version])
        self._behind = (Prefix.parse("172.30.0.0/24" if version == 4 else "fd00:30::/64"),)
        peer_ip = parse_ip(PEER[version])
        self._peers = {"n_b": Peer("n_b", PublicKey(bytes(32)), peer_ip, "", (Prefix.host(peer_ip),), NO_PRESHARED_KEY)}

    def document(
        self, *lines: str, ping: bool = False, temporary_allows: TemporaryAllows = NO_TEMPORARY_ALLOWS
    ) -> Json:
        """`lines` are rules as text: action, source, destination, and then port and protocol if any."""
        rules = []
        for line in lines:
            action, src, dst, *rest = line.split()
            port, protocol = rest or ("0", "")
            rules.append(PolicyRule(src, dst, int(port), protocol, action))
        resolved = resolve([Policy("pol", tuple(rules))], Local("n_a", self._own, self._behind), self._peers)
        assert (resolved.faults, resolved.idle) == ((), ())
        visible = [peer.mesh_ip for peer in self._peers.values()]
        settings = Settings(self._own, (MESH,), allow_ping=ping)
        return render(settings, resolved.rules, visible=visible, temporary_allows=temporary_allows)

    def enforce(self, *lines: str, ping: bool = False, temporary_allows: TemporaryAllows = NO_TEMPORARY_ALLOWS) -> None:
        self.apply(self.document(*lines, ping=ping, temporary_allows=temporary_allows))

    def apply(self, *documents: Json) -> None:
        async def each() -> None:
            door = Nftables(TABLE)
            try:
                for document in documents:
                    await door.apply(document)
            finally:
                await door.close()

        with inside(self._homes.node):
            asyncio.run(each())


@pytest.fixture
def firewall(homes: Homes, version: int) -> Firewall:
    return Firewall(homes, version)


def ping(homes: Homes, namespace: str, address: str) -> bool:
    command = ["ip", "netns", "exec", namespace, "ping", "-c", "1", "-W", "1", address]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_withdrawn_allow_stops_an_open_connection_from_the_peer(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce("allow n_b n_a 7000 tcp")
    with (
        closing(homes.listen(homes.node, NODE[version], 7000)) as server,
        closing(homes.connect(homes.peer, NODE[version], 7000)) as client,
        closing(server.accept()[0]) as served,
    ):
        client.sendall(b"one")
        assert served.recv(10) == b"one"
        firewall.enforce("allow n_b n_a 7001 tcp")
        client.sendall(b"two")
        wait_until(lambda: homes.denied() > 0)
        served.setblocking(False)
        with pytest.raises(BlockingIOError):
            served.recv(10)
        firewall.enforce("allow n_b n_a 7000 tcp")
        served.settimeout(10)
        assert served.recv(10) == b"two"  # TCP had kept it


def test_withdrawn_allow_stops_an_open_connection_of_our_own(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce("allow n_a n_b 7000 tcp")
    with (
        closing(homes.listen(homes.peer, PEER[version], 7000)) as server,
        closing(homes.connect(homes.node, PEER[version], 7000)) as client,
        closing(server.accept()[0]) as served,
    ):
        served.sendall(b"an answer needs no rule")
        assert client.recv(100) == b"an answer needs no rule"
        firewall.enforce()
        client.sendall(b"two")
        wait_until(lambda: homes.denied() > 0)
        served.setblocking(False)
        with pytest.raises(BlockingIOError):
            served.recv(10)


def test_one_direction_does_not_open_the_other(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce("allow n_a n_b")
    with (
        closing(homes.listen(homes.node, NODE[version], 7000)) as server,
        closing(homes.try_to_connect(homes.peer, NODE[version], 7000)),
    ):
        wait_until(lambda: homes.denied() > 0)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_answers_to_udp_and_icmp_ride_on_the_connection(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce("allow n_a n_b 7000 udp", "allow n_a n_b 0 icmp")
    with (
        closing(homes.udp(homes.peer, PEER[version], 7000)) as far,
        closing(homes.udp(homes.node, NODE[version], 7001)) as near,
    ):
        near.sendto(b"question", (PEER[version], 7000))
        far.settimeout(10)
        asked, whom = far.recvfrom(100)
        far.sendto(b"answer", whom)
        near.settimeout(10)
        assert (asked, near.recv(100)) == (b"question", b"answer")
    assert ping(homes, homes.node, PEER[version])
    assert not ping(homes, homes.peer, NODE[version])


def test_withdrawn_allow_silences_a_node_that_only_answers(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce("allow n_b n_a 7000 udp")
    with (
        closing(homes.udp(homes.node, NODE[version], 7000)) as near,
        closing(homes.udp(homes.peer, PEER[version], 7001)) as far,
    ):
        far.sendto(b"question", (NODE[version], 7000))
        near.settimeout(10)
        _, whom = near.recvfrom(100)
        for number in range(3):
            near.sendto(b"%d" % number, whom)
        far.settimeout(10)
        assert [far.recv(100) for _ in range(3)] == [b"0", b"1", b"2"]
        with inside(homes.node):
            assert "counter packets 4 " in run("nft", "list", "chain", "inet", "plexd", "mesh")  # of both directions
        firewall.enforce()
        with pytest.raises(PermissionError):
            near.sendto(b"3", whom)
        firewall.enforce("allow n_b n_a 7000 udp")
        near.sendto(b"4", whom)
        assert far.recv(100) == b"4"


def test_error_about_a_connection_of_somebody_else_changes_no_mtu(homes: Homes) -> None:
    firewall = Firewall(homes, 4)
    firewall.enforce("allow n_b n_a", "allow n_a n_b")
    with (
        closing(homes.udp(homes.node, NODE[4], 7000)) as near,
        closing(homes.udp(homes.container, CONTAINER[4], 7001)) as container,
        closing(homes.udp(homes.peer, PEER[4], 7001)) as far,
    ):
        for other, address in ((container, CONTAINER[4]), (far, PEER[4])):
            near.sendto(b"a connection", (address, 7001))
            other.settimeout(10)
            assert other.recv(100) == b"a connection"
            send_fragmentation_needed(homes, address)
        with inside(homes.node):
            # the error about the connection with the peer, which came last, has been taken
            wait_until(lambda: "mtu 552" in run("ip", "route", "get", PEER[4]))
            assert "mtu 552" not in run("ip", "route", "get", CONTAINER[4])


def send_fragmentation_needed(homes: Homes, destination: str) -> None:
    """From the peer to the node: a packet from port 7000 to `destination`, port 7001, needs an MTU of 552."""
    addresses = socket.inet_aton(NODE[4]) + socket.inet_aton(destination)
    quoted = struct.pack("!BBHHHBBH", 0x45, 0, 1400, 1, 0x4000, 64, socket.IPPROTO_UDP, 0) + addresses
    quoted += struct.pack("!HHHH", 7000, 7001, 1380, 0)
    body = struct.pack("!BBHHH", 3, 4, 0, 0, 552) + quoted
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    with inside(homes.peer), closing(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as raw:
        raw.sendto(body, (NODE[4], 0))


def test_error_about_a_connection_comes_back(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce("allow n_a n_b 7000 udp")
    with inside(homes.node), closing(homes.udp(homes.node, NODE[version], 7001)) as near:
        near.connect((PEER[version], 7000))
        near.send(b"nobody listens")
        near.settimeout(10)
        with pytest.raises(ConnectionRefusedError):
            near.recv(100)


def test_visible_peers_may_ping(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce(ping=True)
    assert ping(homes, homes.peer, NODE[version])
    assert ping(homes, homes.node, PEER[version])
    firewall.enforce(ping=False)
    assert not ping(homes, homes.peer, NODE[version])


def test_opening_lets_in_without_a_policy_and_closes_again(homes: Homes, firewall: Firewall, version: int) -> None:
    opened = TemporaryAllows().open(
        TemporaryAllow("ssh", Protocol.TCP, 7000, parse_ip(NODE[version]), (parse_ip(PEER[version]),))
    )
    firewall.enforce(temporary_allows=opened)
    with closing(homes.listen(homes.node, NODE[version], 7000)) as server:
        homes.connect(homes.peer, NODE[version], 7000).close()
        server.accept()[0].close()
        firewall.enforce(temporary_allows=opened.close("ssh"))
        with closing(homes.try_to_connect(homes.peer, NODE[version], 7000)):
            wait_until(lambda: homes.denied() > 0)
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


def publish(homes: Homes, version: int, target: Mapping[int, str] = CONTAINER) -> None:
    """As a container runtime does: port 8080 of the node is port 80 of the container, or another `target`."""
    family, address = ("ip", target[4]) if version == 4 else ("ip6", f"[{target[6]}]")
    chain = "type nat hook prerouting priority dstnat;"
    rules = f"table {family} docker {{ chain out {{ {chain} tcp dport 8080 dnat to {address}:80; }}\n}}"
    with inside(homes.node):
        run("nft", "-f", "-", stdin=rules)


@pytest.mark.parametrize(
    ("lines", "reachable"),
    [
        ([], False),
        (["allow n_b n_a 8080 tcp"], True),
        (["deny n_b {container} 80 tcp", "allow n_b n_a 8080 tcp"], True),
        (["allow n_b {container} 80 tcp"], False),
        (["deny n_b n_a 8080 tcp", "allow * *"], False),
    ],
)
def test_published_port_is_judged_by_the_address_that_was_dialled(
    homes: Homes, firewall: Firewall, version: int, lines: list[str], reachable: bool
) -> None:
    publish(homes, version)
    firewall.enforce(*(line.format(container=CONTAINER[version]) for line in lines))
    with (
        closing(homes.listen(homes.container, CONTAINER[version], 80)) as server,
        closing(homes.try_to_connect(homes.peer, NODE[version], 8080)) as client,
    ):
        if reachable:
            server.settimeout(10)
            with closing(server.accept()[0]) as served:
                served.sendall(b"hello")
                client.settimeout(10)
                assert client.recv(10) == b"hello"
        else:
            wait_until(lambda: homes.denied() > 0)
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


@pytest.mark.parametrize(
    ("line", "source", "goes"),
    [
        ("allow n_b {container} 80 tcp", "peer", True),
        ("allow n_b {container} 81 tcp", "peer", False),
        ("allow {container} n_b 80 tcp", "peer", False),
        ("allow {container} n_b 80 tcp", "container", True),
        ("allow n_b {container} 80 tcp", "container", False),
        ("allow n_a n_b 80 tcp", "container", False),  # what a container sends is not the node's
    ],
)
def test_forwarded_connection_needs_a_rule_of_its_own(
    homes: Homes, firewall: Firewall, version: int, line: str, source: str, goes: bool
) -> None:
    firewall.enforce(line.format(container=CONTAINER[version]))
    ends = [(homes.peer, PEER[version]), (homes.container, CONTAINER[version])]
    (near, _), (far, address) = ends if source == "peer" else reversed(ends)
    with (
        closing(homes.listen(far, address, 80)) as server,
        closing(homes.try_to_connect(near, address, 80)) as client,
    ):
        if goes:
            server.settimeout(10)
            with closing(server.accept()[0]) as served:
                served.sendall(b"hello")
                client.settimeout(10)
                assert client.recv(10) == b"hello"
        else:
            wait_until(lambda: homes.denied() > 0)
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


def test_what_the_host_does_elsewhere_is_not_touched(homes: Homes, firewall: Firewall, version: int) -> None:
    firewall.enforce()
    with (
        closing(homes.listen(homes.node, NODE[version], 7000)) as server,
        closing(homes.connect(homes.node, NODE[version], 7000)),  # through loopback
        closing(server.accept()[0]),
    ):
        pass
    assert ping(homes, homes.container, "172.30.0.1" if version == 4 else "fd00:30::1")
    assert ping(homes, homes.node, CONTAINER[version])
    assert homes.denied() == 0


def guard_holds_off(homes: Homes, version: int, port: int, server: socket.socket, chain: str) -> None:
    """Whoever dials the node's mesh address from the container's side, in this chain."""
    with closing(homes.try_to_connect(homes.container, NODE[version], port)), inside(homes.node):
        wait_until(lambda: "packets 0" not in run("nft", "list", "chain", "inet", "plexd", chain))
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_mesh_address_is_no_address_of_the_other_side(homes: Homes, firewall: Firewall, version: int) -> None:
    with closing(homes.listen(homes.node, NODE[version], 7000)) as server:
        homes.connect(homes.container, NODE[version], 7000).close()
        server.accept()[0].close()
        firewall.enforce("allow * *")
        guard_holds_off(homes, version, 7000, server, "input")


def test_port_published_at_the_mesh_address_is_none_of_the_other_side(
    homes: Homes, firewall: Firewall, version: int
) -> None:
    publish(homes, version, PEER)
    with closing(homes.listen(homes.peer, PEER[version], 80)) as server:
        homes.connect(homes.container, NODE[version], 8080).close()
        server.accept()[0].close()
        firewall.enforce("allow * *")
        guard_holds_off(homes, version, 8080, server, "forward")


def test_nothing_leaks_and_nothing_is_lost_while_the_table_is_replaced(
    homes: Homes, firewall: Firewall, version: int
) -> None:
    counted = (
        "table inet probe { chain input { type filter hook input priority 0;"
        f' iifname "{MESH}" udp dport 8 counter; iifname "{MESH}" udp dport 9 counter; }}\n}}'
    )
    with inside(homes.node):
        run("nft", "-f", "-", stdin=counted)
    # port 8 passes by one rule alone, port 9 is held back by one alone; here each is a rule, there one among a hundred
    rules = ("deny n_b n_a 9 udp", "allow n_b n_a 8 udp", "allow * n_a 9 udp")
    others = [
        f"{action} n_b n_a {port} udp"
        for action, ports in (("allow", range(100, 200)), ("deny", range(200, 300)))
        for port in ports
    ]
    few, many = firewall.document(*rules), firewall.document(*others, *rules)
    firewall.apply(few)
    over = threading.Event()
    sent = {8: 0, 9: 0}

    def load() -> None:
        with closing(homes.udp(homes.peer, PEER[version], 7000)) as sock:
            while not over.wait(0.0005):  # the wire holds only so much
                for port in sent:
                    sock.sendto(b"x", (NODE[version], port))
                    sent[port] += 1

    thread = threading.Thread(target=load)
    thread.start()
    try:
        firewall.apply(*([many, few] * 50))
    finally:
        over.set()
        thread.join()

    def passed(port: int) -> int:
        with inside(homes.node):
            listed = run("nft", "list", "chain", "inet", "probe", "input")
        line = next(line for line in listed.splitlines() if f"dport {port} " in line)
        return int(line.split("packets ")[1].split()[0])

    assert sent[9] > 1000
    wait_until(lambda: passed(8) == sent[8])
    assert passed(9) == 0
