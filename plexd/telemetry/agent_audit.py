"""What the agent itself does that an auditor wants to know (docs/contract/telemetry.md §5.8).

Entries go to the spool, so they outlive the process, and are delivered as soon as the node may. A method returns when
its entry is on disk (or the disk has refused it, then it is in memory): it is awaited before what it tells of counts as
done, so that a crash between the two tells it twice rather than never.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from plexd.audit.entry import FAILURE, SUCCESS, Entry, Value
from plexd.mesh.address import format_ip
from plexd.mesh.keys import PublicKey
from plexd.store.files import DIRECTORY_MODE
from plexd.store.spool import Spool
from plexd.telemetry.pipeline import Pipeline, SourceStatus
from plexd.telemetry.records import to_json
from plexd.telemetry.spooled import Spooled
from plexd.wire.times import format_time

SOURCE = "plexd"
AGENT: Mapping[str, Value] = {"agent": "plexd"}  # the subject when it acts on its own


class AgentAudit:
    """Leads nowhere until it is told where; nobody wants to know then."""

    def __init__(self, hostname: str, now: Callable[[], float] = time.time) -> None:
        self._hostname = hostname
        self._now = now
        self._spooled: Spooled | None = None
        self._row: SourceStatus | None = None

    def lead_into(self, pipeline: Pipeline, spooled: Spooled) -> None:
        self._spooled, self._row = spooled, pipeline.row(SOURCE)

    def lead_nowhere(self) -> None:
        self._spooled = self._row = None

    async def record(
        self,
        event_type: str,
        action: str,
        about: Mapping[str, Value],
        *,
        subject: Mapping[str, Value] = AGENT,
        result: str = SUCCESS,
    ) -> None:
        """`event_type` is one of docs/contract/telemetry.md §5.8, `about` becomes the object, `subject` is who caused
        it.
        """
        spooled = self._spooled
        self._add(event_type, action, about, subject, result)
        if spooled is not None:
            await spooled.flush()

    def _add(
        self, event_type: str, action: str, about: Mapping[str, Value], subject: Mapping[str, Value], result: str
    ) -> None:
        if self._spooled is None or self._row is None:
            return
        now = self._now()
        self._spooled.add_nowait(own_entry(self._hostname, now, event_type, action, about, subject, result))
        self._row.entries += 1
        self._row.last_entry_at = now

    # what the daemon does today

    async def agent_started(self, version: str, checksum: str) -> None:
        await self.record("agent_started", "start", {"version": version, "checksum": checksum, "reason": "start"})

    async def agent_stopped(self, version: str, checksum: str, reason: str) -> None:
        await self.record("agent_stopped", "stop", {"version": version, "checksum": checksum, "reason": reason})

    async def node_registered(self, node_id: str, mesh_ip: bytes) -> None:
        await self.record("node_registered", "register", node(node_id, mesh_ip))

    async def node_deregistered(self, node_id: str, mesh_ip: bytes) -> None:
        await self.record("node_deregistered", "deregister", node(node_id, mesh_ip))

    async def mesh_key_rotated(self, public_key: PublicKey) -> None:
        await self.record("mesh_key_rotated", "rotate", {"fingerprint": fingerprint(public_key)})

    async def signing_key_rotated(self, public_key: bytes, event_id: str) -> None:
        """`event_id` is empty when a state pull brought the key."""
        await self.record(
            "signing_key_rotated",
            "rotate",
            {"fingerprint": fingerprint(public_key)},
            subject=_control_plane(event_id),
        )

    async def secret_read(
        self, key: str, version: int | None, uid: int | None, gid: int | None, pid: int | None, outcome: str
    ) -> None:
        """`outcome` is "ok", or why there was no secret; the ids are of the caller, as far as they are known."""
        caller = {name: value for name, value in (("uid", uid), ("gid", gid), ("pid", pid)) if value is not None}
        about: dict[str, Value] = {"key": key}
        if version is not None:
            about["version"] = version
        if outcome != "ok":
            about["reason"] = outcome
        await self.record("secret_read", "read", about, subject=caller, result=SUCCESS if outcome == "ok" else FAILURE)

    def event_rejected(self, reason: str, event_id: str, event_type: str) -> None:
        """Nobody waits for this one: it is on disk within a second."""
        about = {"event_id": event_id, "event_type": event_type}
        self._add("event_rejected", reason, about, _control_plane(event_id), FAILURE)


def leave_for_daemon(data_dir: Path, max_bytes: int, entry: bytes) -> None:
    """Put an entry into the spool of a daemon that does not run, for when it does. Blocks; raises OSError."""
    directory = data_dir / "telemetry"
    directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    spool = Spool(directory / "audit-spool", max_bytes)
    spool.open(None)
    try:
        spool.append([entry])
    finally:
        spool.close()


def own_entry(
    hostname: str,
    now: float,
    event_type: str,
    action: str,
    about: Mapping[str, Value],
    subject: Mapping[str, Value] = AGENT,
    result: str = SUCCESS,
) -> bytes:
    """`now` is in Unix seconds."""
    entry = Entry(format_time(now), SOURCE, event_type, subject, about, action, result, hostname, "")
    return to_json(entry._asdict())


def node(node_id: str, mesh_ip: bytes) -> Mapping[str, Value]:
    return {"node_id": node_id, "mesh_ip": format_ip(mesh_ip)}


def _control_plane(event_id: str) -> Mapping[str, Value]:
    return {"control_plane": True} | ({"event_id": event_id} if event_id else {})


def fingerprint(public_key: bytes) -> str:
    """How a key is named."""
    return hashlib.sha256(public_key).hexdigest()[:16]
