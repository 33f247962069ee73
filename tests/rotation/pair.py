"""Two real agents with a mesh between them, whose WireGuard keys are rotated, and a stream of pings through it."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from plexd.lab.namespaces import LabError, Network
from plexd.lab.nodes import MESH_PORT, NodeProcess
from plexd.mesh.keys import PrivateKey
from tests.agents import agents
from tests.rotation.relay import PORTS

PATIENCE_SECONDS = 60.0
PING_SECONDS = 0.01
_REPLY = re.compile(rb"^\[(\d+\.\d+)\] \d+ bytes from .* icmp_seq=(\d+) ")


class Pings:
    """One every 10 ms until the end of the context; `replies` has the time (Unix seconds) each answer came at."""

    def __init__(self, node: NodeProcess, address: str) -> None:
        self.replies: list[float] = []
        command = node.namespace.command("ping", "-n", "-D", "-i", str(PING_SECONDS), address)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Pings:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._reader.join()

    def _read(self) -> None:
        with self._process:
            self._note(self._process.stdout or ())

    def _note(self, output: Iterable[bytes]) -> None:
        for line in output:
            if (reply := _REPLY.match(line)) is not None:
                self.replies.append(float(reply[1]))

    def came_since(self, moment: float) -> bool:
        return bool(self.replies) and self.replies[-1] > moment

    def longest_gap(self, since: float, until: float) -> float:
        """The longest time without an answer, beyond what lies between two pings anyway."""
        times = [at for at in list(self.replies) if at >= since - 1]
        pairs = itertools.pairwise(times)
        gaps = (later - sooner for sooner, later in pairs if later > since and sooner < until)
        return max(gaps, default=until - since) - PING_SECONDS


class Pair:
    def __init__(self, one: NodeProcess, other: NodeProcess, admin_socket: Path) -> None:
        self.nodes = (one, other)
        self.ids: dict[str, str] = {}
        self.addresses: dict[str, str] = {}
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(admin_socket)), base_url="http://admin", timeout=10, trust_env=False
        )

    def close(self) -> None:
        self._client.close()

    def wait_for_mesh(self) -> None:
        self.wait("the registration", lambda: len(self.ask("GET", "/nodes")) == 2)
        for node in self.ask("GET", "/nodes"):
            self.ids[node["hostname"]], self.addresses[node["hostname"]] = node["id"], node["mesh_ip"]
        for node in self.nodes:
            self.wait("the mesh", partial(self.reaches, node))

    def other(self, node: NodeProcess) -> NodeProcess:
        return self.nodes[1 - self.nodes.index(node)]

    def ping(self, node: NodeProcess) -> Pings:
        """From this node to the other one."""
        return Pings(node, self.addresses[self.other(node).name])

    def reaches(self, node: NodeProcess) -> bool:
        address = self.addresses[self.other(node).name]
        command = node.namespace.command("ping", "-n", "-c", "1", "-W", "1", address)
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def order_rotation(self, node: NodeProcess) -> None:
        self.ask("POST", f"/nodes/{node.name}/events", {"event_type": "rotate_keys"})

    def public_key(self, node: NodeProcess) -> str:
        """What the control plane holds."""
        return str(self.ask("GET", f"/nodes/{node.name}")["public_key"])

    def agree(self) -> bool:
        """Whether disk, device, control plane and the other device have one key for each node, and no other peer."""
        return all(self._agree_on(node) for node in self.nodes)

    def _agree_on(self, node: NodeProcess) -> bool:
        data, key = node.directory / "data", self.public_key(node)
        try:
            stored = PrivateKey.parse((data / "private_key").read_text(encoding="ascii"))
            device = node.wg("show", node.interface, "public-key").strip()
            other = self.other(node)
            peers = other.wg("show", other.interface, "peers").split()
        except (FileNotFoundError, LabError):
            return False
        return str(stored.public()) == device == key and peers == [key] and not (data / "private_key.pending").exists()

    def preshared_keys(self) -> set[str]:
        """Of both ends; one when they agree."""
        shown = (node.wg("show", node.interface, "preshared-keys").split() for node in self.nodes)
        return {word for words in shown for word in words[1::2]}

    def ask(self, method: str, path: str, body: object = None) -> Any:
        answer = self._client.request(method, path, json=body)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def wait(self, what: str, condition: Callable[[], bool], poll_seconds: float = 0.02) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(node.last_log_lines() for node in self.nodes)
                raise TimeoutError(f"no sign of {what} within {PATIENCE_SECONDS:.0f} s\n{logs}")
            time.sleep(poll_seconds)


@contextlib.contextmanager
def _longer_way(network: Network, seconds: float, *nodes: NodeProcess) -> Iterator[None]:
    """Each node is known by a port of the hub, where what is sent to it waits; before they start."""
    hub = network.address(0)
    ends = [f"{network.address(node.number)}:{MESH_PORT}" for node in nodes]
    command = network.hub.command(sys.executable, "-m", "tests.rotation.relay", str(seconds), hub, *ends)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as relay:
        try:
            assert relay.stdout is not None
            assert relay.stdout.readline() == b"open\n"
            for node, end, port in zip(nodes, ends, PORTS, strict=True):
                config = node.directory / "config.yaml"
                config.write_text(config.read_text(encoding="utf-8").replace(end, f"{hub}:{port}"), encoding="utf-8")
            yield
        finally:
            relay.kill()


@contextlib.contextmanager
def running_pair(lab: str, way_seconds: float = 0.0) -> Iterator[Pair]:
    """Both registered, and each reached by the other's pings; a datagram takes `way_seconds` from one to the other."""
    with agents(lab) as found, contextlib.ExitStack() as stack:
        network, plane, (one, other) = found
        found.prepare()
        if way_seconds:
            stack.enter_context(_longer_way(network, way_seconds, one, other))
        for node in (one, other):
            node.start()
        pair = stack.enter_context(contextlib.closing(Pair(one, other, plane.admin_socket)))
        pair.wait_for_mesh()
        yield pair
