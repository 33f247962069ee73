"""What a verified event says, as values; `wire/payloads.py` makes them, `fold.py` and the services take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plexd.mesh.address import Prefix
from plexd.mesh.desired import DataEntry, EndpointSource, Peer, SigningKeys
from plexd.mesh.keys import PresharedKey, PublicKey


@dataclass(frozen=True, slots=True)
class PeerAdded:
    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerRemoved:
    peer_id: str


@dataclass(frozen=True, slots=True)
class PeerKeyRotated:
    """None: the member was not given and keeps its value. `complete` serves when the peer is not known yet."""

    peer_id: str
    public_key: PublicKey
    psk: PresharedKey | None = None
    mesh_ip: bytes | None = None
    endpoint: str | None = None
    allowed_ips: tuple[Prefix, ...] | None = None
    complete: Peer | None = None


@dataclass(frozen=True, slots=True)
class EndpointOffered:
    """peer_endpoint_changed, or one entry of the answer to an endpoint report."""

    peer_id: str
    endpoint: str
    source: EndpointSource


@dataclass(frozen=True, slots=True)
class SigningKeysRotated:
    """First form of signing_key_rotated."""

    keys: SigningKeys


@dataclass(frozen=True, slots=True)
class SigningKeyReplaced:
    """Long form: the key in force until now becomes `previous` until the given time (Unix seconds)."""

    current: bytes
    previous_until: float


@dataclass(frozen=True, slots=True)
class NodeStateUpdated:
    """None: the category stays as it is."""

    metadata: Mapping[str, str] | None
    data: Mapping[str, DataEntry] | None


@dataclass(frozen=True, slots=True)
class SecretRefsUpdated:
    secret_refs: Mapping[str, int]


Foldable = (
    PeerAdded | PeerRemoved | PeerKeyRotated | EndpointOffered | SigningKeysRotated | SigningKeyReplaced
    | NodeStateUpdated | SecretRefsUpdated
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReconcileRequested:
    """policy_updated, the `*_config_updated` events, and payloads that leave everything out."""


@dataclass(frozen=True, slots=True)
class RotationRequested:
    """rotate_keys: a new WireGuard key is due."""


@dataclass(frozen=True, slots=True)
class ActionRequested:
    execution_id: str
    action: str


@dataclass(frozen=True, slots=True)
class SSHSessionRequested:
    session_id: str


@dataclass(frozen=True, slots=True)
class SessionRevoked:
    session_id: str
    revoked_at: float  # Unix seconds, 0.0 when the event did not say


@dataclass(frozen=True, slots=True)
class FeatureOff:
    """A bridge event: its feature does not run on this node, so it means nothing here."""


@dataclass(frozen=True, slots=True)
class AboutSelf:
    """A peer event that names this node, which is no peer of itself: it means nothing here."""


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """A type this version does not know."""


NodeEvent = (
    Foldable | ReconcileRequested | RotationRequested | ActionRequested | SSHSessionRequested | SessionRevoked
    | FeatureOff | AboutSelf | UnknownEvent
)  # fmt: skip
