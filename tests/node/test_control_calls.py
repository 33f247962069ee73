"""What a heartbeat says of the node, as it goes over the wire."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from typing import Any

import httpx
import pytest

from plexd.control import ControlPlane
from plexd.node.control_calls import ControlCalls, MeshStatus, SelfDescription
from plexd.node.health import Condition, Health
from plexd.wire.times import parse_time
from tests.node_harness import NODE_ID, make_node

UP = MeshStatus("plexd0", 2, 51820)
FOUND = {"public_endpoint": "198.51.100.9:51820", "type": "full_cone"}


def beat(
    mesh: MeshStatus | None, nat: dict[str, str] | None, *conditions: Condition, passes: int = 0
) -> dict[str, Any]:
    """The body of one heartbeat of a node that has run for 61 s."""
    bodies: list[dict[str, Any]] = []

    def take(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={})

    async def main() -> None:
        health = Health()
        for condition in conditions:
            health.set(condition, True)
        node = make_node(health=health)
        for _ in range(passes):
            node.connection.pass_ended(failed=False, corrections=0)
        control = ControlPlane("http://127.0.0.1:1", ssl.create_default_context(), transport=httpx.MockTransport(take))
        control.use_identity(lambda: NODE_ID, node.credential, node.suspect)

        async def status() -> MeshStatus | None:
            return mesh

        description = SelfDescription("stage", {}, "0", "sha256:" + "0" * 64)
        calls = ControlCalls(control, node, health, description, status, time.monotonic() - 61)
        calls.heartbeat["nat"] = lambda: nat
        await calls.beat(5.0)
        await control.close()

    asyncio.run(main())
    (body,) = bodies
    return body


def test_heartbeat_is_filled_from_what_is_there() -> None:
    body = beat(UP, FOUND)
    assert (parse_time(body.pop("timestamp")) or 0.0) == pytest.approx(time.time(), abs=60)
    assert body == {
        "node_id": NODE_ID,
        "status": "healthy",
        "uptime": "1m1s",
        "binary_checksum": "sha256:" + "0" * 64,
        "mesh": {"interface": "plexd0", "peer_count": 2, "listen_port": 51820},
        "nat": {"public_endpoint": "198.51.100.9:51820", "type": "full_cone"},
    }


def test_what_is_not_known_is_left_out() -> None:
    assert beat(None, None).keys() == {"node_id", "timestamp", "status", "uptime", "binary_checksum"}


@pytest.mark.parametrize(
    ("mesh", "conditions", "status"),
    [
        (UP, (), "healthy"),
        (UP, (Condition.STREAM_DOWN,), "degraded"),
        (None, (Condition.MESH_DOWN,), "degraded"),
        (None, (), "degraded"),  # right after a start, before anybody has looked
    ],
)
def test_node_with_a_condition_or_without_a_mesh_is_degraded(
    mesh: MeshStatus | None, conditions: tuple[Condition, ...], status: str
) -> None:
    assert beat(mesh, FOUND, *conditions)["status"] == status


def test_node_whose_mesh_does_not_answer_in_time_is_healthy_as_long_as_no_condition_holds() -> None:
    body = beat(None, FOUND, passes=1)
    assert body["status"] == "healthy"
    assert "mesh" not in body
