"""Policies to try, and the small mesh they are about: this node, peers of both families, one in front of a network."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from hypothesis import strategies as st

from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Peer, Policy, PolicyRule
from plexd.mesh.keys import NO_PRESHARED_KEY, PublicKey
from plexd.mesh.policy import Local
from tests.mesh.policy_reference import Member, World

LOCAL = Local("n_a", parse_ip("10.100.1.1"))
LOCAL_IPV6 = Local("n_a", parse_ip("fd00:100::1"))


def peer(node_id: str, mesh_ip: str, *behind: str) -> Peer:
    packed = parse_ip(mesh_ip) if mesh_ip else b""
    own = (Prefix.host(packed),) if packed else ()
    return Peer(node_id, PublicKey(bytes(32)), packed, "", (*own, *map(Prefix.parse, behind)), NO_PRESHARED_KEY)


PEERS = {
    each.id: each
    for each in (
        peer("n_b", "10.100.1.2"),
        peer("n_c", "10.100.1.3", "172.16.0.0/16"),
        peer("n_d", "10.100.2.4", "fd00:200::/64"),
        peer("n_e", "fd00:100::5"),
        peer("n_f", "", "172.16.7.0/24"),
        peer("n_g", "fd00:100::6"),
    )
}


def other_prefixes(peer_ids: Iterable[str]) -> list[Prefix]:
    """The prefixes of these peers apart from their mesh addresses."""
    each = [(PEERS[peer_id], prefix) for peer_id in peer_ids for prefix in PEERS[peer_id].allowed_ips]
    return [prefix for known, prefix in each if prefix.packed != known.mesh_ip]


def world_of(policies: tuple[Policy, ...], local: Local = LOCAL, default: str = "deny") -> World:
    def member(node_id: str, mesh_ip: bytes, prefixes: tuple[Prefix, ...]) -> Member:
        address = ip_address(mesh_ip) if mesh_ip else None
        return Member(node_id, address, tuple(ip_network(str(prefix)) for prefix in prefixes))

    peers = tuple(member(each.id, each.mesh_ip, each.allowed_ips) for each in PEERS.values())
    return World(member(local.node_id, local.mesh_ip, local.prefixes), peers, policies, default)


# strategies: few values, so that rules meet

SIDES = (
    "*", "*", "n_a", "n_a", "n_b", "n_c", "n_d", "n_e", "n_f", "n_g", "n_unknown", "10.100.1.1", "10.100.1.2",
    "10.100.1.0/24", "10.100.1.7/30", "10.100.0.0/16", "10.100.2.0/24", "172.16.0.0/16", "172.16.7.9", "172.16.0.0/12",
    "0.0.0.0/0", "fd00:100::/64", "fd00:100::5", "fd00:200::/48", "fd00:200::/65", "::/0", "", "10.100.1.0/33",
    "10.100.1.0/024", "fd00::/", "10.100.1.300", "fe80::1%plexd0",
)  # fmt: skip
PROTOCOLS = ("", "any", "ALL", "*", "tcp", "tcp", "Udp", "icmp", "sctp", " tcp")
PORTS = (0, 0, 0, 22, 80, 443, 65535, 65536, -1)
ACTIONS = ("allow", "Allow", "ALLOW", "deny", "DENY", "", "permit")

rules = st.builds(
    PolicyRule,
    src=st.sampled_from(SIDES),
    dst=st.sampled_from(SIDES),
    port=st.sampled_from(PORTS),
    protocol=st.sampled_from(PROTOCOLS),
    action=st.sampled_from(ACTIONS),
)
all_policies = st.lists(st.lists(rules, max_size=6), max_size=4).map(
    lambda lists: tuple(Policy(f"pol-{number}", tuple(each)) for number, each in enumerate(lists))
)
locals_ = st.sampled_from((LOCAL, LOCAL_IPV6, Local("n_a", LOCAL.mesh_ip, (Prefix.parse("192.0.2.0/24"),))))
defaults = st.sampled_from(("deny", "allow"))
