"""What the agent tells of itself is on disk before anyone relies on it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from plexd.mesh.keys import PublicKey
from plexd.store.cursors import Cursors
from plexd.store.spool import Spool
from plexd.telemetry.agent_audit import AgentAudit, leave_for_daemon, own_entry
from plexd.telemetry.spooled import Spooled
from tests.node_harness import EPOCH
from tests.telemetry.harness import Plane, Stage

pytestmark = pytest.mark.virtual_time

KEY = PublicKey(bytes(range(32)))
FINGERPRINT = hashlib.sha256(bytes(range(32))).hexdigest()[:16]


def make_trail(directory: Path) -> tuple[AgentAudit, Stage]:
    cursors = Cursors(directory / "telemetry")
    cursors.load()
    stage = Stage(Plane())
    spooled = Spooled("spool", stage.pipeline, Spool(directory / "telemetry" / "spool", 4 << 20), cursors, "s")
    stage.pipeline.sources[:] = [spooled]
    trail = AgentAudit("edge-03", lambda: EPOCH)
    trail.lead_into(stage.pipeline, spooled)
    return trail, stage


def on_disk(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "telemetry" / "spool" / "00000001.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("tell", "event_type", "action", "about", "subject"),
    [
        (
            lambda trail: trail.agent_started("0.1.0", "sha256:12"),
            "agent_started", "start", {"version": "0.1.0", "checksum": "sha256:12", "reason": "start"},
            {"agent": "plexd"},
        ),
        (
            lambda trail: trail.agent_stopped("0.1.0", "sha256:12", "stop signal"),
            "agent_stopped", "stop", {"version": "0.1.0", "checksum": "sha256:12", "reason": "stop signal"},
            {"agent": "plexd"},
        ),
        (
            lambda trail: trail.node_registered("n_1", bytes([10, 100, 0, 7])),
            "node_registered", "register", {"node_id": "n_1", "mesh_ip": "10.100.0.7"}, {"agent": "plexd"},
        ),
        (
            lambda trail: trail.mesh_key_rotated(KEY),
            "mesh_key_rotated", "rotate", {"fingerprint": FINGERPRINT}, {"agent": "plexd"},
        ),
        (
            lambda trail: trail.signing_key_rotated(bytes(KEY), "ev-7"),
            "signing_key_rotated", "rotate", {"fingerprint": FINGERPRINT},
            {"control_plane": True, "event_id": "ev-7"},
        ),
        (
            lambda trail: trail.signing_key_rotated(bytes(KEY), ""),
            "signing_key_rotated", "rotate", {"fingerprint": FINGERPRINT}, {"control_plane": True},
        ),
        (
            lambda trail: trail.record("secret_read", "read", {"key": "db", "version": 3}, subject={"uid": 1001}),
            "secret_read", "read", {"key": "db", "version": 3}, {"uid": 1001},
        ),
        (
            lambda trail: trail.secret_read("db", 3, 1001, 100, 77, "ok"),
            "secret_read", "read", {"key": "db", "version": 3}, {"uid": 1001, "gid": 100, "pid": 77},
        ),
        (
            lambda trail: trail.node_deregistered("n_1", bytes([10, 100, 0, 7])),
            "node_deregistered", "deregister", {"node_id": "n_1", "mesh_ip": "10.100.0.7"}, {"agent": "plexd"},
        ),
    ],
)  # fmt: skip
async def test_what_was_told_is_on_disk(
    tmp_path: Path,
    tell: Callable[[AgentAudit], Awaitable[None]],
    event_type: str,
    action: str,
    about: dict[str, Any],
    subject: dict[str, Any],
) -> None:
    trail, _ = make_trail(tmp_path)
    await tell(trail)
    assert on_disk(tmp_path) == [
        {
            "timestamp": "2027-01-15T08:00:00Z", "source": "plexd", "event_type": event_type, "subject": subject,
            "object": about, "action": action, "result": "success", "hostname": "edge-03", "raw": "",
        }
    ]  # fmt: skip


async def test_a_secret_that_was_not_given_is_told_with_the_reason(tmp_path: Path) -> None:
    trail, _ = make_trail(tmp_path)
    await trail.secret_read("db", None, None, None, None, "secret_forbidden")
    (entry,) = on_disk(tmp_path)
    assert (entry["result"], entry["subject"]) == ("failure", {})
    assert entry["object"] == {"key": "db", "reason": "secret_forbidden"}


async def test_what_is_left_for_the_daemon_is_delivered_by_it(tmp_path: Path) -> None:
    leave_for_daemon(tmp_path, 4 << 20, own_entry("edge-03", EPOCH, "node_registered", "register", {"node_id": "n"}))
    (tmp_path / "telemetry" / "audit-spool").rename(tmp_path / "telemetry" / "spool")
    trail, stage = make_trail(tmp_path)
    async with stage:
        await trail.agent_started("0.1.0", "sha256:12")
        await asyncio.sleep(30)
    assert [entry["event_type"] for entry in stage.plane.taken] == ["node_registered", "agent_started"]


async def test_a_rejected_event_holds_nobody_up_and_reaches_the_control_plane(tmp_path: Path) -> None:
    trail, stage = make_trail(tmp_path)
    async with stage:
        trail.event_rejected("bad_signature", "ev-9", "policy_updated")
        trail.event_rejected("malformed", "", "")
        await stage.pipeline.sources[0].flush()  # type: ignore[attr-defined]
    first, second = on_disk(tmp_path)
    assert (first["action"], first["result"]) == ("bad_signature", "failure")
    assert first["object"] == {"event_id": "ev-9", "event_type": "policy_updated"}
    assert first["subject"] == {"control_plane": True, "event_id": "ev-9"}
    assert second["subject"] == {"control_plane": True}
    assert stage.pipeline.row("plexd").entries == 2
