"""A real agent and a real control plane: what arrives, and what the agent says of it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import MARKS, PLEXD, World, wait_until

pytestmark = MARKS

OBSERVE = """\
observe:
  interval: 5s
  batch_interval: 5s
"""
LOGS = """\
logs:
  interval: 1s
  batch_interval: 1s
  journald: {{enabled: false}}
  file_patterns: ["{logs}/*.log"]
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    logs = tmp_path / "log"
    logs.mkdir()
    (logs / "app.log").touch()
    with World(tmp_path, extra=OBSERVE + LOGS.format(logs=logs)) as world:
        world.register()
        yield world


def points(world: World) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = world.plane.ask("GET", f"/nodes/{world.node_id}/telemetry/metrics")
    return found


def ask(world: World, *command: str) -> str:
    socket = str(world.directory / "api.sock")
    done = subprocess.run([*PLEXD, *command, "--socket", socket], check=True, capture_output=True, text=True)
    return done.stdout


def test_points_of_all_groups_arrive_and_the_status_tells(world: World) -> None:
    groups = {"system", "tunnel", "latency", "agent"}
    wait_until("points of every group", lambda: groups <= {point["group"] for point in points(world)})
    wait_until(
        "every peer has its points",
        lambda: (
            {"n_2", "n_3", "n_4"} <= {point.get("peer_id") for point in points(world) if point["group"] == "tunnel"}
        ),
    )
    refused = [a for a in world.plane.arrivals("metrics") if a["status"] != 202]
    assert refused == []
    status = json.loads(ask(world, "metrics-status", "--json"))
    assert (status["enabled"], status["state"], status["counters"]["dropped"]) == (True, "ok", {})
    assert {source["name"]: source["state"] for source in status["sources"]} == dict.fromkeys(groups, "reading")
    assert "State:         ok" in ask(world, "metrics-status")
    assert world.end_agent() == 0
    sent = world.plane.arrivals("metrics")
    assert sent
    (agent, *_) = [point for point in points(world) if point["group"] == "agent"]
    assert agent["data"]["pipelines"].keys() >= {"metrics"}


def test_agent_that_is_stopped_sends_what_it_has(world: World) -> None:
    wait_until("metrics flow", lambda: points(world))
    before = len(points(world))
    assert world.end_agent() == 0
    assert len(points(world)) >= before
    world.plane.ask("POST", "/listener/stop")
    world.start_agent()
    wait_until("the agent runs", lambda: world.said("plexd started")[1:])
    assert world.end_agent() == 0


def test_killed_agent_goes_on_where_it_was_and_keeps_secrets_to_itself(world: World) -> None:
    """T2, and redaction: bootstrap token, node key and private key in the lines of a log."""
    log = world.directory / "log" / "app.log"
    data = world.data
    identity = json.loads((data / "identity.json").read_text())
    secrets = [(data / name).read_text().strip() for name in ("node_secret_key", "private_key")]
    assert identity["node_id"] == world.node_id

    def forwarded() -> list[str]:
        entries = world.plane.ask("GET", f"/nodes/{world.node_id}/telemetry/logs")
        return [entry["message"] for entry in entries if entry["source"] == str(log)]

    wait_until("the file is followed", lambda: "files" in (data / "telemetry" / "cursors.json").read_text())
    with log.open("a") as file:
        file.writelines(f"line {number}\n" for number in range(100))
        file.writelines(f"secret {secret} planted\n" for secret in secrets)
    wait_until("the lines arrive", lambda: len(forwarded()) >= 102)
    world.end_agent(signal.SIGKILL)
    with log.open("a") as file:
        file.writelines(f"line {number}\n" for number in range(100, 200))
    world.start_agent()
    wait_until("the other lines arrive", lambda: "line 199" in forwarded())
    arrived = forwarded()
    assert [f"line {n}" for n in range(200)] == list(dict.fromkeys(text for text in arrived if text.startswith("line")))
    assert "secret [redacted] planted" in arrived
    assert not any(secret in text for text in arrived for secret in secrets)
    status = json.loads(ask(world, "log-status", "--json"))
    assert {source["name"] for source in status["sources"]} == {"files", "agent"}
    assert "files" in ask(world, "log-status")
