"""A real agent's front door beside a real control plane: what programs on the node read, and what they report."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import MARKS, PATIENCE, PLEXD, Peer, World, wait_until

pytestmark = [*MARKS, pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")]


def curl(world: World, method: str, route: str, body: Any = None) -> tuple[int, Any]:
    """Status and document."""
    command = ["curl", "-sS", "--max-time", "30", "--unix-socket", str(world.directory / "api.sock"), "-X", method]
    if body is not None:
        command += ["--data-binary", json.dumps(body)]
    done = subprocess.run(
        [*command, "-w", "\n%{http_code}", f"http://plexd{route}"], capture_output=True, text=True, check=False
    )
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text) if text else None


def held(world: World) -> Any:
    """The reports that the control plane has, by key."""
    arrived: dict[str, Any] = {}
    for arrival in world.plane.arrivals("report"):
        if arrival["status"] == 204:
            arrived |= {entry["key"]: entry["payload"] for entry in arrival["body"]["entries"]}
            for key in arrival["body"]["deleted"]:
                arrived.pop(key, None)
    return arrived


def test_state_of_the_control_plane_is_read_by_programs_here(world: World) -> None:
    world.plane.ask("PUT", f"/nodes/{world.node_id}/data/a/b", {"payload": {"retries": 3}})
    world.plane.ask("PATCH", f"/nodes/{world.node_id}/state", {"members": {"metadata": {"region": "eu-1"}}})
    wait_until("the metadata is here", lambda: curl(world, "GET", "/v1/state/metadata")[1] == {"region": "eu-1"})
    status, entry = curl(world, "GET", "/v1/state/data/a%2Fb")
    assert (status, entry["payload"]) == (200, {"retries": 3})
    before = curl(world, "GET", "/v1/state")[1]["revision"]
    order = {"members": {"metadata": {"region": "us-1"}}, "notify": True}
    world.plane.ask("PATCH", f"/nodes/{world.node_id}/state", order)
    status, summary = curl(world, "GET", f"/v1/state?since={before}&wait=30s")
    assert (status, summary["metadata"]) == (200, {"region": "us-1"})
    assert json.loads((world.data / "state" / "metadata.json").read_text()) == {"region": "us-1"}


SECRET = "pa55-wörd-of-the-scan"


def test_secret_that_was_read_a_hundred_times_is_nowhere(world: World) -> None:
    world.plane.ask("PUT", f"/nodes/{world.node_id}/secrets/db/pass", {"value": SECRET})
    for _ in range(100):
        status, document = curl(world, "GET", "/v1/state/secrets/db%2Fpass")
        assert (status, document) == (200, {"key": "db/pass", "value": SECRET, "version": 1})
    assert len(world.said("secret read", key="db/pass", outcome="ok")) == 100
    (name,) = (each for each in curl(world, "GET", "/v1/state/secrets")[1] if each["key"] == "db/pass")
    assert name["version"] == 1
    spelled = {SECRET.encode(), base64.b64encode(SECRET.encode()), json.dumps(SECRET)[1:-1].encode()}
    answers = world.plane.ask("GET", f"/nodes/{world.node_id}/state")
    assert SECRET not in json.dumps(answers, ensure_ascii=False)
    places = [path for path in world.directory.rglob("*") if path.is_file()]
    assert {"agent.log", "secrets.json", "identity.json"} <= {path.name for path in places}
    proc = Path("/proc") / str(world.agent_pid)
    for place in (*places, proc / "cmdline", proc / "environ"):
        content = place.read_bytes()
        assert [form for form in spelled if form in content] == [], place
    assert "Max core file size        0                    0" in (proc / "limits").read_text()


def test_secret_is_not_given_without_the_control_plane_and_state_is(world: World) -> None:
    world.plane.ask("PUT", f"/nodes/{world.node_id}/secrets/mail", {"value": SECRET})
    assert curl(world, "GET", "/v1/state/secrets/mail")[0] == 200
    world.plane.ask("POST", "/listener/stop")
    try:
        status, document = curl(world, "GET", "/v1/state/secrets/mail")
        assert (status, document["code"]) == (503, "control_plane_unavailable")
        assert curl(world, "GET", "/v1/state/data")[0] == 200
    finally:
        world.plane.ask("POST", "/listener/start")
    wait_until("secrets are back", lambda: curl(world, "GET", "/v1/state/secrets/mail")[0] == 200)


def test_report_arrives_after_an_outage_with_a_killed_agent_in_it(world: World) -> None:
    world.plane.ask("PATCH", f"/nodes/{world.node_id}/state", {"members": {"metadata": {"region": "ap-1"}}})
    wait_until("the metadata is here", lambda: curl(world, "GET", "/v1/state/metadata")[1] == {"region": "ap-1"})
    report = {"content_type": "application/json", "payload": {"ok": True}}
    assert curl(world, "PUT", "/v1/state/report/kept", report)[0] == 200
    assert curl(world, "PUT", "/v1/state/report/gone", report)[0] == 200
    wait_until("both reports have arrived", lambda: held(world) == {"kept": {"ok": True}, "gone": {"ok": True}})

    world.plane.ask("POST", "/listener/stop")
    assert curl(world, "PUT", "/v1/state/report/kept", report | {"payload": {"ok": False}})[0] == 200
    assert curl(world, "DELETE", "/v1/state/report/gone")[0] == 204
    world.kill_agent()
    world.start_agent()
    answers: list[Any] = []
    try:
        wait_until("the agent serves", lambda: first_answer(world, "/v1/state/metadata", answers))
        assert curl(world, "GET", "/v1/state/report/kept")[1]["sync"] == "pending"
        assert held(world) == {"kept": {"ok": True}, "gone": {"ok": True}}
    finally:
        world.plane.ask("POST", "/listener/start")
    assert answers == [{"region": "ap-1"}]
    wait_until("what happened meanwhile has arrived", lambda: held(world) == {"kept": {"ok": False}})
    wait_until("nothing is due", lambda: curl(world, "GET", "/v1/status")[1]["counts"]["reports_pending"] == 0)


def first_answer(world: World, route: str, answers: list[Any]) -> bool:
    """Whether there was one; it is the last of `answers` then."""
    status, document = curl(world, "GET", route)
    if status:
        answers.append(document)
    return bool(status)


def why(world: World, name: str) -> tuple[int, str]:
    """Exit code, and the code of the obstacle."""
    socket = str(world.directory / "api.sock")
    done = subprocess.run(
        [*PLEXD, "why", name, "--json", "--socket", socket], capture_output=True, text=True, check=False
    )
    return done.returncode, (json.loads(done.stdout).get("obstacle") or {}).get("code", "")


FAULTY: dict[str, dict[str, Any]] = {
    "no_handshake": {},
    "no_endpoint": {"endpoint": ""},
    "endpoint_unresolved": {"endpoint": "nowhere.invalid:51820"},
    "prefix_lost": {"mesh_ip": "10.101.0.2", "allowed_ips": ["10.101.0.2/32"]},
    "rejected": {"public_key": "x"},
}


@pytest.mark.parametrize("reason", FAULTY)
def test_why_names_the_fault_that_was_injected(world: World, reason: str) -> None:
    healthy, faulty = world.peers[0], Peer(77)
    wire = [healthy.wire, faulty.wire | FAULTY[reason]]
    world.plane.ask("PATCH", f"/nodes/{world.node_id}/state", {"members": {"peers": wire}})
    try:
        wait_until(f"the reason is {reason}", lambda: why(world, "n_77") == (1, reason))
        if reason == "no_handshake":
            assert why(world, "10.101.0.77") == (1, reason)
            assert why(world, "10.101.0.78")[0] == 4
    finally:
        world.set_peers(*world.peers)
    wait_until("the mesh is whole", world.mesh_is_whole)


def test_configuration_is_read_again_by_signal_and_by_command(world: World) -> None:
    config = world.directory / "config.yaml"
    before = config.read_text()
    plexd = [*PLEXD, "reload", "--socket", str(world.directory / "api.sock")]
    pids = world.pids()
    try:
        config.write_text(
            before.replace("interval: 1s", "interval: 2s").replace("log_level: debug", "log_level: info")
            + "systemd:\n  unit: other.service\nnat_traversal:\n  enabled: false\n"
        )
        said = subprocess.run(plexd, capture_output=True, text=True, check=True).stdout.splitlines()
        assert said == [
            "changed: log_level, reconcile.interval, nat_traversal.enabled",
            "restart required: systemd.unit",
        ]
        config.write_text("api: [\n")
        os.kill(world.agent_pid, signal.SIGHUP)
        wait_until("the mistake is told", lambda: world.said("configuration not reloaded"))
        refused = subprocess.run(plexd, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "is not valid YAML" in refused.stderr
    finally:
        config.write_text(before)
    count = len(world.said("configuration reloaded"))
    os.kill(world.agent_pid, signal.SIGHUP)
    wait_until("the old configuration is back", lambda: len(world.said("configuration reloaded")) > count)
    world.wait_for_ack(world.emit_action())
    assert world.mesh_is_whole()
    assert world.pids() == pids


def test_stop_sends_what_is_due_and_ends_those_who_wait(world: World) -> None:
    revision = curl(world, "GET", "/v1/state")[1]["revision"]
    socket = str(world.directory / "api.sock")
    with subprocess.Popen(
        [
            "curl",
            "-sS",
            "--unix-socket",
            socket,
            "-w",
            "%{http_code}",
            f"http://plexd/v1/state?since={revision + 1}&wait=60s",
        ],
        stdout=subprocess.PIPE,
    ) as waiting:
        assert curl(world, "PUT", "/v1/state/report/last", {"content_type": "a/b", "payload": 1})[0] == 200
        assert world.end_agent(signal.SIGTERM) == 0
        assert waiting.stdout is not None
        assert waiting.stdout.read() == b"304"
    (arrival,) = world.plane.wait_for("report", contains={"entries": [{"key": "last"}]}, timeout=PATIENCE)
    assert arrival["status"] == 204
    assert not Path(socket).exists()
    world.start_agent()
    wait_until("the agent serves again", lambda: first_answer(world, "/v1/status", []))
