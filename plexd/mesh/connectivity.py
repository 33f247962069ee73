"""What stands between this node and each of its peers, from what is wanted and what the kernel shows. Pure.

A peer is connected while it shook hands lately and its packets find their way: interface, mesh address, route. For
the others one obstacle is named, the first that explains it: causes on this node come before those on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from plexd.mesh.address import Endpoint, HostPort, Prefix, parse_endpoint
from plexd.mesh.age import format_age
from plexd.mesh.desired import Candidates, Desired, EndpointSource, Peer
from plexd.mesh.keys import NO_PRESHARED_KEY, PublicKey
from plexd.mesh.observed import DevicePeer, Observed, is_fresh
from plexd.mesh.target import Target

RELAY_PORT = 51821  # where bridges relay, unless configured otherwise
SOURCES = {EndpointSource.PEER: "state", EndpointSource.EVENT: "event", EndpointSource.REPORT: "report"}
ROAMED = "roamed"  # no candidate of the control plane: the peer's own packets told it
STATUS = "see what `plexd status` says of this node"


class PeerProblem(NamedTuple):
    """Why a peer is not connected: `code` is stable; `text` says it, `remedy` what somebody can do about it."""

    code: str
    text: str
    remedy: str


class PeerView(NamedTuple):
    """A peer as people see it; None is "not known". `last_handshake` is in Unix seconds.

    `path` is "direct" or "relay", a guess from the endpoints; `endpoint_source` is "state", "event", "report" or
    "roamed". `obstacle` is None while the peer is connected.
    """

    id: str
    mesh_ip: bytes | None
    public_key: PublicKey | None
    endpoint: Endpoint | None = None
    endpoint_source: str | None = None
    path: str | None = None
    allowed_ips: tuple[Prefix, ...] = ()
    last_handshake: float | None = None
    rx_bytes: int = 0
    tx_bytes: int = 0
    has_psk: bool = False
    obstacle: PeerProblem | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """What is known of the mesh at one moment, `now` in Unix seconds.

    `target` is None while this node has no private key, `observed` while the kernel refuses to be looked at.
    `resolved` maps endpoint names to addresses. `since` tells for a peer id when the peer was put on the interface.
    `is_refused`: the control plane refuses this node's key.
    """

    interface: str
    desired: Desired
    target: Target | None
    observed: Observed | None
    resolved: Mapping[str, Endpoint]
    since: Mapping[str, float]
    is_refused: bool
    now: float


def describe_peers(sight: Sight) -> tuple[PeerView, ...]:
    """Every peer the control plane wants, in its order, then those whose record could not be used."""
    survey = _Survey(sight)
    return (*map(survey.describe, sight.desired.peers.values()), *_rejected(sight.desired))


def _rejected(desired: Desired) -> Iterator[PeerView]:
    for peer_id, reason in desired.rejected:
        text = f"the control plane's record of it cannot be used: {reason}"
        obstacle = PeerProblem("rejected", text, "correct the peer at the control plane")
        yield PeerView(peer_id, None, None, obstacle=obstacle)


class _Survey:
    """What all peers have in common, worked out once."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight
        device = sight.observed.device if sight.observed is not None else None
        self._held: Mapping[bytes, DevicePeer] = device.peers if device is not None else {}
        self._paths = Paths(peer.endpoint for peer in self._held.values() if peer.endpoint is not None)
        self._routed = {route.prefix for route in sight.observed.routes} if sight.observed is not None else set()
        self._routable = {route.prefix for route in sight.target.routes} if sight.target is not None else set()
        self._obstacle_here = _obstacle_here(sight)

    def describe(self, peer: Peer) -> PeerView:
        candidates = self._sight.desired.candidates.get(peer.id, Candidates())
        view = PeerView(peer.id, peer.mesh_ip or None, peer.public_key, has_psk=peer.psk != NO_PRESHARED_KEY)
        held = self._held.get(peer.public_key)
        if held is not None:
            view = view._replace(
                allowed_ips=tuple(sorted(held.allowed_ips)),  # the kernel's own order says nothing
                last_handshake=held.last_handshake or None,
                rx_bytes=held.rx_bytes,
                tx_bytes=held.tx_bytes,
            )
            if held.endpoint is not None:
                view = view._replace(
                    endpoint=held.endpoint,
                    endpoint_source=_source(held.endpoint, candidates, self._sight.resolved),
                    path=self._paths.name(held.endpoint),
                )
        return view._replace(obstacle=self._obstacle_here or self._obstacle(peer, held, candidates))

    def _obstacle(self, peer: Peer, held: DevicePeer | None, candidates: Candidates) -> PeerProblem | None:
        sight = self._sight
        target = sight.target
        wanted = target.peers.get(peer.id) if target is not None else None
        if target is not None and wanted is None:
            text = "no policy lets it and this node talk to each other"
            return PeerProblem(
                "no_policy", text, "allow it at the control plane; `plexd policies` shows what is allowed"
            )
        if target is None or wanted is None or held is None:
            text = f"it is not on the interface {sight.interface} yet"
            return PeerProblem("not_applied", text, f"wait for the next pass; {STATUS}")
        # a peer without a usable mesh address is reached through what lies behind it
        own = mesh_host if (mesh_host := Prefix.host(peer.mesh_ip)) in peer.allowed_ips else peer.allowed_ips[0]
        if own not in wanted.allowed_ips:
            owner = next((f"peer {p.id}" for p in target.peers.values() if own in p.allowed_ips), "another peer")
            text = f"{owner} claims {own} too and comes first"
            return PeerProblem("prefix_lost", text, "give each peer addresses of its own at the control plane")
        if own not in held.allowed_ips:
            text = f"{own} is missing from its allowed IPs on {sight.interface}"
            return PeerProblem("not_applied", text, f"wait for the next pass; {STATUS}")
        if own not in self._routed:
            if own not in self._routable:
                text = f"{own} gets no route: the control plane, or an endpoint of a peer, is inside"
                return PeerProblem("no_route", text, "give mesh addresses that nothing else uses")
            return PeerProblem("no_route", f"the route to {own} is missing", f"wait for the next pass; {STATUS}")
        if is_fresh(held.last_handshake, sight.now):
            return None
        if sight.is_refused:
            text = "the control plane refuses this node's key: peers may have dropped this node"
            remedy = (
                "ask the control plane about this node; with a new bootstrap token in its place plexd registers anew"
            )
            return PeerProblem("identity_refused", text, remedy)
        port = target.settings.listen_port
        if held.endpoint is None:
            return _no_endpoint(candidates, sight.resolved, port)
        if not held.last_handshake:
            since = sight.since.get(peer.id)
            how_long = f" for {format_age(sight.now - since)}" if since is not None else ""
            traffic = f"{held.tx_bytes} bytes sent, {held.rx_bytes} received"
            return PeerProblem(
                "no_handshake",
                f"never a handshake with {held.endpoint}{how_long}: {traffic}",
                f"check that the peer runs, knows this node, and that UDP passes from port {port} here to its endpoint",
            )
        age = sight.now - held.last_handshake
        when = f"{format_age(age)} ago" if age >= 0 else "before the clock was set back"
        if not held.keepalive:
            return PeerProblem(
                "idle",
                f"last handshake {when}; without keepalives there is one only when packets are sent",
                "ping it, or set mesh.persistent_keepalive",
            )
        return PeerProblem(
            "handshake_old",
            f"last handshake {when}: {held.endpoint} stopped answering",
            "check that the peer runs and that nothing on the way changed",
        )


