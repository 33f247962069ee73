"""What policies mean, written as plainly as the contract states it and as slowly as it likes (section 6).

It shares no code with the product: it reads the raw text of the rules with the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from plexd.mesh.desired import Policy, PolicyRule

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

TCP, UDP = 6, 17
ICMPS = {1, 58}


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

    def rules(self) -> Iterator[Meaning]:
        for policy in self.policies:
            for rule in policy.rules:
                meaning = self._meaning(rule)
                if meaning is not None:
                    yield meaning

    def _meaning(self, rule: PolicyRule) -> Meaning | None:
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
        return Meaning(self, src, dst, "" if bad_protocol else protocol, port, "allow" if allows else "deny")

    def member(self, node_id: str) -> Member | None:
        if node_id == self.own.id:
            return self.own
        return next((peer for peer in self.peers if peer.id == node_id), None)

    def visible(self) -> set[str]:
        return {peer.id for peer in self.peers if self._is_open(self.own, peer) or self._is_open(peer, self.own)}

    def _is_open(self, source: Member, destination: Member) -> bool:
        for rule in self.rules():
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

    def matches(self, src: Address, dst: Address, protocol: int, port: int | None) -> bool:
        """Of the original direction of a connection; `port` is the destination port, None without one."""
        if self.matches_nothing():
            return False
        for network, address in ((self.network(self.src), src), (self.network(self.dst), dst)):
            if network is not None and address not in network:
                return False
        if self.port:
            wanted = {"tcp": {TCP}, "udp": {UDP}, "": {TCP, UDP}}[self.protocol]
            return protocol in wanted and port == self.port
        return protocol in {"": {protocol}, "tcp": {TCP}, "udp": {UDP}, "icmp": ICMPS}[self.protocol]


def judge(rules: Sequence[Meaning], default: str, src: Address, dst: Address, protocol: int, port: int | None) -> str:
    for rule in rules:
        if rule.matches(src, dst, protocol, port):
            return rule.action
    return default


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
