"""What the payload of a verified event says, and what a bad one asks for (docs/contract/events.md §7).

An event is taken as a whole or not at all: a fault that costs a state pull one list element costs an event everything,
and the pull that follows settles it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from pydantic import SecretStr

from plexd.errors import WireError
from plexd.mesh.address import Prefix, parse_endpoint
from plexd.mesh.desired import EndpointSource, Peer
from plexd.mesh.events import (
    AboutSelf,
    ActionRequested,
    EndpointOffered,
    FeatureOff,
    NodeEvent,
    NodeStateUpdated,
    PeerAdded,
    PeerKeyRotated,
    PeerRemoved,
    ReconcileRequested,
    RotationRequested,
    SecretRefsUpdated,
    SessionRevoked,
    SigningKeyReplaced,
    SigningKeysRotated,
    SSHSessionRequested,
    UnknownEvent,
)
from plexd.wire import mapping, models
from plexd.wire.durations import parse_duration
from plexd.wire.mapping import OwnNode, PeerRejected
from plexd.wire.models import Items, Model, OptionalTime, StringMap
from plexd.wire.reading import ModelT, Skipped, read
from plexd.wire.times import parse_time
from plexd.wire.values import decode_base64, parse_mesh_ip

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_MAX_ACTION_LENGTH = 128
_DEFAULT_TRANSITION = 24 * 3600.0


class EventEffect(StrEnum):
    """What a payload that cannot be used leads to; nothing changes in either case."""

    RECONCILE = "reconcile"
    DROP = "drop"


class PeerNamed(Model):
    """The peer id has two names; `id` is the stronger one."""

    id: str = ""
    peer_id: str = ""


class AddedPeer(models.Peer):
    peer_id: str = ""


class RotatedPeer(PeerNamed):
    """None and the zero values: not given. Only an empty PSK says something, namely that there is none."""

    public_key: str = ""
    new_public_key: str = ""
    psk: SecretStr | None = None
    new_psk: SecretStr | None = None
    mesh_ip: str = ""
    endpoint: str = ""
    allowed_ips: Items[str] = ()


class MovedPeer(PeerNamed):
    endpoint: str = ""


class RotatedSigningKey(models.SigningKeys):
    """Both forms of signing_key_rotated."""

    new_signing_public_key: str = ""
    valid_from: OptionalTime = ""
    transition_period: str = ""


class SessionNamed(Model):
    session_id: str = ""


class RevokedSession(SessionNamed):
    revoked_at: OptionalTime = ""


class UpdatedNodeState(Model):
    metadata: StringMap | None = None
    data: Items[models.DataEntry] | None = None


class UpdatedSecretRefs(Model):
    secret_refs: Items[models.SecretRef] | None = None


def parse_event(event_type: str, payload: str, *, own: OwnNode, now: float) -> NodeEvent:
    """What the event means to this node. `payload` is JSON text, `now` Unix time. WireError: see `reaction_to_bad`."""
    kind = _KINDS.get(event_type)
    return UnknownEvent() if kind is None else kind.parse(payload, own, now)


def reaction_to_bad(event_type: str) -> EventEffect:
    """What to do after `parse_event` raised for this type."""
    kind = _KINDS.get(event_type)
    return EventEffect.DROP if kind is None else kind.reaction_to_bad


def _read(model: type[ModelT], payload: str) -> ModelT:
    value, skipped = read(model, payload)
    _refuse(skipped)
    return value


def _refuse(skipped: tuple[Skipped, ...]) -> None:
    if skipped:
        raise WireError(f"{skipped[0].path} {skipped[0].reason}")


def _peer_id(named: PeerNamed) -> str:
    peer_id = named.id or named.peer_id
    if not peer_id:
        raise WireError("peer id is missing")
    return peer_id


def _peer_added(payload: str, own: OwnNode, _now: float) -> NodeEvent:
    wire = _read(AddedPeer, payload)
    if not wire.id:
        wire = wire.model_copy(update={"id": wire.peer_id})
    if wire.id == own.node_id:
        return AboutSelf()
    return PeerAdded(_map_peer(wire, own))


def _map_peer(wire: models.Peer, own: OwnNode) -> Peer:
    _check_prefixes(wire.allowed_ips)
    _check_endpoint(wire.endpoint)
    try:
        peer, _ = mapping.map_peer(wire, own)
    except PeerRejected as exc:
        raise WireError(str(exc)) from None
    return peer


def _check_prefixes(texts: tuple[str, ...]) -> None:
    for text in texts:
        try:
            Prefix.parse(text)
        except ValueError:
            raise WireError("allowed_ips has an entry that is not a prefix") from None


def _check_endpoint(text: str) -> None:
    try:
        if text:
            parse_endpoint(text)
    except ValueError as exc:
        raise WireError(f"endpoint is not host:port: {exc}") from None


def _peer_removed(payload: str, own: OwnNode, _now: float) -> NodeEvent:
    peer_id = _peer_id(_read(PeerNamed, payload))
    return AboutSelf() if peer_id == own.node_id else PeerRemoved(peer_id)


def _peer_key_rotated(payload: str, own: OwnNode, _now: float) -> NodeEvent:
    wire = _read(RotatedPeer, payload)
    peer_id = _peer_id(wire)
    if peer_id == own.node_id:
        return AboutSelf()
    secret = wire.psk if wire.psk is not None else wire.new_psk
    try:
        public_key = mapping.map_public_key(wire.public_key or wire.new_public_key, own)
        psk = None if secret is None else mapping.map_psk(secret)
    except PeerRejected as exc:
        raise WireError(str(exc)) from None
    try:
        mesh_ip = parse_mesh_ip(wire.mesh_ip) if wire.mesh_ip else None
    except ValueError as exc:
        raise WireError(f"mesh_ip {exc}") from None
    _check_prefixes(wire.allowed_ips)
    _check_endpoint(wire.endpoint)
    peer = None
    if mesh_ip is not None or wire.allowed_ips:
        # through a whole peer, so that the prefixes get the same treatment as everywhere
        peer = _map_peer(
            models.Peer(
                id=peer_id,
                public_key=str(public_key),
                mesh_ip=wire.mesh_ip,
                endpoint=wire.endpoint,
                allowed_ips=wire.allowed_ips,
                psk=secret or models.NO_SECRET,
            ),
            own,
        )
    return PeerKeyRotated(
        peer_id,
        public_key,
        psk=psk,
        mesh_ip=mesh_ip,
        endpoint=wire.endpoint or None,
        allowed_ips=peer.allowed_ips if peer is not None and wire.allowed_ips else None,
        complete=peer if mesh_ip is not None else None,
    )


def _peer_endpoint_changed(payload: str, own: OwnNode, _now: float) -> NodeEvent:
    wire = _read(MovedPeer, payload)
    peer_id = _peer_id(wire)
    if not wire.endpoint:
        raise WireError("endpoint is missing")
    _check_endpoint(wire.endpoint)
    return AboutSelf() if peer_id == own.node_id else EndpointOffered(peer_id, wire.endpoint, EndpointSource.EVENT)


def _signing_key_rotated(payload: str, _own: OwnNode, now: float) -> NodeEvent:
    wire = _read(RotatedSigningKey, payload)
    if wire.current:
        keys, _ = mapping.map_signing_keys(wire, now)
        return SigningKeysRotated(keys)
    try:
        current = decode_base64(wire.new_signing_public_key, 32)
    except ValueError as exc:
        raise WireError(f"new signing key {exc}") from None
    try:
        period = parse_duration(wire.transition_period) if wire.transition_period else _DEFAULT_TRANSITION
    except ValueError as exc:
        raise WireError(f"transition_period {exc}") from None
    start = parse_time(wire.valid_from)
    return SigningKeyReplaced(current, (now if start is None else start) + period)


def _node_state_updated(payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    wire = _read(UpdatedNodeState, payload)
    if wire.metadata is None and wire.data is None:
        return ReconcileRequested()
    if wire.data is None:
        return NodeStateUpdated(wire.metadata, None)
    data, skipped = mapping.map_data(wire.data)
    _refuse(skipped)
    return NodeStateUpdated(wire.metadata, data)


def _node_secrets_updated(payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    wire = _read(UpdatedSecretRefs, payload)
    if wire.secret_refs is None:
        return ReconcileRequested()
    references, skipped = mapping.map_secret_refs(wire.secret_refs)
    _refuse(skipped)
    return SecretRefsUpdated(references)


def _action_request(payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    wire = _read(models.ActionRequest, payload)
    if _ID.fullmatch(wire.execution_id) is None:
        raise WireError("execution_id is missing or not valid")
    if not 1 <= len(wire.action) <= _MAX_ACTION_LENGTH:
        raise WireError("action is missing or too long")
    return ActionRequested(wire.execution_id, wire.action)


def _ssh_session_setup(payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    return SSHSessionRequested(_session_id(_read(SessionNamed, payload)))


def _session_revoked(payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    wire = _read(RevokedSession, payload)
    return SessionRevoked(_session_id(wire), parse_time(wire.revoked_at) or 0.0)


def _session_id(wire: SessionNamed) -> str:
    if _ID.fullmatch(wire.session_id) is None:
        raise WireError("session_id is missing or not valid")
    return wire.session_id


def _reconcile(_payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    return ReconcileRequested()


def _rotate_keys(_payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    return RotationRequested()


def _bridge(_payload: str, _own: OwnNode, _now: float) -> NodeEvent:
    return FeatureOff()


class _Kind(NamedTuple):
    parse: Callable[[str, OwnNode, float], NodeEvent]
    reaction_to_bad: EventEffect


_KINDS = {
    "peer_added": _Kind(_peer_added, EventEffect.RECONCILE),
    "peer_removed": _Kind(_peer_removed, EventEffect.RECONCILE),
    "peer_key_rotated": _Kind(_peer_key_rotated, EventEffect.RECONCILE),
    "peer_endpoint_changed": _Kind(_peer_endpoint_changed, EventEffect.RECONCILE),
    "policy_updated": _Kind(_reconcile, EventEffect.DROP),
    "action_request": _Kind(_action_request, EventEffect.DROP),
    "session_revoked": _Kind(_session_revoked, EventEffect.DROP),
    "ssh_session_setup": _Kind(_ssh_session_setup, EventEffect.DROP),
    "rotate_keys": _Kind(_rotate_keys, EventEffect.DROP),
    "signing_key_rotated": _Kind(_signing_key_rotated, EventEffect.RECONCILE),
    "node_state_updated": _Kind(_node_state_updated, EventEffect.RECONCILE),
    "node_secrets_updated": _Kind(_node_secrets_updated, EventEffect.RECONCILE),
    "bridge_config_updated": _Kind(_bridge, EventEffect.DROP),
    "relay_session_assigned": _Kind(_bridge, EventEffect.RECONCILE),
    "relay_session_revoked": _Kind(_bridge, EventEffect.RECONCILE),
    "user_access_config_updated": _Kind(_bridge, EventEffect.DROP),
    "user_access_peer_assigned": _Kind(_bridge, EventEffect.RECONCILE),
    "user_access_peer_revoked": _Kind(_bridge, EventEffect.RECONCILE),
    "ingress_config_updated": _Kind(_bridge, EventEffect.DROP),
    "ingress_rule_assigned": _Kind(_bridge, EventEffect.RECONCILE),
    "ingress_rule_revoked": _Kind(_bridge, EventEffect.RECONCILE),
    "site_to_site_config_updated": _Kind(_bridge, EventEffect.DROP),
    "site_to_site_tunnel_assigned": _Kind(_bridge, EventEffect.RECONCILE),
    "site_to_site_tunnel_revoked": _Kind(_bridge, EventEffect.RECONCILE),
}

EVENT_TYPES = tuple(_KINDS)