def _obstacle_here(sight: Sight) -> PeerProblem | None:
    """What keeps this node from all of its peers."""
    observed, name = sight.observed, sight.interface
    if sight.target is None:
        return PeerProblem("no_private_key", "this node lost its private key and agrees on a new one", STATUS)
    if observed is None or observed.link is None:
        return PeerProblem("interface_missing", f"the interface {name} is missing", STATUS)
    if observed.device is None:
        return PeerProblem("interface_missing", f"no WireGuard answers for the interface {name}", STATUS)
    if not observed.link.up:
        return PeerProblem("interface_down", f"the interface {name} is down", STATUS)
    return None


def _no_endpoint(candidates: Candidates, resolved: Mapping[str, Endpoint], port: int) -> PeerProblem:
    text = candidates.current
    if not text:
        return PeerProblem(
            "no_endpoint",
            "no endpoint of it is known: it has to reach this node first",
            f"see that it reports an endpoint, or that UDP port {port} of this node can be reached",
        )
    address = meaning(text, resolved)
    if address is None and _is_name(text):
        return PeerProblem("endpoint_unresolved", f"its endpoint {text} does not resolve", "check the name and the DNS")
    if address is None:
        return PeerProblem("endpoint_unusable", f"its endpoint {text!r} is not host:port", "correct it at the peer")
    return PeerProblem("endpoint_unusable", f"its endpoint {text} is not in use yet, or cannot be a peer's", STATUS)


class Paths:
    """Tells relayed paths from direct ones, as well as endpoints allow (docs/contract/mesh.md §8.6)."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._peers_at = Counter(endpoints)
        self._peers_behind = Counter(endpoint.packed for endpoint in self._peers_at.elements())

    def name(self, endpoint: Endpoint) -> str:
        is_relay_of_peer = endpoint.port == RELAY_PORT and self._peers_behind[endpoint.packed] > 1
        return "relay" if self._peers_at[endpoint] > 1 or is_relay_of_peer else "direct"


def _source(endpoint: Endpoint, candidates: Candidates, resolved: Mapping[str, Endpoint]) -> str:
    for source, text in reversed(candidates.offers):
        if text and meaning(text, resolved) == endpoint:
            return SOURCES[source]
    return ROAMED


def meaning(text: str, resolved: Mapping[str, Endpoint]) -> Endpoint | None:
    """Where an endpoint text leads, as far as that is known; `resolved` maps names to addresses."""
    try:
        parsed = parse_endpoint(text)
    except ValueError:
        return None
    return resolved.get(text) if isinstance(parsed, HostPort) else parsed


def _is_name(text: str) -> bool:
    try:
        return isinstance(parse_endpoint(text), HostPort)
    except ValueError:
        return False
