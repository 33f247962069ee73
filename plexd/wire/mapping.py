"""From wire types to the values plexd works with: keys decoded, addresses parsed, what cannot be used left out.

Whatever is left out comes back as `Skipped`, for the log. One bad peer never costs another (docs/contract/mesh.md §4.1
and §4.2); a missing list is no empty list (docs/contract/wire.md §6.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from pydantic import SecretStr

from plexd.errors import WireError
from plexd.mesh import desired, events
from plexd.mesh.address import Prefix
from plexd.mesh.desired import Desired, EndpointSource, FullState, Rejection
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PublicKey
from plexd.wire import models
from plexd.wire.reading import Skipped
from plexd.wire.times import parse_time
from plexd.wire.values import decode_base64, is_bearer, parse_mesh_ip, path_segment
from plexd.wire.writing import dump

_NO_KEY = bytes(32)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MAX_KEY_BYTES = 253
_CONFIGS = ("bridge_config", "relay_config", "user_access_config", "ingress_config", "site_to_site_config")
# unspecified, loopback, link-local, multicast
_FORBIDDEN = tuple(
    Prefix.parse(text)
    for text in (
        "0.0.0.0/32", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "::/128", "::1/128", "fe80::/10", "ff00::/8"
    )
)  # fmt: skip
# only prefixes that start with one of these bytes need the comparison
_SUSPICIOUS = frozenset({0, 127, 169, *range(224, 240), 0xFE, 0xFF})


class OwnNode(NamedTuple):
    """Who we are, to tell our own entry and our own address from a peer's."""

    node_id: str
    mesh_ip: bytes
    public_key: PublicKey


class PeerRejected(Exception):
    """The peer cannot be used; the text says why and holds no key material."""


class Registered(NamedTuple):
    """What a registration gave; `signing_keys` is None until a state pull delivers a usable key."""

    node_id: str
    mesh_ip: bytes
    node_key: SecretStr
    signing_keys: desired.SigningKeys | None
    peers: tuple[desired.Peer, ...]
    rejected: tuple[Rejection, ...]


class MappedPeers(NamedTuple):
    peers: tuple[desired.Peer, ...]
    rejected: tuple[Rejection, ...]
    skipped: tuple[Skipped, ...]


def map_peer(wire: models.Peer, own: OwnNode) -> tuple[desired.Peer, tuple[Skipped, ...]]:
    """One peer on its own; PeerRejected when nothing of it is usable. The caller has left out the own entry."""
    if not wire.id:
        raise PeerRejected("id is missing")
    public_key = map_public_key(wire.public_key, own)
    psk = map_psk(wire.psk)
    skipped: list[Skipped] = []
    mesh_ip = b""
    claims: dict[Prefix, str] = {}
    if wire.mesh_ip:
        try:
            mesh_ip = parse_mesh_ip(wire.mesh_ip)
        except ValueError as exc:
            raise PeerRejected(f"mesh_ip {exc}") from None
        claims[Prefix.host(mesh_ip)] = "mesh_ip"
    for text in wire.allowed_ips:
        try:
            claims.setdefault(Prefix.parse(text), "allowed_ips")
        except ValueError:
            skipped.append(Skipped("allowed_ips", wire.id, f"{text!r} is not a prefix"))
    prefixes = []
    for prefix, member in claims.items():
        if reason := _objection(prefix, own):
            skipped.append(Skipped(member, wire.id, reason))
        else:
            prefixes.append(prefix)
    if not prefixes:
        raise PeerRejected("neither mesh_ip nor allowed_ips leave an address")
    return desired.Peer(wire.id, public_key, mesh_ip, wire.endpoint, tuple(prefixes), psk), tuple(skipped)


def map_public_key(text: str, own: OwnNode) -> PublicKey:
    """PeerRejected when it is no key, or none a peer can have."""
    try:
        key = PublicKey.parse(text)
    except ValueError as exc:
        raise PeerRejected(f"bad public key: {exc}") from None
    if key == _NO_KEY:
        raise PeerRejected("bad public key: all zero")
    if key == own.public_key:
        raise PeerRejected("public key is our own")
    return key


def map_psk(secret: SecretStr) -> PresharedKey:
    """Empty means none. PeerRejected when it is no key."""
    text = secret.get_secret_value()
    if not text:
        return NO_PRESHARED_KEY
    try:
        return PresharedKey.parse(text)
    except ValueError as exc:
        raise PeerRejected(f"bad preshared key: {exc}") from None


