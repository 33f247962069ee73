"""Metrics: four groups, read side by side once an interval (docs/contract/telemetry.md §3).

A group that fails or takes too long yields no points in that cycle and harms no other. Points live in memory only.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from plexd.errors import NotPermitted
from plexd.linux import icmp, proc
from plexd.log import get_logger
from plexd.mesh.connectivity import Paths
from plexd.mesh.observed import Observed
from plexd.mesh.target import Target
from plexd.node.connection_status import ConnectionStatus, Stream
from plexd.node.state import Node
from plexd.telemetry.pipeline import Pipeline, SourceQueue, SourceState
from plexd.telemetry.records import metric_point
from plexd.wire.times import format_time

log = get_logger("telemetry")

GROUPS = ("system", "tunnel", "latency", "agent")
DEADLINE = 0.8  # of the interval
FIRST_CPU_SECONDS = 0.2
LOSS_PROBES = 20  # the newest ones of a peer tell its packet loss
LOSS_MIN_PROBES = 5
POINTS_AT_A_TIME = 100  # are written before others have their turn
NEVER = -1

Data = Mapping[str, Any]
T = TypeVar("T")


class Reading(NamedTuple):
    """What becomes a point; `peer_id` is empty where it is about no peer."""

    data: Data
    peer_id: str = ""


class Group(Protocol):
    @property
    def name(self) -> str: ...

    async def read(self) -> Sequence[Reading]: ...


class Mesh(Protocol):
    async def look(self) -> tuple[Target | None, Observed | None]: ...


class Metrics:
    """A source: all groups, in step. `interval` is in seconds."""

    name = "metrics"

    def __init__(self, pipeline: Pipeline, groups: Sequence[Group], interval: float) -> None:
        self._pipeline = pipeline
        self._groups = groups
        self._interval = interval
        self._feeds: dict[str, SourceQueue[None]] = {
            group.name: pipeline.feed(group.name, lambda _: None) for group in groups
        }

    async def collect(self) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            stamp = format_time(self._pipeline.now())
            await asyncio.gather(*(self._cycle(group, stamp) for group in self._groups))
            # ticks that were missed are skipped
            await asyncio.sleep(self._interval - (loop.time() - started) % self._interval)

    async def _cycle(self, group: Group, stamp: str) -> None:
        feed = self._feeds[group.name]
        try:
            async with asyncio.timeout(DEADLINE * self._interval):
                readings = await group.read()
        except Exception as exc:
            feed.note_error()
            if feed.row.state is not SourceState.FAILED:
                log.exception("metrics not read", group=group.name)
            feed.row.state, feed.row.detail = SourceState.FAILED, str(exc) or type(exc).__name__
            return
        if feed.row.state is SourceState.FAILED:
            log.info("metrics read again", group=group.name)
        feed.row.state, feed.row.detail = SourceState.READING, ""
        for number, reading in enumerate(readings, 1):
            feed.push(metric_point(stamp, group.name, reading.data, reading.peer_id), None)
            if not number % POINTS_AT_A_TIME:
                await asyncio.sleep(0)


class System:
    """The machine. `interfaces` are those whose traffic counts, empty for the usual ones; `own` are ours."""

    name = "system"

    def __init__(self, disk_path: Path, interfaces: Sequence[str], own: Sequence[str]) -> None:
        self._disk_path = disk_path
        self._interfaces = interfaces
        self._own = own
        self._cpu: proc.CpuTimes | None = None

    async def read(self) -> Sequence[Reading]:
        if self._cpu is None:
            self._cpu = _try(lambda: proc.parse_cpu_times(proc.read("stat")))
            await asyncio.sleep(FIRST_CPU_SECONDS)
        # a dead network file system must not hold up the loop
        return [Reading(await asyncio.to_thread(self._data))]

    def _data(self) -> Data:
        data: dict[str, Any] = {"cpu_count": proc.cpu_count()}
        for read in (self._cpu_usage, self._load, self._memory, self._disk, self._traffic, self._uptime):
            data |= _try(read) or {}  # a value that can't be read is left out
        return data

    def _cpu_usage(self) -> Data:
        before, self._cpu = self._cpu, proc.parse_cpu_times(proc.read("stat"))
        percent = proc.cpu_percent(before, self._cpu) if before is not None else None
        return {} if percent is None else {"cpu_usage_percent": round(percent, 2)}

    def _load(self) -> Data:
        one, five, fifteen = proc.parse_load(proc.read("loadavg"))
        return {"load_avg_1": one, "load_avg_5": five, "load_avg_15": fifteen}

    def _memory(self) -> Data:
        memory = proc.parse_memory(proc.read("meminfo"))
        return {
            "memory_total_bytes": memory["MemTotal"],
            "memory_used_bytes": memory["MemTotal"] - memory["MemAvailable"],
            "swap_total_bytes": memory["SwapTotal"],
            "swap_used_bytes": memory["SwapTotal"] - memory["SwapFree"],
        }

    def _disk(self) -> Data:
        return proc.disk(self._disk_path)

    def _traffic(self) -> Data:
        wanted = self._interfaces or proc.hardware_interfaces()
        total = proc.total_traffic(proc.parse_traffic(proc.read("net/dev")), wanted, self._own)
        return {"network_rx_bytes": total.rx_bytes, "network_tx_bytes": total.tx_bytes}

    def _uptime(self) -> Data:
        return {"uptime_seconds": proc.parse_uptime(proc.read("uptime"))}


class Latency:
    """Round trips to the peers, those of a cycle in turn. `available` is False where no ICMP socket may be opened."""

    name = "latency"

    def __init__(self, node: Node, interface: str, probes: int, max_peers: int, seconds: float) -> None:
        """`seconds` is what a cycle may take; with more peers than fit in, more of them wait for the next."""
        self.available = True
        self._node = node
        self._interface = interface
        self._probes = probes
        while max_peers > icmp.AT_ONCE and icmp.seconds_for(max_peers, probes) > seconds:
            max_peers -= icmp.AT_ONCE
        self._max_peers = max_peers
        self._last = ""  # the last peer of the cycle before
        self._answers: dict[str, deque[bool]] = {}

    async def read(self) -> Sequence[Reading]:
        peers = {peer.id: peer.mesh_ip for peer in self._node.desired.peers.values() if peer.mesh_ip}
        self._answers = {peer: answers for peer, answers in self._answers.items() if peer in peers}
        chosen = in_turn(sorted(peers), self._last, self._max_peers)
        if not chosen:
            return []
        own = [self._node.identity.mesh_ip]
        try:
            echoes = await icmp.probe(self._interface, own, {peer: peers[peer] for peer in chosen}, self._probes)
        except NotPermitted as exc:
            if self.available:
                log.warning("latency not measured", reason=str(exc), next_step="grant CAP_NET_RAW")
            self.available = False
            return []
        except OSError as exc:
            log.debug("latency not measured", reason=str(exc))
            return []
        self.available = True
        self._last = chosen[-1]
        return [self._reading(peer, echo) for peer, echo in echoes.items()]

    def packet_loss_percent(self, peer: str) -> float:
        answers = self._answers.get(peer, ())
        if len(answers) < LOSS_MIN_PROBES:
            return NEVER
        return round(100.0 * answers.count(False) / len(answers), 1)

    def _reading(self, peer: str, echoes: icmp.Echoes) -> Reading:
        received = len(echoes.rtts)
        self._answers.setdefault(peer, deque(maxlen=LOSS_PROBES)).extend(
            [True] * received + [False] * (echoes.sent - received)
        )
        data = {
            "peer_id": peer,
            "rtt_nano": int(statistics.median(echoes.rtts)) if received else NEVER,
            "rtt_min_nano": min(echoes.rtts, default=NEVER),
            "rtt_max_nano": max(echoes.rtts, default=NEVER),
            "probes_sent": echoes.sent,
            "probes_received": received,
        }
        return Reading(data, peer)


def in_turn(peers: Sequence[str], last: str, count: int) -> list[str]:
    """The next `count` of the sorted peers after `last`, from the beginning again behind the end."""
    start = next((index for index, peer in enumerate(peers) if peer > last), 0)
    return [*peers[start:], *peers[:start]][:count]


class Tunnel:
    """Every peer of the mesh as WireGuard sees it. `unknown` counts peers of the device that nobody wants."""

    name = "tunnel"

    def __init__(
        self,
        mesh: Mesh,
        packet_loss_percent: Callable[[str], float],
        stale_after: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.unknown = 0
        self._mesh = mesh
        self._packet_loss_percent = packet_loss_percent
        self._stale_after = stale_after
        self._now = now

    async def read(self) -> Sequence[Reading]:
        target, observed = await self._mesh.look()
        if target is None or observed is None or observed.device is None:
            return []
        held = observed.device.peers
        known = {bytes(peer.public_key) for peer in target.peers.values()}
        self.unknown = sum(key not in known for key in held)
        paths = Paths(peer.endpoint for peer in held.values() if peer.endpoint is not None)
        now = self._now()
        readings = []
        for peer in target.peers.values():
            device_peer = held.get(bytes(peer.public_key))
            if device_peer is None:
                continue
            shaken = device_peer.last_handshake
            age = max(0.0, now - shaken) if shaken else NEVER
            endpoint = device_peer.endpoint
            data = {
                "peer_id": peer.id,
                "last_handshake_time": format_time(shaken) if shaken else None,
                "handshake_age_seconds": round(age, 1),
                "handshake_succeeded": bool(shaken),
                "handshake_stale": bool(shaken) and age > self._stale_after,
                "rx_bytes": device_peer.rx_bytes,
                "tx_bytes": device_peer.tx_bytes,
                "packet_loss_percent": self._packet_loss_percent(peer.id),
                "path": paths.name(endpoint) if endpoint is not None else "direct",
            }
            readings.append(Reading(data, peer.id))
        return readings


class Agent:
    """This process. `pipelines` are asked for their gauges."""

    name = "agent"

    def __init__(
        self,
        connection: ConnectionStatus,
        tunnel: Tunnel,
        latency: Latency,
        pipelines: Callable[[], Mapping[str, Data]],
    ) -> None:
        self._connection = connection
        self._tunnel = tunnel
        self._latency = latency
        self._pipelines = pipelines
        self._started = time.monotonic()
        self._lag = 0.0
        self._pulse: asyncio.Task[None] | None = None

    async def read(self) -> Sequence[Reading]:
        if self._pulse is None or self._pulse.done():
            self._pulse = asyncio.create_task(self._feel_pulse(), name="event loop lag")
        connection, times = self._connection, proc.process_times()
        lag, self._lag = self._lag, 0.0
        last_event = connection.last_event_at
        data: dict[str, Any] = {
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "task_count": len(asyncio.all_tasks()),
            "cpu_seconds_total": round(times, 2),
            "gc_collections_total": sum(generation["collections"] for generation in gc.get_stats()),
            "event_loop_lag_ms_max": round(1000 * lag, 1),
            "reconnect_count": connection.reconnects,
            "stream_connected": connection.stream is Stream.CONNECTED,
            "last_event_age_seconds": NEVER if last_event is None else round(max(0.0, time.time() - last_event), 1),
            "heartbeats_sent_total": connection.heartbeats_taken + connection.heartbeats_failed,
            "heartbeats_failed_total": connection.heartbeats_failed,
            "reconcile_runs_total": connection.passes,
            "reconcile_errors_total": connection.failures,
            "drift_corrections_total": connection.corrections,
            "unknown_wg_peers": self._tunnel.unknown,
            "latency_available": self._latency.available,
            "pipelines": self._pipelines(),
        }
        readers: dict[str, Callable[[], int]] = {
            "rss_bytes": lambda: proc.parse_resident(proc.read("self/statm")),
            "open_fds": proc.open_files,
            "thread_count": lambda: proc.parse_threads(proc.read("self/stat")),
        }
        for name, read in readers.items():
            if (value := _try(read)) is not None:
                data[name] = value
        return [Reading(data)]

    async def _feel_pulse(self) -> None:
        """How late a timer of one second comes at worst."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 1.0
            await asyncio.sleep(1.0)
            self._lag = max(self._lag, loop.time() - due)


def _try(read: Callable[[], T]) -> T | None:
    """None for what can't be read here, or is written in a way nobody expected."""
    try:
        return read()
    except (OSError, ValueError, KeyError, IndexError, StopIteration) as exc:
        log.debug("value not read", error=str(exc))
        return None
