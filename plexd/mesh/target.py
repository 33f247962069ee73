"""From the desired snapshot to what the kernel should hold: which peers, which prefixes each of them, which routes.

Here the rules that need all peers at once are applied: a prefix belongs to the first peer that claims it (mesh
contract, section 4.2), and prefixes that would swallow the path to the mesh itself get no route (section 3.1).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from plexd.mesh.address import Endpoint, HostPort, Prefix, is_unicast, parse_endpoint
from plexd.mesh.desired import Candidates, Desired, Peer
from plexd.mesh.keys import PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import ROUTE_METRIC, Backend, Route

MTU_OVERHEAD = 80  # outer IPv6 and UDP headers, WireGuard's header and tag
MTU_FALLBACK = 1420  # what 1500 of Ethernet leaves, used while there is no default route to measure by
MTU_MIN, MTU_MAX = 1280, 8920


@dataclass(frozen=True, slots=True)
class Settings:
    """What this node brings along: identity and the `mesh` block of the configuration.

    `backend` is None for "auto". `mtu` 0 derives it. `control_plane` holds the control plane's own addresses.
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


class TargetPeer(NamedTuple):
    """A peer as the device should hold it. `endpoint` is the current candidate, None while none is usable."""

    id: str
    public_key: PublicKey
    psk: PresharedKey
    endpoint: Endpoint | None
    allowed_ips: tuple[Prefix, ...]


class Warned(NamedTuple):
    """Something was left out of the target; `code` and `subject` make it reportable once."""

    code: str
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Target:
    settings: Settings
    peers: Mapping[str, TargetPeer]
    routes: frozenset[Route]
    warnings: tuple[Warned, ...] = ()
    unresolved: frozenset[str] = frozenset()  # endpoint texts that are names nobody looked up yet


def build_target(
    desired: Desired,
    settings: Settings,
    resolved: Mapping[str, Endpoint],
    turned: Mapping[str, str] = MappingProxyType({}),
) -> Target:
    """`resolved` maps endpoint texts that are names to the address found for them.

    `turned` has the endpoint texts of peers that use another than the newest candidate.
    """
    warnings: list[Warned] = []
    peers: dict[str, TargetPeer] = {}
    claimed: dict[Prefix, str] = {}
    none = Candidates()
    for peer in desired.peers.values():
        allowed_ips = _claim(peer, claimed, warnings)
        text = turned.get(peer.id) or desired.candidates.get(peer.id, none).current
        endpoint = _endpoint(peer, text, settings, resolved, warnings)
        peers[peer.id] = TargetPeer(peer.id, peer.public_key, peer.psk, endpoint, allowed_ips)
    routes = frozenset(_routes(peers.values(), settings, warnings))
    unresolved = names_to_resolve(desired) - resolved.keys()
    return Target(settings, peers, routes, tuple(warnings), unresolved)


def names_to_resolve(desired: Desired) -> frozenset[str]:
    """Endpoint texts that are host names."""
    texts = (text for candidates in desired.candidates.values() for text in candidates.newest_first())
    return frozenset(text for text in texts if isinstance(_parse(text), HostPort))


def usable_endpoint(text: str, settings: Settings, resolved: Mapping[str, Endpoint]) -> Endpoint | None:
    """The endpoint that a candidate means, None when it has no address yet or cannot be a peer's."""
    parsed = _parse(text)
    endpoint = resolved.get(text) if isinstance(parsed, HostPort) else parsed
    return endpoint if endpoint is not None and _can_be_a_peers(endpoint, settings) else None


def derive_mtu(settings: Settings, underlay_mtu: int | None) -> int:
    """`mesh.mtu`, or what the underlay's MTU leaves, within 1280..8920."""
    if settings.mtu:
        return settings.mtu
    if underlay_mtu is None:
        return MTU_FALLBACK
    return min(max(underlay_mtu - MTU_OVERHEAD, MTU_MIN), MTU_MAX)


def _claim(peer: Peer, claimed: dict[Prefix, str], warnings: list[Warned]) -> tuple[Prefix, ...]:
    lost = [prefix for prefix in peer.allowed_ips if claimed.setdefault(prefix, peer.id) != peer.id]
    if not lost:
        return peer.allowed_ips
    warnings.extend(
        Warned("prefix_claimed", f"{peer.id} {prefix}", f"{prefix} of peer {peer.id} belongs to peer {claimed[prefix]}")
        for prefix in lost
    )
    return tuple(prefix for prefix in peer.allowed_ips if prefix not in lost)


def _parse(text: str) -> Endpoint | HostPort | None:
    try:
        return parse_endpoint(text)
    except ValueError:
        return None


def _endpoint(
    peer: Peer, text: str, settings: Settings, resolved: Mapping[str, Endpoint], warnings: list[Warned]
) -> Endpoint | None:
    if not text:
        return None
    parsed = _parse(text)
    endpoint = resolved.get(text) if isinstance(parsed, HostPort) else parsed
    if endpoint is None:
        if parsed is None:
            warnings.append(
                Warned("endpoint_ignored", peer.id, f"endpoint {text!r} of peer {peer.id} is not host:port")
            )
        return None
    if not _can_be_a_peers(endpoint, settings):
        warnings.append(
            Warned("endpoint_ignored", peer.id, f"endpoint {endpoint} of peer {peer.id} cannot be a peer's address")
        )
        return None
    return endpoint


def _can_be_a_peers(endpoint: Endpoint, settings: Settings) -> bool:
    return endpoint.packed != settings.mesh_ip and is_unicast(endpoint.packed)


def _routes(peers: Iterable[TargetPeer], settings: Settings, warnings: list[Warned]) -> Iterable[Route]:
    peers = list(peers)
    underlay = {peer.endpoint.packed for peer in peers if peer.endpoint is not None} | settings.control_plane
    by_family = {size: sorted(packed for packed in underlay if len(packed) == size) for size in (4, 16)}
    for peer in peers:
        for prefix in peer.allowed_ips:
            # the first endpoint at or above the network address is inside, or none is: no walk over all of them
            addresses = by_family[len(prefix.packed)]
            nearest = bisect_left(addresses, prefix.packed)
            if nearest < len(addresses) and prefix.contains(addresses[nearest]):
                warnings.append(
                    Warned(
                        "prefix_not_routed", str(prefix), f"{prefix} holds the address of an endpoint: no route to it"
                    )
                )
                continue
            same_family = len(prefix.packed) == len(settings.mesh_ip)
            yield Route(prefix, settings.mesh_ip if same_family else None, ROUTE_METRIC)