def _objection(prefix: Prefix, own: OwnNode) -> str:
    """Why a peer must not have this prefix; empty when it may."""
    if prefix.length == 0 or (
        prefix.packed[0] in _SUSPICIOUS
        and any(prefix.length >= bad.length and bad.contains(prefix.packed) for bad in _FORBIDDEN)
    ):
        return f"{prefix} is not a prefix for a peer"
    if prefix.packed == own.mesh_ip and prefix.is_host:
        return f"{prefix} is our own mesh address"
    return ""


def map_peers(wires: Iterable[models.Peer], faults: Iterable[Skipped], own: OwnNode, path: str) -> MappedPeers:
    """A list of peers: the last of equal ids and the first of equal keys count.

    `faults` are those met when the list at `path` was read: a peer that could not even be read is rejected by its id.
    """
    latest: dict[str, models.Peer] = {}
    nameless = 0
    for wire in wires:
        if not wire.id:
            nameless += 1
            continue
        latest.pop(wire.id, None)  # the last one also decides the place in the order
        latest[wire.id] = wire
    latest.pop(own.node_id, None)
    peers: list[desired.Peer] = []
    rejected: dict[str, Rejection] = {}
    skipped: list[Skipped] = [Skipped(path, "", "id is missing")] * nameless
    owners: dict[PublicKey, str] = {}
    for wire in latest.values():
        try:
            peer, dropped = map_peer(wire, own)
        except PeerRejected as exc:
            rejected[wire.id] = Rejection(wire.id, str(exc))
            continue
        holder = owners.setdefault(peer.public_key, peer.id)
        if holder == peer.id:
            peers.append(peer)
            skipped += dropped
        else:
            rejected[peer.id] = Rejection(peer.id, f"has the public key of peer {holder}")
    for fault in faults:
        is_peer = _index_in(path, fault) is not None
        if is_peer and fault.id and fault.id != own.node_id and fault.id not in latest:
            rejected[fault.id] = Rejection(fault.id, fault.reason)
    return MappedPeers(tuple(peers), tuple(rejected.values()), tuple(skipped))


def map_state(
    wire: models.StateResponse, faults: tuple[Skipped, ...], *, own: OwnNode, held: Desired, now: float
) -> tuple[FullState, tuple[Skipped, ...]]:
    """A state pull as read, with the faults met when reading it. `now` is Unix time.

    `held` is what we have: an entry of data or a secret reference that arrived damaged stays as it is there.
    """
    skipped = list(faults)
    peers = policies = signing_keys = None
    rejected: tuple[Rejection, ...] = ()
    if "peers" in wire.model_fields_set:
        peers, rejected, dropped = map_peers(wire.peers, faults, own, "peers")
        skipped += dropped
    else:
        skipped.append(Skipped("peers", "", "is missing, the peers stay as they are"))
    if "policies" in wire.model_fields_set:
        policies = _map_policies(wire.policies, faults, held.policies)
    else:
        skipped.append(Skipped("policies", "", "is missing, the policies stay as they are"))
    if wire.signing_keys is not None:
        try:
            signing_keys, dropped = map_signing_keys(wire.signing_keys, now)
            skipped += dropped
        except WireError as exc:
            skipped.append(Skipped("signing_keys", "", str(exc)))
    data, dropped = map_data(wire.data)
    skipped += dropped
    secret_refs, dropped = map_secret_refs(wire.secret_refs)
    skipped += dropped
    for fault in faults:
        if _index_in("data", fault) is not None and fault.id in held.data:
            data.setdefault(fault.id, held.data[fault.id])
        elif _index_in("secret_refs", fault) is not None and fault.id in held.secret_refs:
            secret_refs.setdefault(fault.id, held.secret_refs[fault.id])
    configs = {name: dump(config).decode() for name in _CONFIGS if (config := getattr(wire, name)) is not None}
    state = FullState(peers, rejected, policies, signing_keys, wire.metadata, data, secret_refs, configs)
    return state, tuple(skipped)


def _map_policies(
    wires: Iterable[models.Policy], faults: Iterable[Skipped], held: tuple[desired.Policy, ...]
) -> tuple[desired.Policy, ...]:
    """In order; of equal ids the last counts. In the place of a damaged policy stands the one we hold."""
    policies = [
        desired.Policy(w.id, tuple(desired.PolicyRule(r.src, r.dst, r.port, r.protocol, r.action) for r in w.rules))
        for w in wires
    ]
    by_id = {policy.id: policy for policy in held}
    damaged = {index: fault.id for fault in faults if (index := _index_in("policies", fault)) is not None}
    absent = 0
    for index, policy_id in sorted(damaged.items()):
        if policy_id in by_id:
            policies.insert(index - absent, by_id[policy_id])
        else:
            absent += 1  # it had a place in the list as it was sent, and has none here
    latest: dict[str, desired.Policy] = {}
    for policy in policies:
        latest.pop(policy.id, None)
        latest[policy.id] = policy
    return tuple(latest.values())


