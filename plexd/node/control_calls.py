"""The control plane in the node's own terms: calls of the client, with wire types mapped to mesh values and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MappingProxyType

from pydantic import SecretStr

from plexd.control import ControlPlane
from plexd.log import get_logger
from plexd.mesh.desired import DataEntry, FullState, Peer
from plexd.mesh.drift import Correction
from plexd.mesh.events import EndpointOffered
from plexd.mesh.keys import NO_PRESHARED_KEY, PublicKey
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.wire import endpoints, models
from plexd.wire.durations import format_duration
from plexd.wire.mapping import (
    OwnNode,
    Registered,
    map_endpoints,
    map_peers,
    map_registration,
    map_state,
)
from plexd.wire.reading import JSONText, Skipped
from plexd.wire.times import format_time

log = get_logger("control")

PEERS_ON_LOOP = 500  # mapping more of them would hold up the event loop for over 5 ms


@dataclass(frozen=True, slots=True)
class MeshStatus:
    """What the heartbeat says about the mesh."""

    interface: str
    fresh_peers: int
    listen_port: int


@dataclass(frozen=True, slots=True)
class SelfDescription:
    """What the node says about itself when it registers. `checksum` is `sha256:...` of the program."""

    hostname: str
    metadata: dict[str, str]
    version: str
    checksum: str

    def capabilities(self, members: Mapping[str, object] = MappingProxyType({})) -> models.CapabilitiesPayload:
        """`members` is what components add, by the names of the wire model."""
        binary = models.BinaryInfo(version=self.version, checksum=self.checksum)
        return models.CapabilitiesPayload.model_validate(
            {"binary": binary, "builtin_actions": (), "hooks": (), **members}
        )


class Enrolment:
    """The one call that needs no identity."""

    def __init__(
        self, control: ControlPlane, description: Callable[[], SelfDescription], retry_for: Callable[[], timedelta]
    ) -> None:
        self._control = control
        self._description = description
        self._retry_for = retry_for

    async def register(self, token: SecretStr, public_key: PublicKey) -> Registered:
        """Raises ControlError once the time is over, WireError when the answer is not usable."""
        description = self._description()
        request = models.RegisterRequest(
            token=token,
            public_key=str(public_key),
            hostname=description.hostname,
            metadata=description.metadata,
            capabilities=description.capabilities(),
        )
        answer, faults = await self._control.register(request, retry_for=self._retry_for().total_seconds())
        registered, skipped = map_registration(answer, faults, public_key)
        _log_skipped("registration", skipped)
        return registered


class ControlCalls:
    """The calls of a registered node. All raise ControlError, those with an answer WireError."""

    def __init__(
        self,
        control: ControlPlane,
        node: Node,
        health: Health,
        description: SelfDescription,
        mesh_status: Callable[[], Awaitable[MeshStatus | None]],
        started_at: float,
    ) -> None:
        """`started_at` is monotonic.

        `heartbeat` and `capabilities` are members that components add to these documents.
        """
        self.heartbeat: dict[str, Callable[[], object]] = {}
        self.capabilities: dict[str, Callable[[], object]] = {}
        self._control = control
        self._node = node
        self._health = health
        self._description = description
        self._mesh_status = mesh_status
        self._started_at = started_at

    def own(self) -> OwnNode:
        identity = self._node.identity
        key = identity.private_key.public() if identity.private_key is not None else PublicKey(NO_PRESHARED_KEY)
        return OwnNode(identity.node_id, identity.mesh_ip, key)

    async def fetch_state(self) -> FullState:
        answer, faults = await self._control.state()
        mapped = partial(map_state, answer, faults, own=self.own(), held=self._node.desired, now=time.time())
        state, skipped = await asyncio.to_thread(mapped) if len(answer.peers) > PEERS_ON_LOOP else mapped()
        _log_skipped("state", skipped)
        return state

    async def report_drift(self, timestamp: float, corrections: Sequence[Correction]) -> None:
        entries = tuple(models.DriftCorrection(type=c.type, detail=c.detail) for c in corrections)
        await self._control.drift(models.DriftReport(timestamp=format_time(timestamp), corrections=entries))

    async def report_endpoint(self, public_endpoint: str, nat_type: str) -> Sequence[EndpointOffered]:
        report = models.EndpointReport.model_validate({"public_endpoint": public_endpoint, "nat_type": nat_type})
        answer, faults = await self._control.report_endpoint(report)
        _log_skipped("endpoint report", faults)
        return map_endpoints(answer, self.own())

    async def rotate_key(self, new_key: PublicKey) -> Sequence[Peer]:
        request = models.KeyRotateRequest(node_id=self._node.identity.node_id, new_public_key=str(new_key))
        answer, faults = await self._control.rotate_keys(request)
        mapped = map_peers(answer.updated_peers, faults, self.own(), "updated_peers")
        _log_skipped("key rotation", (*faults, *mapped.skipped))
        return mapped.peers

    async def put_capabilities(self) -> None:
        members = {name: make() for name, make in self.capabilities.items()}
        await self._control.put_capabilities(self._description.capabilities(members))

    async def reject_execution(self, execution_id: str, reason: str) -> None:
        await self._control.ack(models.ExecutionAck(execution_id=execution_id, status="rejected", reason=reason))

    async def report_session_closed(self, session_id: str, reason: str) -> None:
        closed = models.TunnelClosed(reason=reason, duration="0s", timestamp=format_time(time.time()))
        await self._control.tunnel_closed(session_id, closed)

    async def sync_reports(self, entries: Sequence[DataEntry], deleted: Sequence[str]) -> None:
        reports = tuple(
            models.ReportEntry(
                key=entry.key,
                content_type=entry.content_type,
                payload=JSONText(entry.payload),
                version=entry.version,
                updated_at=entry.updated_at,
            )
            for entry in entries
        )
        request = models.ReportSyncRequest(entries=reports, deleted=tuple(deleted))
        await self._control.call(endpoints.REPORT, request)

    async def fetch_secret(self, key: str) -> models.SecretResponse:
        return await self._control.secret(key)

    async def beat(self, limit_seconds: float) -> models.HeartbeatResponse:
        """Send a heartbeat, built fresh."""
        status = await self._mesh_status()
        # before the first pass nobody has said yet that there is no mesh; later the look may just have taken too long
        is_starting = status is None and not self._node.connection.passes
        mesh = None
        if status is not None:
            mesh = models.MeshInfo(
                interface=status.interface, peer_count=status.fresh_peers, listen_port=status.listen_port
            )
        request = models.HeartbeatRequest.model_validate(
            {
                "node_id": self._node.identity.node_id,
                "timestamp": format_time(time.time()),
                "status": "degraded" if self._health.findings() or is_starting else "healthy",
                "uptime": format_duration(int(time.monotonic() - self._started_at)),
                "binary_checksum": self._description.checksum,
                "mesh": mesh,
                **{name: make() for name, make in self.heartbeat.items()},
            }
        )
        return await self._control.heartbeat(request, limit=limit_seconds)


def _log_skipped(document: str, skipped: Sequence[Skipped]) -> None:
    for item in skipped[:20]:
        log.error("part of an answer not used", document=document, path=item.path, id=item.id, reason=item.reason)
    if len(skipped) > 20:
        log.error("more parts of an answer not used", document=document, count=len(skipped) - 20)
