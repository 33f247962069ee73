"""Applies the policies to a target that has every peer: which peers the interface gets, and which ruleset.

Peers that no policy shows are left out with their routes (docs/contract/mesh.md §6.3). The ruleset is part of the
target, so that interface and ruleset belong to the same policies. While the policies stay the same, a peer that comes
or goes is judged alone: judging ten thousand peers again takes a hundred times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from operator import attrgetter

from plexd.mesh.address import Prefix
from plexd.mesh.desired import Desired, Peer, Policy
from plexd.mesh.firewall import PeerChange, Ruleset, ruleset, with_peers
from plexd.mesh.policy import Local, Resolved, resolve
from plexd.mesh.sharing import Shared, differing, with_changes
from plexd.mesh.target import Target, TargetPeer, route_to
from plexd.mesh.temporary_allows import TemporaryAllows
from plexd.mesh.visibility import Visibility

NOTHING = Resolved()
AMENDED_AT_ONCE = 256  # peers; more take as long as judging all peers


@dataclass(frozen=True, slots=True)
class Admitted:
    """`target` has the peers of `everybody` that `policies` show, and the ruleset; `hidden` are the other peer ids.

    `peers` are the desired peers, whose addresses the rules refer to. `visibility` decides which peers the rules show.
    """

    everybody: Target
    peers: Mapping[str, Peer]
    policies: tuple[Policy, ...]
    temporary_allows: TemporaryAllows
    target: Target
    resolved: Resolved = NOTHING
    hidden: frozenset[str] = frozenset()
    visibility: Visibility | None = field(default=None, compare=False, repr=False)


def amend(
    before: Admitted | None, everybody: Target, desired: Desired, temporary_allows: TemporaryAllows
) -> Admitted | None:
    """The result of `judge`, worked out from `before` where little has changed since; None where that cannot be done.

    A peer that did not change, and whose routes did not change, keeps its part of the target.
    """
    if before is not None and _is_same(before, everybody, desired, temporary_allows):
        return before
    policy = everybody.settings.policy
    if policy is None:
        return judge(everybody, desired, temporary_allows)
    now = Admitted(everybody, desired.peers, desired.policies, temporary_allows, everybody)
    if before is None or before.visibility is None or not _judges_alike(before, now):
        return None
    touched = {*differing(before.peers, now.peers), *differing(before.everybody.peers, everybody.peers)}
    if len(touched) > AMENDED_AT_ONCE:
        return None
    if any(_address(before.peers, i) != _address(now.peers, i) for i in before.resolved.named & touched):
        return None
    hidden = before.hidden - touched | {
        peer_id
        for peer_id in touched & everybody.peers.keys()
        if not before.visibility.shows(peer_id, everybody.peers[peer_id].allowed_ips)
    }
    was_visible = (touched & before.everybody.peers.keys()) - before.hidden
    is_visible = (touched & everybody.peers.keys()) - hidden
    was, come = _visible_addresses(was_visible, before.peers), _visible_addresses(is_visible, now.peers)
    gone = was - come
    if gone and not gone.isdisjoint(map(attrgetter("mesh_ip"), now.peers.values())):
        return None  # another peer has the same address
    had = _other_prefixes(was_visible, before.everybody, before.peers)
    have = _other_prefixes(is_visible, everybody, now.peers)
    assert before.target.firewall is not None  # noqa: S101 - it was judged
    firewall = with_peers(before.target.firewall, policy, PeerChange(gone, had - have), PeerChange(come, have - had))
    if firewall is None:
        return None
    target = _amend_target(before, everybody, hidden, touched, firewall)
    if target is None:
        return None
    return replace(
        now,
        target=target,
        resolved=before.resolved,
        hidden=hidden,
        visibility=before.visibility,
    )


def judge(everybody: Target, desired: Desired, temporary_allows: TemporaryAllows) -> Admitted:
    """Judge every peer."""
    admitted = Admitted(everybody, desired.peers, desired.policies, temporary_allows, everybody)
    settings = everybody.settings
    if settings.policy is None:
        return admitted
    local = Local(settings.node_id, settings.mesh_ip)
    resolved = resolve(admitted.policies, local, admitted.peers)
    visibility = Visibility(resolved.rules, local, settings.policy.default)
    visible = visibility.among({peer_id: peer.allowed_ips for peer_id, peer in everybody.peers.items()})
    hidden = frozenset(everybody.peers.keys() - visible)
    firewall = ruleset(
        settings.policy,
        resolved.rules,
        visible=_visible_addresses(visible, admitted.peers),
        prefixes=_other_prefixes(visible, everybody, admitted.peers),
        temporary_allows=temporary_allows,
    )
    target = _without(hidden, everybody, firewall)
    return replace(admitted, target=target, resolved=resolved, hidden=hidden, visibility=visibility)


def _is_same(before: Admitted, everybody: Target, desired: Desired, temporary_allows: TemporaryAllows) -> bool:
    return (
        everybody is before.everybody
        and desired.policies is before.policies
        and desired.peers is before.peers
        and temporary_allows is before.temporary_allows
    )


def _judges_alike(before: Admitted, now: Admitted) -> bool:
    """Whether everything that peers are judged by is the same, apart from their own addresses."""
    if (before.policies, before.temporary_allows) != (now.policies, now.temporary_allows):
        return False
    was, settings = before.everybody.settings, now.everybody.settings
    return (was.policy, was.node_id, was.mesh_ip) == (settings.policy, settings.node_id, settings.mesh_ip)


def _address(peers: Mapping[str, Peer], peer_id: str) -> bytes | None:
    peer = peers.get(peer_id)
    return peer.mesh_ip if peer is not None else None


def _visible_addresses(peer_ids: Iterable[str], peers: Mapping[str, Peer]) -> set[bytes]:
    return {address for peer_id in peer_ids if (address := peers[peer_id].mesh_ip)}


def _other_prefixes(peer_ids: Iterable[str], everybody: Target, peers: Mapping[str, Peer]) -> set[Prefix]:
    """The prefixes of these peers apart from their mesh addresses."""
    return {
        prefix
        for peer_id in peer_ids
        for prefix in everybody.peers[peer_id].allowed_ips
        if not (prefix.is_host and prefix.packed == peers[peer_id].mesh_ip)
    }


def _amend_target(
    before: Admitted, everybody: Target, hidden: frozenset[str], touched: AbstractSet[str], firewall: Ruleset
) -> Target | None:
    """The result of `_without(hidden, …)`, worked out from `before`; None where routes of other peers changed too."""
    if not hidden:
        return replace(everybody, firewall=firewall)
    was = before.everybody
    prefixes = _prefixes(was.peers, touched) | _prefixes(everybody.peers, touched)
    possible = {route_to(prefix, everybody.settings) for prefix in prefixes}
    if everybody.routes is not was.routes and not everybody.routes ^ was.routes <= possible:
        return None  # an endpoint entered or left the prefix of another peer
    visible = {peer_id: peer for peer_id in touched - hidden if (peer := everybody.peers.get(peer_id)) is not None}
    peers = with_changes(before.target.peers, visible, gone=touched - visible.keys())
    wanted = {route_to(prefix, everybody.settings) for prefix in _prefixes(everybody.peers, touched - hidden)}
    routes = before.target.routes - possible | (wanted & everybody.routes)
    return replace(everybody, peers=peers, routes=routes, firewall=firewall)


def _prefixes(peers: Mapping[str, TargetPeer], peer_ids: AbstractSet[str]) -> set[Prefix]:
    return {prefix for peer_id in peer_ids if peer_id in peers for prefix in peers[peer_id].allowed_ips}


def _without(hidden: frozenset[str], everybody: Target, firewall: Ruleset | None) -> Target:
    if not hidden:
        return replace(everybody, firewall=firewall)
    shut = {prefix for peer_id in hidden for prefix in everybody.peers[peer_id].allowed_ips}
    return replace(
        everybody,
        peers=Shared({peer_id: peer for peer_id, peer in everybody.peers.items() if peer_id not in hidden}),
        routes=frozenset(route for route in everybody.routes if route.prefix not in shut),
        firewall=firewall,
    )
