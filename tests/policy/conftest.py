"""Two real agents in namespaces that enforce policy, and the control plane that tells them which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import pytest

from plexd.lab.admin import Admin
from plexd.lab.namespaces import LabError
from plexd.lab.nodes import NodeProcess
from tests.agents import Agents, agents

LAB = f"plxp{os.getpid() % 100_000}"
DEADLINE_SECONDS = 30.0

T = TypeVar("T")


def allow(src: str, dst: str, port: int = 0, protocol: str = "") -> dict[str, Any]:
    return {"src": src, "dst": dst, "port": port, "protocol": protocol, "action": "allow"}


def eventually(look: Callable[[], T]) -> T:
    """What there is to see as soon as there is; the last look's answer, or error, when the deadline is over."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            if seen := look():
                return seen
        except LabError:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, seen
        time.sleep(0.02)


class Mesh:
    """`one` and `two` reach each other as far as the policies let them; `start` begins without any."""

    def __init__(self, agents: Agents) -> None:
        self.network = agents.network
        self.plane = agents.plane
        self.one, self.two = agents.nodes
        self._agents = agents
        self.ids: dict[str, str] = {}
        self.addresses: dict[str, str] = {}

    def start(self) -> None:
        self._agents.prepare()
        self.set_policies()
        for node in (self.one, self.two):
            node.start()
        with Admin(self.plane.admin_socket) as admin:
            nodes = eventually(lambda: found if len(found := admin.nodes()) == 2 else [])
        self.ids = {node.hostname: node.node_id for node in nodes}
        self.addresses = {node.hostname: node.mesh_ip for node in nodes}
        for node in (self.one, self.two):
            eventually(partial(node.namespace.run, "nft", "list", "table", "inet", "plexd"))

    def set_policies(self, *rules: dict[str, Any]) -> None:
        """One policy of these rules, or none at all."""
        with Admin(self.plane.admin_socket) as admin:
            admin.set_policies([{"id": "test", "rules": list(rules)}] if rules else [])

    def corrections(self, node: NodeProcess) -> list[str]:
        with Admin(self.plane.admin_socket) as admin:
            return [f"{c['type']} {c['detail']}" for c in admin.corrections(self.ids[node.name])]

    def peers_of(self, node: NodeProcess) -> int:
        return len(node.wg("show", node.interface, "peers").split())

    def told(self, node: NodeProcess, command: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "plexd", command, "--json", "--socket", str(node.api_socket)],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return json.loads(done.stdout or "null")

    def conditions(self, node: NodeProcess) -> dict[str, str]:
        status = self.told(node, "status") or {"conditions": []}
        return {finding["code"]: finding["text"] for finding in status["conditions"]}

    def ping(self, source: NodeProcess, address: str) -> bool:
        command = source.namespace.command("ping", "-n", "-c", "1", "-W", "1", address)
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def prepared() -> Iterator[Mesh]:
    """Nothing of it runs yet."""
    with agents(LAB) as found:
        yield Mesh(found)


@pytest.fixture
def mesh(prepared: Mesh) -> Mesh:
    prepared.start()
    return prepared
