"""`plexd status` and `plexd peers` asked of a real agent in a real mesh."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from plexd.lab.nodes import ControlPlaneProcess, NodeProcess
from tests.agents import agents
from tests.namespaces import marks

pytestmark = marks(seconds=120)

LAB = f"plxq{os.getpid() % 100_000}"


class Lab:
    """Two agents and their control plane."""

    def __init__(self, plane: ControlPlaneProcess, nodes: list[NodeProcess]) -> None:
        self.plane = plane
        self.nodes = nodes

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The first agent."""
        return subprocess.run(
            [sys.executable, "-m", "plexd", *arguments, "--socket", str(self.nodes[0].api_socket)],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip

    def told(self, command: str) -> Any:
        return json.loads(self.ask(command, "--json").stdout or "null")

    def reaches(self, address: str) -> bool:
        command = self.nodes[0].namespace.command("ping", "-c", "1", "-W", "1", address)
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def lose_control_plane(self) -> None:
        with self._admin() as admin:
            admin.post("/listener/stop").raise_for_status()

    def give_peers(self, *wanted: dict[str, Any]) -> None:
        """To the first node, beside the second."""
        with self._admin() as admin:
            known = admin.get(f"/nodes/{self.nodes[0].name}/state").json()["peers"]
            members = {"members": {"peers": [*known, *wanted]}, "notify": True}
            admin.patch(f"/nodes/{self.nodes[0].name}/state", json=members).raise_for_status()

    def _admin(self) -> httpx.Client:
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.plane.admin_socket)), base_url="http://lab")


def wanted(number: int, **members: Any) -> dict[str, Any]:
    return {
        "id": f"n_x{number}",
        "public_key": base64.b64encode(bytes([number] * 32)).decode(),
        "mesh_ip": f"10.100.200.{number}",
        "endpoint": f"192.0.2.{100 + number}:51820",
        "allowed_ips": [f"10.100.200.{number}/32"],
        "psk": "",
    } | members


@pytest.fixture
def lab() -> Iterator[Lab]:
    with agents(LAB) as found:
        found.prepare()
        for node in found.nodes:
            node.start()
        yield Lab(found.plane, found.nodes)


def eventually(look: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 30
    while not is_right(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def test_agent_answers_what_the_kernel_shows(lab: Lab) -> None:
    node, other = lab.nodes
    eventually(lambda: lab.told("status"), lambda told: told is not None and told["state"] == "connected")
    (seen,) = eventually(lambda: lab.told("peers"), lambda found: len(found) == 1)
    eventually(lambda: lab.reaches(seen["mesh_ip"]), bool)  # a first packet may be lost with a first handshake
    # the other one may have spoken first, and from where is told as "roamed" until the control plane names the place
    named = {"state", "event", "report"}
    (peer,) = eventually(
        lambda: lab.told("peers"), lambda found: found[0]["connected"] and found[0]["endpoint_source"] in named
    )
    _, _, endpoint, allowed_ips, handshake, *_ = node.wg("show", node.interface, "dump").splitlines()[1].split("\t")
    assert (peer["endpoint"], peer["allowed_ips"]) == (endpoint, allowed_ips.split(","))
    assert peer["endpoint"].startswith("192.0.2.")
    assert peer["path"] == "direct"
    assert int(handshake) > 0
    assert peer["rx_bytes"] > 0
    assert peer["public_key"] == other.wg("show", other.interface, "public-key").strip()
    status = lab.told("status")
    assert status["mesh"] == {"interface": node.interface, "up": True, "listen_port": 51820, "peer_count": 1}
    assert status["control_plane"]["event_stream"] == "connected"

    lab.give_peers(wanted(1), wanted(2, endpoint=""), wanted(3, public_key="no key"))
    found = eventually(lambda: lab.told("peers"), lambda found: len(found) == 4)
    reasons = {peer["id"]: peer["obstacle"] and peer["obstacle"]["code"] for peer in found}
    assert reasons == {peer["id"]: None, "n_x1": "no_handshake", "n_x2": "no_endpoint", "n_x3": "rejected"}
    lines = lab.ask("peers").stdout.splitlines()
    assert lines[0].split() == ["ID", "MESH-IP", "ENDPOINT", "HANDSHAKE", "RX", "TX", "PATH"]
    assert "direct, endpoint from" in lines[1]
    assert all("not connected: " in line for line in lines[2:])


def test_agent_tells_of_a_lost_control_plane_and_is_gone_after_its_stop(lab: Lab) -> None:
    node = lab.nodes[0]
    eventually(lambda: lab.told("status"), lambda told: told is not None and told["state"] == "connected")
    lab.lose_control_plane()
    status = eventually(lambda: lab.told("status"), lambda told: told["state"] == "degraded")
    assert status["control_plane"]["last_heartbeat_ok"] is False
    assert status["mesh"]["up"] is True
    os.kill(node.pid, signal.SIGTERM)
    eventually(node.api_socket.exists, lambda there: not there)
    assert lab.ask("status").returncode == 3
