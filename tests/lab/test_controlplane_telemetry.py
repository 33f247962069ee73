"""What the control plane makes of telemetry: kept, followed by number, refused by content."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from plexd.lab.controlplane import LabControlPlane
from plexd.lab.controlplane.faults import Effect, Fault
from plexd.lab.controlplane.telemetry import Gap, follow, gaps
from tests.lab.test_controlplane_admin import HEADERS, over_socket, register

PATTERN = r"^(?P<source>\w+) (?P<number>\d+)$"


def log(message: str) -> dict[str, str]:
    return {
        "timestamp": "2026-03-04T09:15:02Z", "source": "journald", "unit": "", "message": message, "severity": "info",
        "hostname": "alpha",
    }  # fmt: skip


def numbered(*numbers: int, source: str = "a") -> list[dict[str, str]]:
    return [log(f"{source} {number}") for number in numbers]


@pytest.mark.parametrize(
    ("numbers", "repeated", "missing", "disordered"),
    [
        ((0, 1, 2, 3), 0, [], []),
        ((0, 1, 1, 2, 0, 1, 2, 3), 4, [], []),
        ((0, 3), 0, [1, 2], []),
        ((0, 2, 1, 3), 0, [], [1]),
        ((), 0, [0, 1, 2, 3], []),
    ],
)
def test_numbers_are_followed(
    numbers: tuple[int, ...], repeated: int, missing: list[int], disordered: list[int]
) -> None:
    found = follow([*numbered(*numbers), log("something else")], re.compile(PATTERN), {"a": 4})["a"]
    assert (found.repeated, found.missing, found.disordered) == (repeated, missing, disordered)
    assert found.arrived == 4 - len(missing)


def test_sources_are_followed_apart() -> None:
    entries = [log("a 0"), log("b 0"), log("b 1"), log("a 1")]
    found = follow(entries, re.compile(PATTERN), {"a": 2, "b": 2})
    assert all(not sequence.missing and not sequence.disordered for sequence in found.values())


def test_markers_of_both_kinds_are_read() -> None:
    audit = {"event_type": "TELEMETRY_GAP", "object": {"source": "auditd", "reason": "kernel_overrun", "lost": -1}}
    entries: list[dict[str, Any]] = [
        log("telemetry gap: source=/var/log/a b.log reason=truncated_file lost=7"),
        log("x"),
        audit,
    ]
    assert gaps(entries) == [Gap("/var/log/a b.log", "truncated_file", 7), Gap("auditd", "kernel_overrun", None)]


async def post(plane: LabControlPlane, identity: dict[str, Any], entries: list[dict[str, str]]) -> int:
    headers = HEADERS | {
        "authorization": f"Bearer {identity['node_secret_key']}", "content-type": "application/json",
        "content-encoding": "gzip",
    }  # fmt: skip
    raw = gzip.compress(json.dumps(entries, separators=(",", ":")).encode())
    async with httpx.AsyncClient(trust_env=False) as client:
        url = f"{plane.url}/v1/nodes/{identity['node_id']}/logs"
        return (await client.post(url, content=raw, headers=headers)).status_code


async def test_what_was_taken_can_be_looked_at_and_followed(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with LabControlPlane(admin_socket=path) as plane, over_socket(path) as admin:
        identity = await register(plane.url, plane.admin.issue_token(), "alpha")
        assert await post(plane, identity, numbered(0, 1)) == 202
        plane.admin.inject(Fault(endpoint="logs", effect=Effect.STATUS, status=500))
        assert await post(plane, identity, numbered(2)) == 500  # it never saw these
        assert await post(plane, identity, numbered(3)) == 202
        taken = (await admin.get("/nodes/alpha/telemetry/logs")).json()
        assert [entry["message"] for entry in taken] == ["a 0", "a 1", "a 3"]
        order = {"pattern": PATTERN, "expected": {"a": 4}}
        found = (await admin.post("/nodes/alpha/telemetry/follow", json=order)).json()
        assert found["sources"]["a"]["missing"] == [2]
        assert found["gaps"] == []


async def test_faults_can_be_for_certain_bodies_only(tmp_path: Path) -> None:
    async with LabControlPlane() as plane:
        identity = await register(plane.url, plane.admin.issue_token(), "alpha")
        plane.admin.inject(Fault(endpoint="logs", effect=Effect.STATUS, status=400, contains="a 7", count=None))
        plane.admin.inject(Fault(endpoint="logs", effect=Effect.STATUS, status=413, larger_than=1000, count=None))
        assert await post(plane, identity, numbered(1, 2)) == 202
        assert await post(plane, identity, numbered(6, 7)) == 400
        assert await post(plane, identity, numbered(*range(10, 30))) == 413
