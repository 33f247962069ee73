"""Groups of metrics: what their points say, when they are read, and that none harms another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from plexd.errors import NotPermitted
from plexd.linux import icmp, proc
from plexd.mesh.address import parse_endpoint
from plexd.mesh.observed import Device, DevicePeer, Observed
from plexd.mesh.target import Target, TargetPeer
from plexd.node.connection_status import ConnectionStatus, Stream
from plexd.telemetry.metrics import Agent, Latency, Metrics, Reading, System, Tunnel, in_turn
from plexd.telemetry.window import Limits
from tests.node_harness import EPOCH, make_identity, make_node, peer, public_key, settings_of
from tests.telemetry.harness import Plane, Stage
from tests.virtual_time import run_virtual

LIMITS = Limits(500, 1 << 20, 1.0, 20_000, 16 << 20)


class Scripted:
    """A group that does one thing after the other: seconds to take, or an error to raise."""

    def __init__(self, name: str, *steps: float | Exception) -> None:
        self.name = name
        self.steps = list(steps)
        self.times: list[float] = []

    async def read(self) -> Sequence[Reading]:
        self.times.append(asyncio.get_running_loop().time())
        step = self.steps.pop(0) if self.steps else 0.0
        if isinstance(step, Exception):
            raise step
        await asyncio.sleep(step)
        return [Reading({"value": 1})]


def collect(seconds: float, *groups: Scripted, limits: Limits = LIMITS) -> tuple[list[Any], Stage]:
    """The points that were taken within that time, and the stage."""
    stages: list[Stage] = []

    async def main() -> None:
        stage = Stage(limits=limits)
        stages.append(stage)
        stage.pipeline.sources[:] = [Metrics(stage.pipeline, groups, 15.0)]
        async with stage:
            await asyncio.sleep(seconds)

    run_virtual(main())
    return stages[0].plane.taken, stages[0]


def test_first_cycle_is_at_once_and_all_groups_share_its_time() -> None:
    points, _ = collect(63.0, Scripted("system"), Scripted("agent"))
    assert len(points) == 10
    assert {point["timestamp"] for point in points[:2]} == {"2027-01-15T08:00:00Z"}
    assert [point["group"] for point in points[:2]] == ["system", "agent"]
    assert len({point["timestamp"] for point in points}) == 5


def test_missed_ticks_are_skipped() -> None:
    slow = Scripted("system", 11.0)
    slow.steps = [11.0, 11.0]
    collect(62.0, slow)
    assert slow.times == [0, 15, 30, 45, 60]


def test_group_that_fails_or_hangs_harms_no_other() -> None:
    bad = Scripted("tunnel", ValueError("odd"), ValueError("odd"), 1000.0)
    with capture_logs() as logs:
        points, stage = collect(63.0, bad, Scripted("system"))
    assert [point["group"] for point in points].count("system") == 5
    assert [point["group"] for point in points].count("tunnel") == 2
    assert stage.pipeline.counters.source_errors == 3
    assert [line["event"] for line in logs] == ["metrics not read", "metrics read again"]


@pytest.mark.virtual_time
async def test_points_live_in_memory_and_the_oldest_give_way() -> None:
    stage = Stage(Plane(seconds=1e9), Limits(2, 1 << 20, 15.0, 6, 16 << 20))
    stage.pipeline.sources[:] = [Metrics(stage.pipeline, [Scripted("system")], 15.0)]
    async with stage:
        await asyncio.sleep(15 * 20)
        assert stage.pipeline.window.count == 6
        assert stage.pipeline.counters.dropped.total() == stage.pipeline.counters.collected - 6 > 0


def test_system_reads_this_machine() -> None:
    (reading,) = asyncio.run(System(Path("/"), [], ["plexd0"]).read())
    assert reading.data.keys() == {
        "cpu_usage_percent", "cpu_count", "load_avg_1", "load_avg_5", "load_avg_15", "memory_total_bytes",
        "memory_used_bytes", "swap_total_bytes", "swap_used_bytes", "disk_total_bytes", "disk_used_bytes",
        "disk_free_bytes", "network_rx_bytes", "network_tx_bytes", "uptime_seconds",
    }  # fmt: skip
    assert 0 <= reading.data["cpu_usage_percent"] <= 100


def test_value_that_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(name: str) -> str:
        if name == "meminfo":
            raise OSError("not here")
        return "nonsense" if name == "loadavg" else Path("/proc", name).read_text()

    monkeypatch.setattr(proc, "read", read)
    (reading,) = asyncio.run(System(Path("/nowhere"), [], []).read())
    assert not {"memory_total_bytes", "load_avg_1", "disk_total_bytes"} & reading.data.keys()
    assert "uptime_seconds" in reading.data


def held(number: int, handshake: float, endpoint: str = "") -> DevicePeer:
    where = parse_endpoint(endpoint) if endpoint else None
    return DevicePeer(bytes(public_key(number)), bytes(32), where, 25, handshake, 1000 + number, 2000, ())  # type: ignore[arg-type]


class Mesh:
    def __init__(self, wanted: Sequence[int], device: Device | None) -> None:
        settings = settings_of(make_identity())
        assert settings is not None
        peers = {f"n_{n}": TargetPeer(f"n_{n}", public_key(n), None, None, ()) for n in wanted}  # type: ignore[arg-type]
        self.target = Target(settings, peers, frozenset())
        self.device = device

    async def look(self) -> tuple[Target | None, Observed | None]:
        return self.target, Observed(device=self.device)


def read_tunnel(mesh: Mesh, loss: float = -1) -> tuple[dict[str, Any], Tunnel]:
    tunnel = Tunnel(mesh, lambda _: loss, 300.0, now=lambda: EPOCH)
    return {reading.peer_id: reading.data for reading in asyncio.run(tunnel.read())}, tunnel


def device(*peers: DevicePeer) -> Device:
    return Device(None, 51820, 0, {peer.public_key: peer for peer in peers})


def test_tunnel_tells_of_every_peer() -> None:
    found, _ = read_tunnel(Mesh([2, 3, 4], device(held(2, EPOCH - 39), held(3, 0), held(4, EPOCH - 301))), 5.0)
    assert found["n_2"] == {
        "peer_id": "n_2", "last_handshake_time": "2027-01-15T07:59:21Z", "handshake_age_seconds": 39.0,
        "handshake_succeeded": True, "handshake_stale": False, "rx_bytes": 1002, "tx_bytes": 2000,
        "packet_loss_percent": 5.0, "path": "direct",
    }  # fmt: skip
    never = found["n_3"]
    assert (never["last_handshake_time"], never["handshake_age_seconds"]) == (None, -1)
    assert (never["handshake_succeeded"], never["handshake_stale"]) == (False, False)
    assert found["n_4"]["handshake_stale"]


def test_age_of_a_handshake_is_never_negative() -> None:
    found, _ = read_tunnel(Mesh([2], device(held(2, EPOCH + 50))))
    assert found["n_2"]["handshake_age_seconds"] == 0.0


def test_peers_at_the_same_endpoint_are_behind_a_relay() -> None:
    relayed = "198.51.100.1:51821"
    found, _ = read_tunnel(Mesh([2, 3, 4], device(held(2, 0, relayed), held(3, 0, relayed), held(4, 0, "192.0.2.1:1"))))
    assert [found[f"n_{n}"]["path"] for n in (2, 3, 4)] == ["relay", "relay", "direct"]


def test_unknown_peers_of_the_device_are_counted_only() -> None:
    found, tunnel = read_tunnel(Mesh([2], device(held(2, 0), held(9, 0))))
    assert found.keys() == {"n_2"}
    assert tunnel.unknown == 1


def test_no_interface_is_no_error() -> None:
    assert read_tunnel(Mesh([2], None))[0] == {}


def make_latency(
    monkeypatch: pytest.MonkeyPatch, rtts: dict[str, list[int]], peers: int = 3, at_once: int = 64
) -> Latency:
    async def probe(_interface: str, _own: object, chosen: dict[str, bytes], probes: int) -> dict[str, icmp.Echoes]:
        return {peer: icmp.Echoes(probes, list(rtts.get(peer, []))) for peer in chosen}

    monkeypatch.setattr(icmp, "probe", probe)
    return Latency(make_node(*(peer(n) for n in range(2, 2 + peers))), "plexd0", 3, at_once, 7.5)


def test_latency_is_the_median_of_what_came_back(monkeypatch: pytest.MonkeyPatch) -> None:
    latency = make_latency(monkeypatch, {"n_2": [300, 100, 200], "n_3": [500]})
    found = {reading.peer_id: reading.data for reading in asyncio.run(latency.read())}
    assert found["n_2"] == {
        "peer_id": "n_2", "rtt_nano": 200, "rtt_min_nano": 100, "rtt_max_nano": 300, "probes_sent": 3,
        "probes_received": 3,
    }  # fmt: skip
    assert found["n_3"]["probes_received"] == 1
    assert (found["n_4"]["rtt_nano"], found["n_4"]["rtt_min_nano"], found["n_4"]["rtt_max_nano"]) == (-1, -1, -1)


async def test_packet_loss_is_that_of_the_last_twenty_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    rtts = {"n_2": [1, 1]}
    latency = make_latency(monkeypatch, rtts)
    await latency.read()
    assert latency.packet_loss_percent("n_2") == -1  # too few to tell
    for _ in range(10):
        await latency.read()
    assert latency.packet_loss_percent("n_2") == pytest.approx(35, abs=5)
    rtts["n_2"] = [1, 1, 1]
    for _ in range(7):
        await latency.read()
    assert latency.packet_loss_percent("n_2") == 0


async def test_peers_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    latency = make_latency(monkeypatch, {}, peers=5, at_once=2)
    assert [[reading.peer_id for reading in await latency.read()] for _ in range(4)] == [
        ["n_2", "n_3"],
        ["n_4", "n_5"],
        ["n_6", "n_2"],
        ["n_3", "n_4"],
    ]


@pytest.mark.parametrize(
    ("last", "expected"),
    [("", ["a", "b"]), ("a", ["b", "c"]), ("c", ["a", "b"]), ("bb", ["c", "a"]), ("z", ["a", "b"])],
)
def test_turn_goes_on_behind_the_last_peer_even_if_that_one_left(last: str, expected: list[str]) -> None:
    assert in_turn(["a", "b", "c"], last, 2) == expected


def test_no_more_peers_are_pinged_than_fit_into_a_cycle() -> None:
    latency = Latency(make_node(), "plexd0", 3, 1024, 7.5)
    assert icmp.seconds_for(latency._max_peers, 3) <= 7.5


async def test_without_permission_there_are_no_points_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    latency = make_latency(monkeypatch, {})

    async def refuse(*_: object) -> dict[str, icmp.Echoes]:
        raise NotPermitted("no")

    monkeypatch.setattr(icmp, "probe", refuse)
    with capture_logs() as logs:
        for _ in range(3):
            assert await latency.read() == []
    assert not latency.available
    assert [line["event"] for line in logs] == ["latency not measured"]


async def test_agent_tells_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    contact = ConnectionStatus()
    contact.stream_is(Stream.CONNECTED)
    for ok in (True, True, False):
        contact.heartbeat_sent(ok)
    contact.pass_ended(False, 2)
    contact.pass_ended(True, 1)
    contact.state_pulled("no answer")
    latency = make_latency(monkeypatch, {})
    group = Agent(contact, Tunnel(Mesh([], None), lambda _: 0, 1.0), latency, lambda: {"logs": {"sent": 3}})
    await group.read()
    await asyncio.sleep(0)
    data = (await group.read())[0].data
    assert data["rss_bytes"] > 1 << 20
    assert data["open_fds"] > 2
    assert data["thread_count"] >= 1
    assert data["task_count"] >= 2
    assert data["cpu_seconds_total"] > 0
    assert (data["heartbeats_sent_total"], data["heartbeats_failed_total"]) == (3, 1)
    totals = ("reconcile_runs_total", "reconcile_errors_total", "drift_corrections_total")
    assert [data[name] for name in totals] == [2, 2, 3]
    assert data["stream_connected"]
    assert data["last_event_age_seconds"] == -1
    assert data["pipelines"] == {"logs": {"sent": 3}}


@pytest.mark.virtual_time
async def test_agent_measures_how_late_the_loop_is(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Agent(ConnectionStatus(), Tunnel(Mesh([], None), lambda _: 0, 1.0), make_latency(monkeypatch, {}), dict)
    await group.read()
    await asyncio.sleep(2.5)
    loop = asyncio.get_running_loop()
    loop._jumping.now += 0.9  # type: ignore[attr-defined]  # something held the loop up
    await asyncio.sleep(1.0)
    assert float((await group.read())[0].data["event_loop_lag_ms_max"]) == pytest.approx(400, abs=1)
