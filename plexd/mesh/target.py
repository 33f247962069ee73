"""Turns the desired snapshot into what the kernel should hold: the peers, the prefixes of each, and the routes.

The rules that need all peers at once are applied here: a prefix belongs to the first peer that claims it
(docs/contract/mesh.md §4.2), and a prefix that holds the address of an endpoint gets no route (docs/contract/mesh.md
§3.1).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from plexd.mesh import firewall
from plexd.mesh.address import Endpoint, HostPort, Prefix, is_unicast, parse_endpoint
from plexd.mesh.desired import NO_CANDIDATES, Candidates, Desired
from plexd.mesh.firewall import Ruleset
from plexd.mesh.keys import PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import MESH_ALIAS, MESH_SECTION, ROUTE_METRIC, Backend, Route
from plexd.mesh.sharing import Shared

MTU_OVERHEAD = 80  # outer IPv6 and UDP headers, WireGuard's header and tag
MTU_FALLBACK = 1420  # what 1500 of Ethernet leaves, used while there is no default route to measure by
MTU_MIN, MTU_MAX = 1280, 8920


@dataclass(frozen=True, slots=True)
class Settings:
    """The identity of this node and the `mesh` section of the configuration.

    `backend` is None for "auto". `mtu` 0 derives it. `control_plane` holds the control plane's own addresses. `policy`
    is None where none is enforced.
    """

    node_id: str
    interface: str
    private_key: PrivateKey
    mesh_ip: bytes
    listen_port: int
    mtu: int
    keepalive: int
    backend: Backend | None
    control_plane: frozenset[bytes] = frozenset()
    policy: firewall.Settings | None = None

    @property
    def alias(self) -> str:
        return MESH_ALIAS

    @property
    def section(self) -> str:
        return MESH_SECTION

    @property
    def address(self) -> Prefix:
        return Prefix.host(self.mesh_ip)


class TargetPeer(NamedTuple):
    """A peer as the device should hold it. `endpoint` is the current candidate, None while none is usable."""

    id: str
    public_key: PublicKey
    psk: PresharedKey
    endpoint: Endpoint | None
    allowed_ips: tuple[Prefix, ...]


class Warned(NamedTuple):
    """Something was left out of the target. `code` and `subject` tell whether it was reported before."""

    code: str
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Target:
    """`warnings` are sorted, so that equal targets compare equal however they were built.

    `firewall` is None where no policy is enforced, and until the policies have been applied (`admission.py`).
    """

    settings: Settings
    peers: Mapping[str, TargetPeer]
    routes: frozenset[Route]
    warnings: tuple[Warned, ...] = ()
    unresolved: frozenset[str] = frozenset()  # endpoint texts that are names nobody looked up yet
    firewall: Ruleset | None = None

    def endpoints(self) -> frozenset[bytes]:
        """The packed addresses of the peers' endpoints."""
        return frozenset(peer.endpoint.packed for peer in self.peers.values() if peer.endpoint is not None)


class Sources(NamedTuple):
    """Everything that a target is built from.

    `resolved` maps endpoint texts that are names to the address found for them. `overridden` has the endpoint texts of
    peers that use another than the newest candidate.
    """

    desired: Desired
    settings: Settings
    resolved: Mapping[str, Endpoint]
    overridden: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Built:
    """A target with its sources, and with what it takes to work out the next target from it (`amend.py`).

    `holders` maps each prefix to the peer that got it, `contested` has the prefixes that several peers claim,
    `unrouted` those without a route. `underlay` has the addresses that no route may swallow, by length and sorted, each
    as often as it is used.
    """

    sources: Sources
    target: Target
    holders: Mapping[Prefix, str]
    contested: frozenset[Prefix]
    unrouted: frozenset[Prefix]
    underlay: Mapping[int, Sequence[bytes]]


def build_target(
    desired: Desired,
    settings: Settings,
    resolved: Mapping[str, Endpoint],
    overridden: Mapping[str, str] = MappingProxyType({}),
) -> Target:
    return build(Sources(desired, settings, resolved, overridden)).target


