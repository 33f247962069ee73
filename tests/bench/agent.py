"""A real agent beside a real control plane: how soon the mesh stands after a start, and what it takes to keep it."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from plexd.lab.admin import Admin
from plexd.lab.namespaces import LabError, Network
from plexd.lab.nodes import ControlPlaneProcess, NodeProcess, remove_leftovers
from tests.bench.figure import Figure

LAB = "plexd-bench"
STARTS = 5
SETTLE_SECONDS = 20.0
IDLE_SECONDS = 60.0
MANY = 10_000


def measure() -> list[Figure]:
    directory = Path(tempfile.mkdtemp(prefix=LAB))
    network = Network(LAB)
    try:
        network.build(1)
        plane = ControlPlaneProcess(network, directory)
        plane.start()
        node = NodeProcess(1, network, directory, plane.url, plane.tls / "ca.pem", LAB)
        with Admin(plane.admin_socket) as admin:
            node.prepare(admin.issue_token())
        _use_default_intervals(node)
        node.start()
        _wait(lambda: _peers(node) == 0)
        figures = _memory(node, 0)
        _give_peers(plane.admin_socket, node.name, 10)
        _wait(lambda: _peers(node) == 10)
        figures.append(Figure("`plexd up` to mesh configured, 10 peers, median of 5", _start_seconds(node), "s", 1.2))
        _give_peers(plane.admin_socket, node.name, 100)
        _wait(lambda: _peers(node) == 100)
        figures += _memory(node, 100)
        figures += _commands(node)
        figures.append(Figure("idle CPU over a minute, 100 peers", _busy_percent(node), "% of a core", 0.3))
        _give_peers(plane.admin_socket, node.name, MANY)
        _wait(lambda: _peers(node) == MANY)
        return figures + _memory(node, MANY, rss=100, anonymous=80)
    finally:
        remove_leftovers(LAB, directory, network)
        shutil.rmtree(directory, ignore_errors=True)


def _use_default_intervals(node: NodeProcess) -> None:
    """The lab's own are short."""
    config = node.directory / "config.yaml"
    text = config.read_text(encoding="utf-8")
    for block in ("heartbeat:\n  interval: 5s\n", "reconcile:\n  interval: 2s\n"):
        assert block in text
        text = text.replace(block, "")
    config.write_text(text, encoding="utf-8")


def _peers(node: NodeProcess) -> int:
    """How many the device holds, -1 while there is none."""
    try:
        return len(node.wg("show", node.interface, "peers").split())
    except LabError:  # wg complains until the interface is there
        return -1


def _give_peers(socket: Path, node: str, count: int) -> None:
    peers = [
        {
            "id": f"n_{number}",
            "public_key": base64.b64encode(number.to_bytes(32, "little")).decode(),
            "mesh_ip": f"10.200.{number // 250}.{number % 250 + 1}",
            "endpoint": f"198.18.{number // 250}.{number % 250 + 1}:51820",  # beyond a router: no ARP for each
            "allowed_ips": [f"10.200.{number // 250}.{number % 250 + 1}/32"],
            "psk": "",
        }
        for number in range(1, count + 1)
    ]
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://admin") as client:
        client.patch(f"/nodes/{node}/state", json={"members": {"peers": peers}}).raise_for_status()
        client.post(f"/nodes/{node}/events", json={"event_type": "policy_updated"}).raise_for_status()  # pull it


def _start_seconds(node: NodeProcess) -> float:
    """From nothing but a stored identity: no process, no interface."""
    seconds = []
    for _ in range(STARTS):
        node.kill()
        node.namespace.run("ip", "link", "delete", node.interface)
        _wait(lambda: _peers(node) == -1)
        started = time.perf_counter()
        node.start()
        _wait(lambda: _peers(node) == 10)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[STARTS // 2]


def _busy_percent(node: NodeProcess) -> float:
    """Of the agent alone: the WireGuard program, which is the kernel elsewhere, has an account of its own."""
    before = _ticks(node)
    time.sleep(IDLE_SECONDS)
    return (_ticks(node) - before) / os.sysconf("SC_CLK_TCK") / IDLE_SECONDS * 100


def _ticks(node: NodeProcess) -> int:
    fields = Path(f"/proc/{node.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # user and system, without the children


def _commands(node: NodeProcess) -> list[Figure]:
    """Whole processes, as a person waits for them."""
    commands = {"--help": (), "status": ("--socket", str(node.api_socket))}
    return [
        Figure(f"`plexd {word}`, median of {STARTS}", _run_seconds(word, *more), "s", 0.3)
        for word, more in commands.items()
    ]


def _run_seconds(*arguments: str) -> float:
    plexd = Path(sys.executable).with_name("plexd")
    seconds = []
    for _ in range(STARTS):
        started = time.perf_counter()
        subprocess.run([plexd, *arguments], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[STARTS // 2]


def _memory(node: NodeProcess, peers: int, rss: int = 64, anonymous: int = 45) -> list[Figure]:
    time.sleep(SETTLE_SECONDS)  # the figure is about the steady state, not about a moment
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{node.pid}/status").read_text(encoding="ascii").splitlines()
    )
    megabytes = {name: int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}
    return [
        Figure(f"RSS with {peers} peers", megabytes["VmRSS"], "MiB", rss),
        Figure(f"RssAnon with {peers} peers", megabytes["RssAnon"], "MiB", anonymous),
    ]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the agent did not come that far within 30 s")
        time.sleep(0.005)
