"""How the desired snapshot changes: a full state replaces it, an event is folded in. Repeating either changes nothing.

Every function returns the snapshot it was given when nothing changed, so `is` tells whether there is work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from types import MappingProxyType

from plexd.mesh.address import Prefix
from plexd.mesh.desired import NO_CANDIDATES, Candidates, Desired, EndpointSource, FullState, Peer, SigningKeys
from plexd.mesh.events import (
    EndpointOffered,
    Foldable,
    NodeStateUpdated,
    PeerAdded,
    PeerKeyRotated,
    PeerRemoved,
    SecretRefsUpdated,
    SigningKeyReplaced,
    SigningKeysRotated,
)
from plexd.mesh.sharing import Shared, with_changes

_public_key = attrgetter("public_key")


class Unfoldable(Exception):
    """The event cannot be folded in; nothing was changed and a state pull is due. The text says why."""


class NotHereYet(Unfoldable):
    """Nor is the peer that it is about, as when it came before the state that has it."""


def replace_state(desired: Desired, state: FullState) -> Desired:
    """Take over a state pull. Categories without a statement stay; endpoint candidates of other sources stay."""
    changed: dict[str, object] = {}
    if state.peers is not None:
        # a peer that did not change stays the very same value: pointers are soon compared
        peers = {peer.id: _same(desired.peers.get(peer.id), peer) for peer in state.peers}
        # order counts (the first claimant of a prefix wins), and mappings compare without it
        if list(desired.peers.items()) != list(peers.items()):
            changed["peers"] = Shared(peers)
        candidates = {
            peer.id: desired.candidates.get(peer.id, NO_CANDIDATES).offer(EndpointSource.PEER, peer.endpoint)
            for peer in state.peers
        }
        if desired.candidates != candidates:
            changed["candidates"] = Shared(candidates)
        if desired.rejected != state.rejected:
            changed["rejected"] = state.rejected
    if state.policies is not None and desired.policies != state.policies:
        changed["policies"] = state.policies
    if state.signing_keys is not None and desired.signing_keys != state.signing_keys:
        changed["signing_keys"] = state.signing_keys
    for name in ("metadata", "data", "secret_refs", "configs"):
        new: Mapping[str, object] = getattr(state, name)
        if getattr(desired, name) != new:
            changed[name] = MappingProxyType(dict(new))
    return replace(desired, **changed) if changed else desired  # type: ignore[arg-type]


def fold(desired: Desired, event: Foldable) -> Desired:
    """Fold one verified event in. Raises Unfoldable when only a state pull can tell what it means."""
    match event:
        case PeerAdded(peer):
            return _put_peer(desired, peer)
        case PeerRemoved(peer_id):
            return _remove_peer(desired, peer_id)
        case PeerKeyRotated():
            return _rotate_key(desired, event)
        case EndpointOffered(peer_id, endpoint, source):
            return _offer_endpoint(desired, peer_id, endpoint, source)
        case SigningKeysRotated(keys):
            return desired if desired.signing_keys == keys else replace(desired, signing_keys=keys)
        case SigningKeyReplaced():
            return _replace_signing_key(desired, event)
        case NodeStateUpdated():
            return _update_node_state(desired, event)
        case SecretRefsUpdated(secret_refs):
            if desired.secret_refs == secret_refs:
                return desired
            return replace(desired, secret_refs=MappingProxyType(dict(secret_refs)))


def expire_signing_key(desired: Desired, now: float) -> Desired:
    """Drop the previous signing key once its time is over; `now` in Unix seconds."""
    keys = desired.signing_keys
    if keys is None or keys.previous is None or now < keys.previous_until:
        return desired
    return replace(desired, signing_keys=SigningKeys(keys.current))


def _same(known: Peer | None, peer: Peer) -> Peer:
    return known if known is not None and known == peer else peer


def _put_peer(desired: Desired, peer: Peer) -> Desired:
    known = desired.candidates.get(peer.id, NO_CANDIDATES)
    candidates = known.offer(EndpointSource.PEER, peer.endpoint)
    if peer.public_key in map(_public_key, desired.peers.values()):
        holders = [other.id for other in desired.peers.values() if other.public_key == peer.public_key]
        if holders != [peer.id]:
            raise Unfoldable(f"peer {peer.id} has the public key of peer {holders[0]}")
    if desired.peers.get(peer.id) == peer and candidates == known:
        return desired
    return replace(
        desired,
        peers=with_changes(desired.peers, {peer.id: peer}),
        candidates=_with_candidates(desired, peer.id, candidates),
        rejected=tuple(r for r in desired.rejected if r.peer_id != peer.id),
    )


def _remove_peer(desired: Desired, peer_id: str) -> Desired:
    if peer_id not in desired.peers and peer_id not in desired.candidates:
        return desired
    return replace(
        desired,
        peers=with_changes(desired.peers, {}, gone=[peer_id]),
        candidates=with_changes(desired.candidates, {}, gone=[peer_id]),
    )


def _rotate_key(desired: Desired, event: PeerKeyRotated) -> Desired:
    known = desired.peers.get(event.peer_id)
    if known is None:
        if event.complete is None:
            raise NotHereYet(f"peer {event.peer_id} is not known and the event does not describe it")
        return _put_peer(desired, event.complete)
    return _put_peer(
        desired,
        known._replace(
            public_key=event.public_key,
            psk=known.psk if event.psk is None else event.psk,
            mesh_ip=known.mesh_ip if event.mesh_ip is None else event.mesh_ip,
            endpoint=known.endpoint if event.endpoint is None else event.endpoint,
            allowed_ips=_rotated_prefixes(known, event),
        ),
    )


def _rotated_prefixes(known: Peer, event: PeerKeyRotated) -> tuple[Prefix, ...]:
    """The mesh address counts among the prefixes: a new one displaces the old, and a new list does not lose it."""
    held = Prefix.host(known.mesh_ip)
    if event.mesh_ip is not None and event.allowed_ips is None:
        new = Prefix.host(event.mesh_ip)
        return (new, *(prefix for prefix in known.allowed_ips if prefix not in {held, new}))
    if event.allowed_ips is None:
        return known.allowed_ips
    if event.mesh_ip is None and held in known.allowed_ips and held not in event.allowed_ips:
        return (held, *event.allowed_ips)
    return event.allowed_ips


def _offer_endpoint(desired: Desired, peer_id: str, endpoint: str, source: EndpointSource) -> Desired:
    if peer_id not in desired.peers:
        if source is EndpointSource.REPORT:
            return desired  # the answer to a report may name peers that have not reached us yet
        raise NotHereYet(f"peer {peer_id} is not known")
    known = desired.candidates.get(peer_id, NO_CANDIDATES)
    if not endpoint and source is EndpointSource.REPORT:
        return desired
    candidates = known.offer(source, endpoint)
    if candidates is known:
        return desired
    return replace(desired, candidates=_with_candidates(desired, peer_id, candidates))


def _with_candidates(desired: Desired, peer_id: str, candidates: Candidates) -> Mapping[str, Candidates]:
    if desired.candidates.get(peer_id) == candidates:
        return desired.candidates
    return with_changes(desired.candidates, {peer_id: candidates})


def _replace_signing_key(desired: Desired, event: SigningKeyReplaced) -> Desired:
    keys = desired.signing_keys
    if keys is not None and keys.current == event.current:
        return desired  # a repetition must not make the new key its own predecessor
    previous = keys.current if keys is not None else None
    return replace(
        desired, signing_keys=SigningKeys(event.current, previous, event.previous_until if previous else 0.0)
    )


def _update_node_state(desired: Desired, event: NodeStateUpdated) -> Desired:
    changed: dict[str, Mapping[str, object]] = {}
    if event.metadata is not None and event.metadata != desired.metadata:
        changed["metadata"] = MappingProxyType(dict(event.metadata))
    if event.data is not None:
        # replayed events may be older than what a pull brought: an entry never goes back in version by an event
        data = {
            key: known if (known := desired.data.get(key)) is not None and known.version > entry.version else entry
            for key, entry in event.data.items()
        }
        if data != desired.data:
            changed["data"] = MappingProxyType(data)
    return replace(desired, **changed) if changed else desired  # type: ignore[arg-type]
