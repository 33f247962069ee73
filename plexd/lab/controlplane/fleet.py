"""The control plane's side of the mesh without I/O: who is registered, what each node should be, what it is told.

Every change that concerns other nodes is put on their event streams in the same step, so that a state pull and the
events agree at any moment. Rejections carry the HTTP status a control plane answers with (docs/contract/wire.md §7).

Two rules the contract leaves to the control plane:
- A used token is good once more for the same key and host name: a node whose answer was lost gets it again.
- A host name is taken as long as its holder's key is good; a node whose key was revoked is replaced by its successor.
"""

from __future__ import annotations

import base64
import ipaddress
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.signing import SigningKey
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from plexd.lab.controlplane.refusal import Refusal
from plexd.lab.controlplane.stream import Chunk, EventLog, sse
from plexd.wire.envelope import seal
from plexd.wire.reading import JSONText
from plexd.wire.times import format_time

DEFAULT_MESH = "10.100.0.0/16"
ALLOW_ALL: list[JsonValue] = [
    {"id": "allow-all", "rules": [{"src": "*", "dst": "*", "port": 0, "protocol": "", "action": "allow"}]}
]
_CONFIG_EVENTS = {
    "bridge_config": "bridge_config_updated",
    "relay_config": "bridge_config_updated",
    "user_access_config": "user_access_config_updated",
    "ingress_config": "ingress_config_updated",
    "site_to_site_config": "site_to_site_config_updated",
}
STATE_MEMBERS = frozenset({"peers", "policies", "signing_keys", "metadata", "data", "secret_refs", *_CONFIG_EVENTS})

Clock = Callable[[], float]
Signer = Literal["current", "previous", "stranger", "nobody"]
Json = dict[str, Any]


class Token(BaseModel):
    expires_at: float | None = None  # Unix seconds; None: does not expire
    used_for: str | None = None  # node id


class Secret(BaseModel):
    value: str = Field(repr=False)  # base64 of the clear bytes
    version: int


class Node(BaseModel):
    id: str
    hostname: str
    public_key: str
    mesh_ip: str
    node_key: str = Field(repr=False)
    revoked: bool = False
    registered_metadata: dict[str, str] = {}
    capabilities: Json | None = None
    endpoint: str = ""
    nat_type: str = ""
    psks: dict[str, str] = Field(default={}, repr=False)  # by peer id
    overrides: Json = Field(default={}, repr=False)  # members of the state that are not derived
    secrets: dict[str, Secret] = Field(default={}, repr=False)
    reports: dict[str, Json] = {}
    executions: dict[str, str] = {}  # requested, accepted, rejected, or the final status
    ask_reconcile: bool = False
    ask_rotate: bool = False
    last_event: int = 0


class SigningKeys(BaseModel):
    """Seeds of 32 bytes as base64; `previous` counts until `transition_expires` (Unix seconds)."""

    current: str = Field(repr=False)
    previous: str | None = Field(default=None, repr=False)
    transition_expires: float = 0.0


class Snapshot(BaseModel):
    """All that a restart needs; the streams begin anew, their ids go on."""

    model_config = ConfigDict(extra="forbid")

    mesh: str
    signing: SigningKeys
    nodes: dict[str, Node] = {}
    departed: list[str] = Field(default=[], repr=False)  # node keys that were good once
    tokens: dict[str, Token] = Field(default={}, repr=False)
    policies: list[JsonValue] = ALLOW_ALL


def fresh_snapshot(mesh: str = DEFAULT_MESH) -> Snapshot:
    """ValueError when `mesh` is no network or too small for two nodes."""
    if ipaddress.ip_network(mesh).num_addresses < 4:
        raise ValueError(f"{mesh} is too small for a mesh")
    return Snapshot(mesh=mesh, signing=SigningKeys(current=_random_key()))


