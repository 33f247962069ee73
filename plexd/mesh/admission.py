"""Who gets onto the interface, and what passes: the policies, laid over a target that has everybody.

Peers that no policy shows are left out with their routes (mesh contract, section 6.3). The firewall is part of the same
target, so that what is compared with the kernel belongs together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from plexd.mesh.desired import Desired, Peer, Policy
from plexd.mesh.firewall import Openings, Ruleset, ruleset
from plexd.mesh.policy import Local, Resolved, resolve
from plexd.mesh.sharing import differing
from plexd.mesh.target import Target, TargetPeer
from plexd.mesh.visibility import visible_peers

NOTHING = Resolved()


@dataclass(frozen=True, slots=True)
class Admitted:
    """`target` has those of `everybody` that `policies` show, and the firewall; `hidden` are the ids of the others.

    `peers` are the desired ones, whose addresses the rules mean.
    """

    everybody: Target
    peers: Mapping[str, Peer]
    policies: tuple[Policy, ...]
    openings: Openings
    target: Target
    resolved: Resolved = NOTHING
    hidden: frozenset[str] = frozenset()


def admit(before: Admitted | None, everybody: Target, desired: Desired, openings: Openings) -> Admitted:
    """`before`, what came out last, saves the work that nothing new asks for; the result is the same without."""
    if (
        before is not None
        and everybody is before.everybody
        and desired.policies is before.policies
        and desired.peers is before.peers
        and openings is before.openings
    ):
        return before
    admitted = Admitted(everybody, desired.peers, desired.policies, openings, everybody)
    if everybody.settings.policy is None:
        return admitted
    if before is not None and _judges_alike(before, admitted):
        kept = before.target.firewall
        return replace(
            admitted, target=_without(before.hidden, everybody, kept), resolved=before.resolved, hidden=before.hidden
        )
    return _judge(admitted)


def _judges_alike(before: Admitted, now: Admitted) -> bool:
    """Whether all that the policies look at is as it was: endpoints and keys of peers are not."""
    if (before.policies, before.openings) != (now.policies, now.openings):
        return False
    was, settings = before.everybody.settings, now.everybody.settings
    if (was.policy, was.node_id, was.mesh_ip) != (settings.policy, settings.node_id, settings.mesh_ip):
        return False
    touched = {*differing(before.peers, now.peers), *differing(before.everybody.peers, now.everybody.peers)}
    return all(
        _address(before.peers.get(peer_id)) == _address(now.peers.get(peer_id))
        and _prefixes(before.everybody.peers.get(peer_id)) == _prefixes(now.everybody.peers.get(peer_id))
        for peer_id in touched
    )


def _address(peer: Peer | None) -> bytes | None:
    return peer.mesh_ip if peer is not None else None


def _prefixes(peer: TargetPeer | None) -> frozenset[object] | None:
    return frozenset(peer.allowed_ips) if peer is not None else None


def _judge(admitted: Admitted) -> Admitted:
    everybody, settings = admitted.everybody, admitted.everybody.settings
    assert settings.policy is not None  # noqa: S101 - nothing is judged otherwise
    local = Local(settings.node_id, settings.mesh_ip)
    resolved = resolve(admitted.policies, local, admitted.peers)
    prefixes = {peer_id: peer.allowed_ips for peer_id, peer in everybody.peers.items()}
    visible = visible_peers(resolved.rules, local, prefixes, settings.policy.default)
    firewall = ruleset(
        settings.policy,
        resolved.rules,
        visible=(address for peer_id in visible if (address := admitted.peers[peer_id].mesh_ip)),
        openings=admitted.openings,
    )
    hidden = frozenset(everybody.peers.keys() - visible)
    return replace(admitted, target=_without(hidden, everybody, firewall), resolved=resolved, hidden=hidden)


def _without(hidden: frozenset[str], everybody: Target, firewall: Ruleset | None) -> Target:
    if not hidden:
        return replace(everybody, firewall=firewall)
    shut = {prefix for peer_id in hidden for prefix in everybody.peers[peer_id].allowed_ips}
    return replace(
        everybody,
        peers={peer_id: peer for peer_id, peer in everybody.peers.items() if peer_id not in hidden},
        routes=frozenset(route for route in everybody.routes if route.prefix not in shut),
        firewall=firewall,
    )
