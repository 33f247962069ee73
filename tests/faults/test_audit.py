"""A real agent tells what is audited on its node, through kill -9 and a control plane that will not listen."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plexd.mesh.keys import PublicKey
from tests.faults.world import MARKS, PATIENCE, PLEXD, World, run, wait_until

pytestmark = MARKS

CONFIG = """\
observe:
  enabled: false
audit:
  interval: 1s
  batch_interval: 1s
  auditd:
    method: {method}
    log_path: {directory}/audit.log
  kubernetes:
    enabled: true
    log_path: {directory}/k8s.log
"""

FAULTS: list[dict[str, Any]] = [
    {"effect": "status", "status": 500},
    {"effect": "status", "status": 429, "headers": {"Retry-After": "1"}},
    {"effect": "status", "status": 503},
    {"effect": "disconnect"},
    {"effect": "none", "delay_seconds": 3},
]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "audit.log").touch()
    (tmp_path / "k8s.log").touch()
    with World(tmp_path, extra=CONFIG.format(directory=tmp_path, method="auto")) as world:
        yield world


def entries(world: World) -> list[dict[str, Any]]:
    if not world.node_id:
        return []
    found: list[dict[str, Any]] = world.plane.ask("GET", f"/nodes/{world.node_id}/telemetry/audit")
    return found


def told(world: World, event_type: str) -> list[dict[str, Any]]:
    return [entry for entry in entries(world) if entry["event_type"] == event_type]


def public_key(world: World) -> str:
    return run(*world.inside, "wg", "show", world.interface, "public-key").strip()


def add_record(world: World, number: int) -> None:
    """As auditd would write it: two records, no end."""
    stamp = f"audit({1_795_629_645 + number // 1000}.{number % 1000:03d}:{number})"
    with (world.directory / "audit.log").open("a") as log:
        log.write(f"type=SYSCALL msg={stamp}: arch=c000003e syscall=257 success=yes exit={number} pid=7 uid=0\n")
        log.write(f'type=CWD msg={stamp}: cwd="/{number}"\n')


def add_request(world: World, number: int) -> None:
    event = {"stage": "ResponseComplete", "verb": "get", "requestURI": f"/{number}", "responseStatus": {"code": 200}}
    with (world.directory / "k8s.log").open("a") as log:
        log.write(json.dumps(event) + "\n")


def numbers(world: World) -> dict[str, list[int]]:
    """Of what arrived, by source, in order of arrival."""
    found: dict[str, list[int]] = {"auditd": [], "k8s-audit": []}
    for entry in entries(world):
        if entry["source"] == "auditd":
            assert entry["raw"].count("\n") == 1
            found["auditd"].append(entry["object"]["exit"])
        elif entry["source"] == "k8s-audit":
            found["k8s-audit"].append(int(entry["object"]["uri"][1:]))
    return found


def test_what_happens_on_the_node_is_told(world: World) -> None:
    world.register()
    for number in range(5):
        add_record(world, number)
        add_request(world, number)
    everything = {"auditd": list(range(5)), "k8s-audit": list(range(5))}
    wait_until("all of it arrived", lambda: numbers(world) == everything)
    first, registered = entries(world)[:2]
    assert (first["event_type"], first["subject"]) == ("agent_started", {"agent": "plexd"})
    assert first["object"]["version"]
    assert (registered["event_type"], registered["object"]["node_id"]) == ("node_registered", world.node_id)
    assert {entry["hostname"] for entry in entries(world)} == {"node-under-test"}

    # in a namespace of its own the agent cannot hear the kernel, and says what it does instead
    shown = subprocess.run(
        [*world.inside, *PLEXD, "audit", "--config", str(world.directory / "config.yaml")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line and not line.startswith("SOURCE")}
    assert rows["auditd"][1:3] == ["reading", "5"]
    assert rows["k8s-audit"][1:3] == ["reading", "5"]

    before = public_key(world)
    world.emit("rotate_keys", {})
    wait_until("the rotation was told", lambda: told(world, "mesh_key_rotated"))
    wait_until("the new key is in the kernel", lambda: public_key(world) != before)
    (rotated,) = told(world, "mesh_key_rotated")
    key = PublicKey.parse(public_key(world))
    assert rotated["object"] == {"fingerprint": hashlib.sha256(key).hexdigest()[:16]}

    assert world.end_agent() == 0
    (stopped,) = told(world, "agent_stopped")
    assert stopped["object"]["reason"] == "stop signal"


def test_what_happened_before_the_registration_is_told_after_it(world: World) -> None:
    world.plane.inject(endpoint="register", effect="status", status=503, count=None)
    world.put_token(world.plane.issue_token())
    world.start_agent()
    kept = world.data / "telemetry"
    wait_until("the start is on disk", lambda: list((kept / "audit-spool").glob("*.jsonl")))
    cursors = kept / "cursors.json"
    wait_until("the log is known", lambda: cursors.exists() and "auditd_log" in cursors.read_text())
    add_record(world, 0)
    wait_until("the registration has failed", lambda: len(world.plane.arrivals("register")) >= 1)
    world.kill_agent()
    world.plane.ask("DELETE", "/faults")
    world.start_agent()
    wait_until("the node is registered", world.plane.nodes)
    world.node_id = world.plane.nodes()[0]["id"]
    wait_until("both starts were told", lambda: len(told(world, "agent_started")) == 2)
    wait_until("the event was told", lambda: numbers(world)["auditd"] == [0])


def test_joining_and_leaving_are_told_though_no_daemon_runs(world: World) -> None:
    def plexd(command: str) -> None:
        run(*world.inside, *PLEXD, command, "--config", str(world.directory / "config.yaml"))

    world.put_token(world.plane.issue_token())
    plexd("join")
    world.node_id = world.plane.nodes()[0]["id"]
    world.start_agent()
    wait_until("the start was told", lambda: told(world, "agent_started"))
    assert [entry["event_type"] for entry in entries(world)][:2] == ["node_registered", "agent_started"]
    assert world.end_agent() == 0
    plexd("deregister")
    spool = world.data / "telemetry" / "audit-spool"
    lines = [json.loads(line) for path in sorted(spool.iterdir()) for line in path.read_text().splitlines()]
    assert lines[-1]["event_type"] == "node_deregistered"
    assert lines[-1]["object"]["node_id"] == world.node_id


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_whatever_dies_or_refuses(world: World, seed: int) -> None:
    chance = random.Random(seed)
    print(f"seed {seed}")
    world.register()
    written = 0
    for life in range(4):
        for _ in range(chance.randrange(1, 3)):
            world.plane.inject(endpoint="audit", count=chance.randrange(1, 3), **chance.choice(FAULTS))
            for _ in range(chance.randrange(50)):
                add_record(world, written)
                add_request(world, written)
                written += 1
            time.sleep(chance.uniform(0.0, 2.5))
        if chance.random() < 0.4:
            (world.directory / "audit.log").rename(world.directory / f"audit.log.{9 - life}")
            (world.directory / "audit.log").touch()
        world.end_agent(signal.SIGKILL)
        world.start_agent()
    world.plane.ask("DELETE", "/faults")
    add_record(world, written)
    add_request(world, written)
    written += 1

    def is_complete() -> bool:
        return all(set(found) == set(range(written)) for found in numbers(world).values())

    wait_until("everything arrived", is_complete, 2 * PATIENCE)
    for found in numbers(world).values():
        assert list(dict.fromkeys(found)) == list(range(written))
    assert not told(world, "TELEMETRY_GAP")
    starts = len(world.said("plexd started"))  # an agent may have been killed before it came to that
    assert starts
    wait_until("the starts were told", lambda: len(told(world, "agent_started")) >= starts)
