"""What the daemon says about itself to people and programs on its node: status, peers, policies, health.

Other modules decide what the facts mean: `health`, `connection_status`, `mesh.connectivity`. The documents are those of
docs/contract/node-api.md §8 and §8.1: an unknown value is null and never left out.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from plexd.config.models import Config
from plexd.mesh.address import Endpoint, format_ip, parse_ip
from plexd.mesh.connectivity import SOURCES, PeerView, Sight, describe_peers, meaning
from plexd.mesh.desired import Candidates, PolicyRule
from plexd.mesh.observed import Observed, is_fresh
from plexd.mesh.policy import Resolved, Rule, deciding, explain_rules
from plexd.mesh.table_reading import Hits
from plexd.mesh.target import Target
from plexd.node.connection_status import ConnectionStatus
from plexd.node.control_calls import SelfDescription
from plexd.node.health import CONDITION_PROBLEMS, Condition, Health, RaisedCondition
from plexd.node.reports import Reports
from plexd.node.state import Node
from plexd.wire.durations import format_duration
from plexd.wire.times import format_time

SILENT_INTERVALS = 3  # of reconciliation, without news by stream or pull
LOOK_SECONDS = 5.0  # for so long readiness relies on a look at the interface

Document = dict[str, Any]

# members of the status document as long as no component adds its own
MEMBERS: dict[str, Callable[[], object]] = {
    "nat": lambda: None,
    "actions": lambda: {"enabled": False, "running": 0, "max_concurrent": 0, "results_pending": 0},
    "hooks": lambda: {"enabled": False, "total": 0, "not_ok": 0},
    "access": lambda: {"ssh_sessions": 0, "max_sessions": 0, "host_key_fingerprint": None},
}


class Phase(StrEnum):
    """How far the daemon is; RUNNING shows as connected or degraded."""

    STARTING = "starting"
    REGISTERING = "registering"
    RUNNING = "running"
    STOPPING = "stopping"


class Mesh(Protocol):
    """A look at the mesh; `converge.view.View` is the real one.

    `resolved` maps endpoint names to addresses. `since` tells when a peer was put on the interface, in Unix seconds by
    peer id, `policies_applied_at` when the policies in force were applied.
    """

    @property
    def resolved(self) -> Mapping[str, Endpoint]: ...

    @property
    def since(self) -> Mapping[str, float]: ...

    @property
    def policies_applied_at(self) -> float | None: ...

    async def look(self) -> tuple[Target | None, Observed | None]: ...

    async def look_at_policies(self) -> tuple[Resolved, Mapping[tuple[str, int], Hits] | None]: ...


@dataclass(frozen=True, slots=True)
class Membership:
    """What there is to tell about once the node is registered."""

    node: Node
    mesh: Mesh


class Pipelines(Protocol):
    """Metrics, logs and audit on their way; `telemetry.assembly.Telemetry` is the real one."""

    def status(self, name: str) -> Mapping[str, Any] | None:
        """None for what begins with the registration."""


class Overview:
    """Builds the documents.

    The daemon sets `phase`, `description`, `membership`, `reports` and `telemetry` as the start proceeds, and `config`
    at each reload. `members` are added to the status document by components.
    """

    def __init__(
        self,
        config: Config,
        health: Health,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phase = Phase.STARTING
        self.description: SelfDescription | None = None
        self.membership: Membership | None = None
        self.reports: Reports | None = None
        self.telemetry: Pipelines | None = None
        self.config = config
        self.members: dict[str, Callable[[], object]] = {}
        self._health = health
        self._now = now
        self._monotonic = monotonic
        self._started_at, self._started = now(), monotonic()
        self._looked_at = float("-inf")
        self._is_mesh_up = False

    async def status(self) -> bytes:
        description, membership = self.description, self.membership
        identity = membership.node.identity if membership is not None else None
        connection = membership.node.connection if membership is not None else ConnectionStatus()
        return _encode(
            {
                "node_id": identity.node_id if identity is not None else None,
                "mesh_ip": format_ip(identity.mesh_ip) if identity is not None else None,
                "hostname": description.hostname if description is not None else None,
                "mode": self.config.mode,
                "version": description.version if description is not None else None,
                "state": self._state(connection),
                "started_at": format_time(self._started_at),
                "uptime": format_duration(int(self._monotonic() - self._started)),
                "binary_checksum": description.checksum if description is not None else None,
                "control_plane": {
                    "url": self.config.api,
                    "event_stream": connection.stream.value,
                    "reconnects": connection.reconnects,
                    "last_event_at": _time(connection.last_event_at),
                    "last_heartbeat_at": _time(connection.last_heartbeat_at),
                    "last_heartbeat_ok": connection.last_heartbeat_ok,
                    "last_reconcile_at": _time(connection.last_pull_at),
                    "last_reconcile_error": connection.last_pull_error,
                },
                "conditions": self._conditions(),
                "mesh": await self._mesh(),
                "counts": self._counts(),
                **{name: make() for name, make in (MEMBERS | self.members).items()},
            }
        )

    async def peers(self) -> bytes:
        if self.membership is None:
            return _encode([])
        sight = await self._sight(self.membership)
        # ten thousand peers take a tenth of a second
        return await asyncio.to_thread(lambda: _encode([_peer(view) for view in describe_peers(sight)]))

    async def peer(self, name: str) -> bytes | None:
        """One peer, by its id or mesh address, and what of this node matters to it; None: there is no such peer."""
        if self.membership is None:
            return None
        sight = await self._sight(self.membership)
        views = await asyncio.to_thread(describe_peers, sight)
        view = next((view for view in views if view.id == name or _is_at(view, name)), None)
        if view is None:
            return None
        node, observed = self.membership.node, sight.observed
        candidates = node.desired.candidates.get(view.id, Candidates())
        about = {
            "nat": self.members.get("nat", MEMBERS["nat"])(),
            "mtu": observed.link.mtu if observed is not None and observed.link is not None else None,
            "policy": await self._deciding(self.membership, view),
            "state_fetched_at": _time(node.fetched_at or None),
            "generation": node.generation,
        }
        offers = [
            {"endpoint": text, "source": SOURCES[source], "resolved": _text(meaning(text, sight.resolved))}
            for source, text in reversed(candidates.offers)
        ]
        return _encode({**_peer(view), "candidates": offers, "node": about})

    async def _deciding(self, membership: Membership, view: PeerView) -> Document | None:
        """Which rules decide about packets from and to a peer; None while no policy is enforced."""
        if not self.config.policy.enabled or view.mesh_ip is None:
            return None
        identity = membership.node.identity
        here, there = (identity.node_id, identity.mesh_ip), (view.id, view.mesh_ip)
        resolved, hits = await membership.mesh.look_at_policies()

        def told(rules: Iterator[Rule]) -> list[Document]:
            return [
                {
                    "policy": rule.policy_id,
                    "rule": rule.number,
                    "action": rule.action.value,
                    "protocol": rule.protocol.value,
                    "port": rule.port,
                    "packets": hits[rule.policy_id, rule.number].packets if hits is not None else None,
                }
                for rule in rules
            ]

        return {
            "default": self.config.policy.default,
            "inward": told(deciding(resolved.rules, there, here)),
            "outward": told(deciding(resolved.rules, here, there)),
        }

    async def _sight(self, membership: Membership) -> Sight:
        node, mesh = membership.node, membership.mesh
        target, observed = await mesh.look()
        return Sight(
            interface=self.config.mesh.interface,
            desired=node.desired,
            target=target,
            observed=observed,
            resolved=dict(mesh.resolved),
            since=dict(mesh.since),
            is_refused=not node.accepted.is_set(),
            now=self._now(),
        )

    async def policies(self) -> bytes:
        membership = self.membership
        desired = membership.node.desired.policies if membership is not None else ()
        resolved, hits = await membership.mesh.look_at_policies() if membership is not None else (Resolved(), None)
        notes = explain_rules(desired, resolved)
        return _encode(
            {
                "default": self.config.policy.default,
                "enforced": self.config.policy.enabled,
                "applied_at": _time(membership.mesh.policies_applied_at) if membership is not None else None,
                "policies": [
                    {
                        "id": policy.id,
                        "rules": [
                            _rule(rule, notes.get((policy.id, number)), hits.get((policy.id, number)) if hits else None)
                            for number, rule in enumerate(policy.rules)
                        ],
                    }
                    for policy in desired
                ],
            }
        )

    def pipeline(self, name: str) -> bytes | None:
        """How `metrics`, `logs` or `audit` are delivered; None before the node is registered."""
        status = self.telemetry.status(name) if self.telemetry is not None else None
        return _encode(dict(status)) if status is not None else None

    async def health(self) -> bytes:
        reason = await self.not_ready()
        return _encode(
            {
                "status": "degraded" if self._health.findings() else "healthy",
                "ready": reason is None,
                "reason": reason,
                "conditions": self._conditions(),
            }
        )

    async def not_ready(self) -> str | None:
        """The first reason that applies why the node is not ready (docs/contract/operations.md §7); None when it is."""
        if self.membership is None or not self.membership.node.accepted.is_set():
            return "registration_pending"
        if self._monotonic() - self._looked_at > LOOK_SECONDS:
            _, observed = await self.membership.mesh.look()
            self._is_mesh_up = observed is not None and observed.link is not None and observed.device is not None
            self._looked_at = self._monotonic()
        findings = {finding.condition for finding in self._health.findings()}
        if not self._is_mesh_up or Condition.MESH_DOWN in findings:
            return "mesh_down"
        interval = self.config.reconcile.interval.total_seconds()
        if self.membership.node.connection.silent_seconds() > SILENT_INTERVALS * interval:
            return "event_delivery_stopped"
        return "subsystem_stopped" if Condition.SUBSYSTEM_STOPPED in findings else None

    def _state(self, connection: ConnectionStatus) -> str:
        if self.phase is not Phase.RUNNING:
            return self.phase.value
        if self._health.findings() or connection.last_heartbeat_ok is False:
            return "degraded"
        return Phase.STARTING.value if connection.last_heartbeat_ok is None else "connected"

    def _conditions(self) -> list[Document]:
        return [_condition(finding) for finding in self._health.findings()]

    async def _mesh(self) -> Document | None:
        if self.membership is None:
            return None
        _, observed = await self.membership.mesh.look()
        name = self.config.mesh.interface
        if observed is None or observed.link is None or observed.device is None:
            return {"interface": name, "up": False, "listen_port": None, "peer_count": 0}
        now = self._now()
        fresh = sum(is_fresh(peer.last_handshake, now) for peer in observed.device.peers.values())
        return {
            "interface": name,
            "up": observed.link.up,
            "listen_port": observed.device.listen_port,
            "peer_count": fresh,
        }

    def _counts(self) -> Document | None:
        if self.membership is None:
            return None
        desired = self.membership.node.desired
        return {
            "metadata": len(desired.metadata),
            "data": len(desired.data),
            "secrets": len(desired.secret_refs),
            "reports": len(self.reports.entries) if self.reports is not None else 0,
            "reports_pending": len(self.reports.pending) if self.reports is not None else 0,
            "reports_rejected": len(self.reports.parked) if self.reports is not None else 0,
        }


def _condition(finding: RaisedCondition) -> Document:
    meaning = CONDITION_PROBLEMS[finding.condition]
    return {
        "code": finding.condition.value,
        "severity": meaning.severity,
        "text": f"{meaning.text} ({finding.detail})" if finding.detail else meaning.text,
        "since": format_time(finding.since),
        "remedy": meaning.remedy,
    }


def _peer(view: PeerView) -> Document:
    """Members beyond the contract's say what the peer's place in the mesh is."""
    return {
        "id": view.id,
        "mesh_ip": format_ip(view.mesh_ip) if view.mesh_ip is not None else None,
        "public_key": str(view.public_key) if view.public_key is not None else None,
        "endpoint": str(view.endpoint) if view.endpoint is not None else None,
        "endpoint_source": view.endpoint_source,
        "path": view.path,
        "allowed_ips": [str(prefix) for prefix in view.allowed_ips],
        "last_handshake_at": _time(view.last_handshake),
        "rx_bytes": view.rx_bytes,
        "tx_bytes": view.tx_bytes,
        "psk_set": view.has_psk,
        "connected": view.obstacle is None,
        "obstacle": view.obstacle._asdict() if view.obstacle is not None else None,
    }


def _is_at(view: PeerView, address: str) -> bool:
    try:
        return view.mesh_ip is not None and view.mesh_ip == parse_ip(address)
    except ValueError:
        return False


def _text(endpoint: Endpoint | None) -> str | None:
    return str(endpoint) if endpoint is not None else None


def _rule(rule: PolicyRule, note: str | None, hits: Hits | None) -> Document:
    """Members beyond the contract's say what the rule does on this node."""
    counted = {"packets": None, "bytes": None} if hits is None else hits._asdict()
    return {**rule._asdict(), **counted, "note": note}


def _time(unix: float | None) -> str | None:
    return format_time(unix) if unix is not None else None


def _encode(document: Document | list[Document]) -> bytes:
    return json.dumps(document).encode()
