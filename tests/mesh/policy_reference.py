"""What policies mean, written as plainly as the contract states it and as slowly as it likes (docs/contract/mesh.md
§6).

It shares no code with the product: it reads the raw text of the rules with the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from plexd.mesh.desired import Policy, PolicyRule
from tests.mesh.packets import ICMP, ICMPV6, TCP, UDP, Address, Packet

Network = IPv4Network | IPv6Network

ICMPS = {ICMP, ICMPV6}


@dataclass(frozen=True)
class Member:
    """A node of the mesh: this one or a peer."""

    id: str
    mesh_ip: Address | None
    networks: tuple[Network, ...]  # L of this node, P of a peer


@dataclass(frozen=True)
class World:
    own: Member
    peers: tuple[Member, ...]
    policies: tuple[Policy, ...]
    default: str = "deny"

    @cached_property
    def rules(self) -> list[Meaning]:
        meanings = (
            self._meaning(rule, (policy.id, number))
            for policy in self.policies
            for number, rule in enumerate(policy.rules)
        )
        return [meaning for meaning in meanings if meaning is not None]

    def _meaning(self, rule: PolicyRule, origin: tuple[str, int]) -> Meaning | None:
        allows = rule.action.lower() == "allow"
        protocol = rule.protocol.lower()
        if protocol in {"any", "all", "*"}:
            protocol = ""
        bad_protocol = protocol not in {"", "tcp", "udp", "icmp"}
        bad_port = not 0 <= rule.port <= 65535 or (rule.port > 0 and protocol == "icmp")
        bad_sides = [text == "" or ("/" in text and _network(text) is None) for text in (rule.src, rule.dst)]
        if allows and (bad_protocol or bad_port or any(bad_sides)):
            return None
        src, dst = ("*" if bad else text for bad, text in zip(bad_sides, (rule.src, rule.dst), strict=True))
        port = 0 if bad_port else rule.port
        return Meaning(self, origin, src, dst, "" if bad_protocol else protocol, port, "allow" if allows else "deny")

    def member(self, node_id: str) -> Member | None:
        if node_id == self.own.id:
            return self.own
        return next((peer for peer in self.peers if peer.id == node_id), None)

    @cached_property
    def visible(self) -> set[str]:
        return {peer.id for peer in self.peers if self._is_open(self.own, peer) or self._is_open(peer, self.own)}

    def _is_open(self, source: Member, destination: Member) -> bool:
        for rule in self.rules:
            if rule.matches_nothing():
                continue
            if rule.action == "allow":
                if rule.touches(rule.src, source) and rule.touches(rule.dst, destination):
                    return True
            elif rule.port == 0 and rule.protocol == "":
                closes = rule.covers(rule.src, source) and rule.covers(rule.dst, destination)
                if closes:
                    return False
        return self.default == "allow"


@dataclass(frozen=True)
class Meaning:
    world: World
    origin: tuple[str, int]  # policy id and number
    src: str
    dst: str
    protocol: str
    port: int
    action: str

    def network(self, side: str) -> Network | None:
        """None: any address. ValueError: a node without an address."""
        if side == "*":
            return None
        if (network := _network(side)) is not None:
            return network
        member = self.world.member(side)
        if member is None or member.mesh_ip is None:
            raise ValueError(side)
        return ip_network(member.mesh_ip)

    def matches_nothing(self) -> bool:
        try:
            sides = [self.network(self.src), self.network(self.dst)]
        except ValueError:
            return True
        return len({side.version for side in sides if side is not None}) == 2

    def touches(self, side: str, member: Member) -> bool:
        if side in {"*", member.id}:
            return True
        network = _network(side)
        return network is not None and any(
            network.version == other.version and network.overlaps(other) for other in member.networks
        )

    def covers(self, side: str, member: Member) -> bool:
        if side in {"*", member.id}:
            return True
        network = _network(side)
        return network is not None and all(_holds(network, other) for other in member.networks)

    def matches(self, packet: Packet) -> bool:
        """By the original direction of its connection; without a connection only its family is known."""
        if self.matches_nothing():
            return False
        for network, address in ((self.network(self.src), packet.src), (self.network(self.dst), packet.dst)):
            if network is not None and (address not in network or (packet.state == "untracked" and network.prefixlen)):
                return False
        if self.port:
            wanted = {"tcp": {TCP}, "udp": {UDP}, "": {TCP, UDP}}[self.protocol]
            return packet.state != "untracked" and packet.l4proto in wanted and packet.port == self.port
        return packet.l4proto in {"": {packet.l4proto}, "tcp": {TCP}, "udp": {UDP}, "icmp": ICMPS}[self.protocol]


@dataclass(frozen=True)
class Filter:
    """The switches of docs/contract/mesh.md §6.5, and the temporary allows of 6.8: protocol, port, destination, sources
    (None: all)
    """

    managed: tuple[str, ...]
    allow_ping: bool = True
    guard_mesh_ip: bool = True
    temporary_allows: tuple[tuple[int, int, Address, frozenset[Address] | None], ...] = ()

    def decide(self, world: World, packet: Packet) -> str:
        """`accept` or `drop`."""
        return self.judge(world, packet)[0]

    def judge(self, world: World, packet: Packet) -> tuple[str, Meaning | None]:
        """The verdict, and the rule that made it, None for anything else that did."""
        own = world.own.mesh_ip
        from_elsewhere = packet.hook != "output" and packet.iifname not in {"lo", *self.managed}
        if self.guard_mesh_ip and from_elsewhere and own == (packet.to if packet.hook == "input" else _dialled(packet)):
            return "drop", None
        if not {packet.iifname, packet.oifname} & set(self.managed):
            return "accept", None
        if packet.state == "invalid":
            return "drop", None
        if packet.state == "related" and self._is_error(world, packet):
            return "accept", None
        if packet.state != "untracked" and (self._is_ping(world, packet) or self._is_open(packet)):
            return "accept", None
        for rule in world.rules:
            concerns_us = rule.touches(rule.src, world.own) or rule.touches(rule.dst, world.own)
            if concerns_us and rule.matches(packet):
                return {"allow": "accept", "deny": "drop"}[rule.action], rule
        return {"allow": "accept", "deny": "drop"}[world.default], None

    def _is_open(self, packet: Packet) -> bool:
        return any(
            (packet.l4proto, packet.port, packet.dst) == (protocol, port, dst)
            and (sources is None or packet.src in sources)
            for protocol, port, dst, sources in self.temporary_allows
        )

    def _is_error(self, world: World, packet: Packet) -> bool:
        """An ICMP error about a connection between this node and a visible peer, or a prefix of that peer."""
        networks = [network for peer in world.peers if peer.id in world.visible for network in peer.networks]
        own = world.own.mesh_ip
        other = {packet.src: packet.dst, packet.dst: packet.src}.get(own) if own is not None else None
        return (
            packet.confirmed
            and packet.l4proto in ICMPS
            and other is not None
            and any(other in network for network in networks)
        )

    def _is_ping(self, world: World, packet: Packet) -> bool:
        visible = world.visible
        peers = {peer.mesh_ip for peer in world.peers if peer.id in visible}
        ends = (packet.src, packet.dst)
        is_reply = (packet.icmp_type, packet.state, packet.direction) == ("echo-reply", "established", "reply")
        return (
            self.allow_ping
            and (packet.icmp_type == "echo-request" or is_reply)
            and (
                (ends[0] == world.own.mesh_ip and ends[1] in peers)
                or (ends[1] == world.own.mesh_ip and ends[0] in peers)
            )
        )


def _dialled(packet: Packet) -> Address | None:
    """Where a connection's packet was sent to at first; None for answers and what belongs to none."""
    return packet.dst if packet.direction == "original" and packet.state not in {"invalid", "untracked"} else None


@lru_cache
def _network(text: str) -> Network | None:
    """The prefix a side states; None when it states none, or a broken one."""
    address, slash, length = text.partition("/")
    try:
        if "%" in text or (slash and str(int(length)) != length):
            return None
        ip_address(address)
        return ip_network(text, strict=False)
    except ValueError:
        return None


def _holds(network: Network, other: Network) -> bool:
    return (
        network.version == other.version and network.prefixlen <= other.prefixlen and (other.network_address in network)
    )
