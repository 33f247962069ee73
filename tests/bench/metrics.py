"""What metrics of 1 000 peers cost at default intervals: all groups read, encoded and compressed; pings over loopback.

The dump of the device is in memory here; what reading it costs is among the figures of `kernel_peers`.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from pathlib import Path

from plexd.mesh.address import parse_endpoint, parse_ip
from plexd.mesh.desired import Desired, Peer
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PublicKey
from plexd.mesh.observed import Device, DevicePeer, Observed
from plexd.mesh.target import Target, TargetPeer
from plexd.node.connection_status import ConnectionStatus
from plexd.node.state import Node
from plexd.telemetry.metrics import Agent, Group, Latency, Metrics, System, Tunnel
from plexd.telemetry.window import Limits
from tests.bench.figure import Figure
from tests.node_harness import make_identity, make_node, settings_of
from tests.telemetry.harness import Plane, Stage

PEERS = 1000
CYCLES = 10
INTERVAL_SECONDS = 15.0  # the default


def measure() -> list[Figure]:
    return [asyncio.run(_cost())]


class Mesh:
    def __init__(self) -> None:
        settings = settings_of(make_identity())
        assert settings is not None
        keys = [number.to_bytes(32, "little") for number in range(1, PEERS + 1)]
        endpoints = [parse_endpoint(f"192.0.2.{number % 250 + 1}:{10_000 + number}") for number in range(PEERS)]
        peers = {
            f"n_{number}": TargetPeer(f"n_{number}", PublicKey(key), PresharedKey(bytes(32)), None, ())
            for number, key in enumerate(keys)
        }
        self._target = Target(settings, peers, frozenset())
        now = time.time()
        held = {
            key: DevicePeer(key, bytes(32), endpoint, 25, now - 30, 123_456, 654_321, ())  # type: ignore[arg-type]
            for key, endpoint in zip(keys, endpoints, strict=True)
        }
        self._observed = Observed(device=Device(None, 51820, 0, held))

    async def look(self) -> tuple[Target | None, Observed | None]:
        return self._target, self._observed


async def _cost() -> Figure:
    plane = Plane()
    raw_send = plane.send

    async def send(raw: bytes) -> int:
        await asyncio.to_thread(gzip.compress, raw, 6)
        return await raw_send(raw)

    plane.send = send  # type: ignore[method-assign]
    stage = Stage(plane, Limits(500, 1 << 20, 60.0, 20_000, 16 << 20))
    node = _node()
    latency = Latency(node, "lo", 3, 64, INTERVAL_SECONDS / 2)
    tunnel = Tunnel(Mesh(), latency.packet_loss_percent, 300.0)
    groups: list[Group] = [System(Path("/"), [], []), tunnel, latency, Agent(ConnectionStatus(), tunnel, latency, dict)]
    metrics = Metrics(stage.pipeline, groups, 1.0)  # the cycles one after the other
    stage.pipeline.sources[:] = [metrics]
    async with stage:
        await asyncio.sleep(2.0)
        cpu, before = time.process_time(), stage.pipeline.counters.collected
        await asyncio.sleep(CYCLES)
        cycles = (stage.pipeline.counters.collected - before) / (PEERS + 64 + 2)
        seconds = (time.process_time() - cpu) / max(cycles, 1)
    share = 100 * seconds / INTERVAL_SECONDS
    return Figure(f"metrics of {PEERS} peers at default intervals, of one core", share, "%", 1.0)


def _node() -> Node:
    node = make_node()
    peers = {}
    for number in range(PEERS):
        address = parse_ip(f"127.0.{number // 250}.{number % 250 + 2}")
        key = PublicKey(number.to_bytes(32, "big"))
        peers[f"n_{number}"] = Peer(f"n_{number}", key, address, "", (), NO_PRESHARED_KEY)
    node.desired = Desired(peers=peers)
    node.identity = node.identity.__class__("n_self", parse_ip("127.0.0.1"), node.identity.node_key, None)
    return node