def build(sources: Sources) -> Built:
    desired, settings, _, _ = sources
    warnings: list[Warned] = []
    peers: dict[str, TargetPeer] = {}
    holders: dict[Prefix, str] = {}
    contested: set[Prefix] = set()
    for peer in desired.peers.values():
        lost = {prefix for prefix in peer.allowed_ips if holders.setdefault(prefix, peer.id) != peer.id}
        if lost:
            contested |= lost
            warnings += (claimed_by_another(peer.id, prefix, holders[prefix]) for prefix in lost)
        endpoint, warned = choose_endpoint(peer.id, sources)
        if warned is not None:
            warnings.append(warned)
        allowed_ips = tuple(p for p in peer.allowed_ips if p not in lost) if lost else peer.allowed_ips
        peers[peer.id] = TargetPeer(peer.id, peer.public_key, peer.psk, endpoint, allowed_ips)
    underlay: dict[int, list[bytes]] = {4: [], 16: []}
    for address in settings.control_plane:
        underlay[len(address)].append(address)
    for target_peer in peers.values():
        if target_peer.endpoint is not None:
            address = target_peer.endpoint.packed
            underlay[len(address)].append(address)
    for addresses in underlay.values():
        addresses.sort()
    unrouted = frozenset(prefix for prefix in holders if swallows(prefix, underlay))
    warnings += map(not_routed, unrouted)
    routes = frozenset(route_to(prefix, settings) for prefix in holders if prefix not in unrouted)
    unresolved = names_to_resolve(desired) - sources.resolved.keys()
    target = Target(settings, Shared(peers), routes, tuple(sorted(warnings)), unresolved)
    return Built(sources, target, holders, frozenset(contested), unrouted, underlay)


def names_to_resolve(desired: Desired) -> frozenset[str]:
    """Endpoint texts that are host names."""
    return names_among(desired.candidates.values())


def names_among(candidates: Iterable[Candidates]) -> frozenset[str]:
    texts = (text for each in candidates for text in each.newest_first())
    return frozenset(text for text in texts if isinstance(_parse(text), HostPort))


def usable_endpoint(text: str, settings: Settings, resolved: Mapping[str, Endpoint]) -> Endpoint | None:
    """The endpoint of a candidate, None when its name has no address yet or the address cannot be a peer's."""
    parsed = _parse(text)
    endpoint = resolved.get(text) if isinstance(parsed, HostPort) else parsed
    return endpoint if endpoint is not None and _can_be_a_peers(endpoint, settings) else None


def derive_mtu(mtu: int, underlay_mtu: int | None) -> int:
    """The MTU that is set, or with 0 what the MTU of the underlay leaves, within 1280..8920."""
    if mtu:
        return mtu
    if underlay_mtu is None:
        return MTU_FALLBACK
    return min(max(underlay_mtu - MTU_OVERHEAD, MTU_MIN), MTU_MAX)


def _parse(text: str) -> Endpoint | HostPort | None:
    try:
        return parse_endpoint(text)
    except ValueError:
        return None


def _can_be_a_peers(endpoint: Endpoint, settings: Settings) -> bool:
    return endpoint.packed != settings.mesh_ip and is_unicast(endpoint.packed)


# a peer, a prefix at a time


def choose_endpoint(peer_id: str, sources: Sources) -> tuple[Endpoint | None, Warned | None]:
    """The endpoint of the candidate in use, None if it is not usable, and the warning that says why."""
    text = sources.overridden.get(peer_id) or sources.desired.candidates.get(peer_id, NO_CANDIDATES).current
    if not text:
        return None, None
    parsed = _parse(text)
    if parsed is None:
        return None, Warned("endpoint_ignored", peer_id, f"endpoint {text!r} of peer {peer_id} is not host:port")
    endpoint = sources.resolved.get(text) if isinstance(parsed, HostPort) else parsed
    if endpoint is not None and not _can_be_a_peers(endpoint, sources.settings):
        text = f"endpoint {endpoint} of peer {peer_id} cannot be a peer's address"
        return None, Warned("endpoint_ignored", peer_id, text)
    return endpoint, None


def claimed_by_another(peer_id: str, prefix: Prefix, holder: str) -> Warned:
    text = f"{prefix} of peer {peer_id} belongs to peer {holder}"
    return Warned("prefix_claimed", f"{peer_id} {prefix}", text)


def swallows(prefix: Prefix, underlay: Mapping[int, Sequence[bytes]]) -> bool:
    """Whether a route to the prefix would catch packets to an endpoint or to the control plane."""
    # if any address lies in the prefix, the first one at or above the network address does
    addresses = underlay[len(prefix.packed)]
    nearest = bisect_left(addresses, prefix.packed)
    return nearest < len(addresses) and prefix.contains(addresses[nearest])


def not_routed(prefix: Prefix) -> Warned:
    return Warned("prefix_not_routed", str(prefix), f"{prefix} holds the address of an endpoint: no route to it")


def route_to(prefix: Prefix, settings: Settings) -> Route:
    same_family = len(prefix.packed) == len(settings.mesh_ip)
    return Route(prefix, settings.mesh_ip if same_family else None, ROUTE_METRIC)