class Fleet:
    """One control plane. `on_event(node_id)` is called after something was put on that node's stream."""

    def __init__(self, snapshot: Snapshot, clock: Clock, *, preshared_keys: bool = True) -> None:
        self._snapshot = snapshot
        self._clock = clock
        self._preshared_keys = preshared_keys
        self._streams: dict[str, EventLog] = {}
        self.on_event: Callable[[str], None] = lambda _node_id: None

    # --- what is there

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._snapshot.nodes

    def node(self, node_id: str) -> Node:
        """Refusal 404 when there is no such node."""
        try:
            return self._snapshot.nodes[node_id]
        except KeyError:
            raise Refusal(404, f"no node {node_id!r} is registered") from None

    def stream(self, node_id: str) -> EventLog:
        return self._streams.setdefault(node_id, EventLog())

    @property
    def signing_public_key(self) -> str:
        return _public(self._snapshot.signing.current)

    def authenticate(self, credential: str) -> Node:
        """The node whose key this is. Refusal 401 when it is nobody's, 404 when it belonged to a node that left."""
        for node in self._snapshot.nodes.values():
            if secrets.compare_digest(node.node_key.encode(), credential.encode()):
                if node.revoked:
                    raise Refusal(401, "the node key was revoked")
                return node
        if credential in self._snapshot.departed:
            raise Refusal(404, "the node is not registered any more")
        raise Refusal(401, "the node key is not known")

    # --- tokens and membership

    def issue_token(self, value: str | None = None, *, lifetime: float | None = None) -> str:
        """A bootstrap token, good for one registration; `lifetime` is in seconds, None means it does not expire."""
        token = value if value is not None else f"plexd-{secrets.token_urlsafe(24)}"
        self._snapshot.tokens[token] = Token(expires_at=self._clock() + lifetime if lifetime is not None else None)
        return token

    def register(
        self,
        token: str,
        *,
        public_key: str,
        hostname: str,
        metadata: Mapping[str, str] | None = None,
        capabilities: Json | None = None,
    ) -> Json:
        """The RegisterResponse. Refusal 401 for a token that is unknown, expired or used, 409 for a taken name."""
        entry = self._snapshot.tokens.get(token)
        if entry is None:
            raise Refusal(401, "the bootstrap token is not known")
        if entry.used_for is not None:
            node = self._snapshot.nodes.get(entry.used_for)
            if node is None or node.revoked or (node.public_key, node.hostname) != (public_key, hostname):
                raise Refusal(401, "the bootstrap token was already used")
            return self._registered(node)
        if entry.expires_at is not None and self._clock() >= entry.expires_at:
            raise Refusal(401, "the bootstrap token has expired")
        for other in list(self._snapshot.nodes.values()):
            if other.hostname == hostname and not other.revoked:
                raise Refusal(409, f"a node with host name {hostname!r} is already registered")
            if other.public_key == public_key and not other.revoked:
                raise Refusal(409, "another node has this public key")
        for other in list(self._snapshot.nodes.values()):
            if other.hostname == hostname or other.public_key == public_key:
                self.remove(other.id)
        node = Node(
            id=f"n_{secrets.token_hex(6)}",
            hostname=hostname,
            public_key=public_key,
            mesh_ip=self._free_address(),
            node_key=_random_key(),
            registered_metadata=dict(metadata or {}),
            capabilities=capabilities,
        )
        entry.used_for = node.id
        for other in self._snapshot.nodes.values():
            self._renew_psk(node, other)
        self._snapshot.nodes[node.id] = node
        self._tell_others(node, "peer_added", lambda other: self._peer(node, seen_by=other))
        return self._registered(node)

    def remove(self, node_id: str) -> None:
        """Deregistration: the node is forgotten and its peers are told. Its key answers 404 from now on."""
        node = self.node(node_id)
        del self._snapshot.nodes[node_id]
        self._snapshot.departed.append(node.node_key)
        self._streams.pop(node_id, None)
        self.on_event(node_id)  # whoever follows its stream finds it ended
        for other in self._snapshot.nodes.values():
            other.psks.pop(node_id, None)
        self._tell_others(node, "peer_removed", lambda _other: {"peer_id": node_id})

    def revoke(self, node_id: str) -> None:
        """The node's key is refused with 401 from now on and its streams end; its peers keep it."""
        self.node(node_id).revoked = True
        self.end_stream(node_id)

    def restore(self, node_id: str) -> None:
        """The other way round: a refusal that was a passing fault."""
        self.node(node_id).revoked = False

    # --- what nodes ask and tell

    def heartbeat(self, node: Node) -> Json:
        """The HeartbeatResponse; each flag is given once."""
        answer = {"reconcile": node.ask_reconcile, "rotate_keys": node.ask_rotate}
        node.ask_reconcile = node.ask_rotate = False
        return answer

    def state(self, node: Node) -> Json:
        """The StateResponse: derived, where the node has no override of its own."""
        derived: Json = {
            "peers": [self._peer(other, seen_by=node) for other in self._others(node)],
            "policies": self._snapshot.policies,
            "signing_keys": self.signing_keys(),
            "metadata": {},
            "data": [],
            "secret_refs": [{"key": key, "version": held.version} for key, held in node.secrets.items()],
        }
        return derived | node.overrides

    def signing_keys(self) -> Json:
        keys = self._snapshot.signing
        answer: Json = {"current": _public(keys.current)}
        if keys.previous and self._clock() < keys.transition_expires:
            answer |= {"previous": _public(keys.previous), "transition_expires": format_time(keys.transition_expires)}
        return answer

    def report_endpoint(self, node: Node, endpoint: str, nat_type: str) -> Json:
        """The EndpointResponse; the others hear of an endpoint that changed."""
        changed = endpoint not in {"", node.endpoint}
        node.nat_type = nat_type
        if changed:
            node.endpoint = endpoint
            payload = {"peer_id": node.id, "endpoint": endpoint}
            self._tell_others(node, "peer_endpoint_changed", lambda _other: payload)
        known = [{"peer_id": other.id, "endpoint": other.endpoint} for other in self._others(node) if other.endpoint]
        return {"peer_endpoints": known}

    def rotate_key(self, node: Node, new_public_key: str) -> Json:
        """The KeyRotateResponse with fresh preshared keys; asking again for the same key gives the same answer."""
        if any(other.public_key == new_public_key for other in self._others(node)):
            raise Refusal(409, "another node has this public key")
        if new_public_key != node.public_key:
            node.public_key = new_public_key
            for other in self._others(node):
                self._renew_psk(node, other)
            self._tell_others(
                node,
                "peer_key_rotated",
                lambda other: {
                    "peer_id": node.id, "public_key": new_public_key, "psk": node.psks.get(other.id, "")
                },
            )  # fmt: skip
        return {"updated_peers": [self._peer(other, seen_by=node) for other in self._others(node)]}

    def secret(self, node: Node, key: str) -> Json:
        """The SecretResponse, encrypted with the node key and a nonce of its own. Refusal 404 for an unknown key."""
        held = node.secrets.get(key)
        if held is None:
            raise Refusal(404, f"there is no secret {key!r}")
        nonce = secrets.token_bytes(12)
        ciphertext = AESGCM(base64.b64decode(node.node_key)).encrypt(nonce, base64.b64decode(held.value), None)
        return {
            "key": key,
            "ciphertext": base64.b64encode(ciphertext).decode(),
            "nonce": base64.b64encode(nonce).decode(),
            "version": held.version,
        }

    def sync_reports(self, node: Node, entries: Sequence[Json], deleted: Iterable[str]) -> None:
        """Refusal 409 with `conflicts` when an entry is not newer than the one held; nothing is taken then."""
        conflicts: list[JsonValue] = [
            {"key": entry["key"], "version": held["version"]}
            for entry in entries
            if (held := node.reports.get(entry["key"])) is not None
            and entry["version"] <= held["version"]
            and entry != held  # a repetition, its first answer was lost
        ]
        if conflicts:
            raise Refusal(409, "a newer version of at least one entry is held", conflicts=conflicts)
        node.reports |= {entry["key"]: entry for entry in entries}
        for key in deleted:
            node.reports.pop(key, None)

    def acknowledge(self, node: Node, execution_id: str, status: str) -> None:
        """Refusal 404 for an execution nobody asked for, 409 for one that has been answered."""
        self._advance(node, execution_id, status, expected={"requested", status})

    def finish(self, node: Node, execution_id: str, status: str) -> None:
        """Refusal 404 for an execution nobody asked for, 409 for one that is over."""
        self._advance(node, execution_id, status, expected={"requested", "accepted"})

    def _advance(self, node: Node, execution_id: str, status: str, expected: set[str]) -> None:
        known = node.executions.get(execution_id)
        if known is None:
            raise Refusal(404, f"there is no execution {execution_id!r}")
        if known not in expected:
            raise Refusal(409, f"execution {execution_id!r} is already {known}")
        node.executions[execution_id] = status

    # --- what the operator changes

    def patch_state(self, node_id: str, members: Mapping[str, JsonValue], *, notify: bool = False) -> None:
        """Sets members of the node's state; None makes a member derived, or absent, again.

        Silent by default, as if the events had been lost; with `notify` the node is told what changed.
        KeyError for a name the state does not have.
        """
        if unknown := members.keys() - STATE_MEMBERS:
            raise KeyError(f"the state has no member {sorted(unknown)}")
        node = self.node(node_id)
        before = self.state(node)
        for name, value in members.items():
            if value is None:
                node.overrides.pop(name, None)
            else:
                node.overrides[name] = value
        if notify:
            self._notify(node, before, self.state(node))

    def _notify(self, node: Node, before: Json, after: Json) -> None:
        old, new = ({peer["id"]: peer for peer in state["peers"]} for state in (before, after))
        for peer_id in old.keys() - new.keys():
            self.emit(node.id, "peer_removed", {"peer_id": peer_id})
        for peer_id, peer in new.items():
            if old.get(peer_id) != peer:
                self.emit(node.id, "peer_added", peer)
        if before["policies"] != after["policies"]:
            self.emit(node.id, "policy_updated", {})
        if changed := {name: after[name] for name in ("metadata", "data") if before[name] != after[name]}:
            self.emit(node.id, "node_state_updated", changed)
        if before["secret_refs"] != after["secret_refs"]:
            self.emit(node.id, "node_secrets_updated", {"secret_refs": after["secret_refs"]})
        if before["signing_keys"] != after["signing_keys"]:
            self.emit(node.id, "signing_key_rotated", after["signing_keys"])
        told = {event for name, event in _CONFIG_EVENTS.items() if before.get(name) != after.get(name)}
        for event in sorted(told):
            self.emit(node.id, event, {})

    def set_policies(self, policies: Sequence[JsonValue]) -> None:
        """The policies of every node without an override, announced."""
        self._snapshot.policies = list(policies)
        for node in self._snapshot.nodes.values():
            if "policies" not in node.overrides:
                self.emit(node.id, "policy_updated", {})

    def put_data(self, node_id: str, key: str, payload: JsonValue, content_type: str = "application/json") -> None:
        """Adds or replaces a data entry under the next version, announced."""
        entries = {entry["key"]: entry for entry in self.state(self.node(node_id))["data"]}
        entries[key] = {
            "key": key,
            "content_type": content_type,
            "payload": payload,
            "version": entries[key]["version"] + 1 if key in entries else 1,
            "updated_at": format_time(self._clock()),
        }
        self.patch_state(node_id, {"data": list(entries.values())}, notify=True)

    def put_secret(self, node_id: str, key: str, value: bytes) -> None:
        """Adds or replaces a secret under the next version; its name and version are announced."""
        node = self.node(node_id)
        before = self.state(node)
        version = node.secrets[key].version + 1 if key in node.secrets else 1
        node.secrets[key] = Secret(value=base64.b64encode(value).decode(), version=version)
        self._notify(node, before, self.state(node))

    def ask(self, node_id: str, *, reconcile: bool = False, rotate_keys: bool = False) -> None:
        """Flags for the answer to the node's next heartbeat."""
        node = self.node(node_id)
        node.ask_reconcile |= reconcile
        node.ask_rotate |= rotate_keys

    def rotate_signing_key(self, transition: float = 86_400.0) -> None:
        """A new signing key, announced under the old one, which counts for another `transition` seconds."""
        old = self._snapshot.signing
        new = SigningKeys(current=_random_key(), previous=old.current, transition_expires=self._clock() + transition)
        announcement: Json = {
            "current": _public(new.current),
            "previous": _public(old.current),
            "transition_expires": format_time(new.transition_expires),
        }
        for node in self._snapshot.nodes.values():
            self.emit(node.id, "signing_key_rotated", announcement)
        self._snapshot.signing = new

    # --- events

    def emit(
        self,
        node_id: str,
        event_type: str,
        payload: JsonValue,
        *,
        payload_text: str | None = None,
        signer: Signer = "current",
        event_id: str | None = None,
        nonce: str | None = None,
        issued_at: str | None = None,
        size: int | None = None,
    ) -> str:
        """Puts a signed event on the node's stream and returns its event id; what follows `payload` makes it a forgery.

        `payload_text` stands for `payload` as raw JSON text. `size` fills the envelope with an unsigned member up to
        that many bytes, so that nothing but its length is wrong with it. An `action_request` makes its execution known.
        """
        node = self.node(node_id)
        node.last_event += 1
        event_id = event_id if event_id is not None else f"ev-{node.id}-{node.last_event}"
        data = self._sealed(
            signer,
            event_type=event_type,
            event_id=event_id,
            issued_at=issued_at if issued_at is not None else format_time(self._clock()),
            nonce=nonce if nonce is not None else secrets.token_urlsafe(12),
            payload=payload_text if payload_text is not None else JSONText.of(payload),
        )
        if size is not None:
            data = _filled(data, size)
        if event_type == "action_request" and isinstance(payload, dict):
            node.executions.setdefault(str(payload.get("execution_id", "")), "requested")
        self._append(node_id, Chunk(sse(event_type, str(node.last_event), data), str(node.last_event)))
        return event_id

    def emit_raw(self, node_id: str, data: bytes) -> None:
        """Bytes on the node's stream as they are; not replayed to later connections."""
        self.node(node_id)
        self._append(node_id, Chunk(data))

    def end_stream(self, node_id: str) -> None:
        """Every connection that follows the node's stream now is ended."""
        self.node(node_id)
        self._append(node_id, Chunk(b"", ends=True))

    def _append(self, node_id: str, chunk: Chunk) -> None:
        self.stream(node_id).append(chunk)
        self.on_event(node_id)

    def _sealed(self, signer: Signer, **members: str) -> bytes:
        keys = self._snapshot.signing
        seeds = {
            "current": keys.current,
            "previous": keys.previous or keys.current,
            "stranger": _random_key(),
            "nobody": keys.current,
        }
        text = seal(SigningKey(base64.b64decode(seeds[signer])), **members)
        if signer == "nobody":
            text = text[: text.rindex(',"signature"')] + ',"signature":""}'
        return text.encode()

    # --- derivation

    def _registered(self, node: Node) -> Json:
        return {
            "node_id": node.id,
            "mesh_ip": node.mesh_ip,
            "signing_public_key": self.signing_public_key,
            "node_secret_key": node.node_key,
            "peers": self.state(node)["peers"],
        }

    def _others(self, node: Node) -> list[Node]:
        return [other for other in self._snapshot.nodes.values() if other.id != node.id]

    def _peer(self, node: Node, *, seen_by: Node) -> Json:
        address = ipaddress.ip_address(node.mesh_ip)
        return {
            "id": node.id,
            "public_key": node.public_key,
            "mesh_ip": node.mesh_ip,
            "endpoint": node.endpoint,
            "allowed_ips": [f"{address}/{address.max_prefixlen}"],
            "psk": seen_by.psks.get(node.id, ""),
        }

    def _tell_others(self, node: Node, event_type: str, payload: Callable[[Node], Json]) -> None:
        # a node with peers of its own making hears only what the operator emits
        for other in self._others(node):
            if "peers" not in other.overrides:
                self.emit(other.id, event_type, payload(other))

    def _renew_psk(self, node: Node, other: Node) -> None:
        if self._preshared_keys:
            node.psks[other.id] = other.psks[node.id] = _random_key()

    def _free_address(self) -> str:
        taken = {node.mesh_ip for node in self._snapshot.nodes.values()}
        for address in ipaddress.ip_network(self._snapshot.mesh).hosts():
            if str(address) not in taken:
                return str(address)
        raise Refusal(403, f"no address is left in {self._snapshot.mesh}")


def _filled(data: bytes, size: int) -> bytes:
    start = data[:-1] + b',"filler":"'
    return start + b"x" * (size - len(start) - 2) + b'"}'


def _random_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


def _public(seed: str) -> str:
    return base64.b64encode(bytes(SigningKey(base64.b64decode(seed)).verify_key)).decode()