def _index_in(path: str, fault: Skipped) -> int | None:
    """The place of a whole element in the list at `path`, None when the fault is somewhere else or further in."""
    match = re.fullmatch(rf"{re.escape(path)}\[(\d+)\]", fault.path)
    return int(match[1]) if match else None


def map_signing_keys(wire: models.SigningKeys, now: float) -> tuple[desired.SigningKeys, tuple[Skipped, ...]]:
    """WireError when `current` is no key, then the set is void; a bad or expired `previous` is only left out."""
    try:
        current = decode_base64(wire.current, 32)
    except ValueError as exc:
        raise WireError(f"current signing key {exc}") from None
    keys = desired.SigningKeys(current)
    if not wire.previous:
        return keys, ()
    try:
        previous = decode_base64(wire.previous, 32)
    except ValueError as exc:
        return keys, (Skipped("signing_keys.previous", "", str(exc)),)
    try:
        until = parse_time(wire.transition_expires)
    except ValueError as exc:
        return keys, (Skipped("signing_keys.transition_expires", "", str(exc)),)
    if previous == current or until is None or until <= now:
        return keys, ()
    return desired.SigningKeys(current, previous, until), ()


def map_data(wires: Iterable[models.DataEntry]) -> tuple[dict[str, desired.DataEntry], tuple[Skipped, ...]]:
    entries: dict[str, desired.DataEntry] = {}
    skipped: list[Skipped] = []
    for w in wires:
        if reason := bad_key(w.key):
            skipped.append(Skipped("data", w.key, reason))
        else:
            entries[w.key] = desired.DataEntry(w.key, w.content_type, w.payload, w.version, w.updated_at)
    return entries, tuple(skipped)


def map_secret_refs(wires: Iterable[models.SecretRef]) -> tuple[dict[str, int], tuple[Skipped, ...]]:
    references: dict[str, int] = {}
    skipped: list[Skipped] = []
    for wire in wires:
        if reason := bad_key(wire.key):
            skipped.append(Skipped("secret_refs", wire.key, reason))
        else:
            references[wire.key] = wire.version
    return references, tuple(skipped)


def bad_key(key: str) -> str:
    """Why an entry cannot have this key (docs/contract/node-api.md §3); empty when it can."""
    if not key:
        return "key is empty"
    if len(key.encode()) > _MAX_KEY_BYTES:
        return f"key is longer than {_MAX_KEY_BYTES} bytes"
    return "key has control characters" if _CONTROL.search(key) else ""


def map_endpoints(wire: models.EndpointResponse, own: OwnNode) -> tuple[events.EndpointOffered, ...]:
    """The answer to an endpoint report; an empty endpoint says nothing."""
    return tuple(
        events.EndpointOffered(offer.peer_id, offer.endpoint, EndpointSource.REPORT)
        for offer in wire.peer_endpoints
        if offer.endpoint and offer.peer_id not in {"", own.node_id}
    )


def map_registration(
    wire: models.RegisterResponse, faults: tuple[Skipped, ...], public_key: PublicKey
) -> tuple[Registered, tuple[Skipped, ...]]:
    """WireError names the member that makes the registration unusable. `public_key` is the one registered."""
    try:
        path_segment(wire.node_id)
    except ValueError as exc:
        raise WireError(f"node_id in the answer {exc}") from None
    try:
        mesh_ip = parse_mesh_ip(wire.mesh_ip)
    except ValueError as exc:
        raise WireError(f"mesh_ip in the answer {exc}") from None
    node_key = wire.node_secret_key.get_secret_value()
    if not is_bearer(node_key):
        raise WireError("node_secret_key in the answer is empty or cannot stand in a header")
    skipped = list(faults)
    try:
        decode_base64(node_key, 32)
    except ValueError as exc:
        skipped.append(Skipped("node_secret_key", "", f"{exc}, secrets are unavailable"))
    signing_keys = None
    try:
        signing_keys = desired.SigningKeys(decode_base64(wire.signing_public_key, 32))
    except ValueError as exc:
        skipped.append(Skipped("signing_public_key", "", f"{exc}, events are refused until a state pull brings one"))
    own = OwnNode(wire.node_id, mesh_ip, public_key)
    peers, rejected, dropped = map_peers(wire.peers, faults, own, "peers")
    skipped += dropped
    return Registered(wire.node_id, mesh_ip, wire.node_secret_key, signing_keys, peers, rejected), tuple(skipped)
