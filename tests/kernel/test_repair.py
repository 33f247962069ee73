"""Damage done by hand is found by a look and repaired, and a sound mesh is left alone."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.mesh import Agent, assert_in_kernel, ip_json, mesh_of, numbered_peer, run

pytestmark = pytest.mark.usefixtures("namespace")

FOREIGN_KEY = str(numbered_peer(900).public_key)
SECOND_KEY = str(numbered_peer(2).public_key)


@pytest.fixture
def agent() -> Agent:
    agent = Agent(mesh_of([numbered_peer(number) for number in range(5)]))
    agent.corrections()
    return agent


@contextmanager
def device_writes() -> Iterator[list[str]]:
    """Lists the calls that reach the kernel's own function for changing a WireGuard device."""
    tracing = Path("/sys/kernel/tracing")
    if not (tracing / "kprobe_events").exists():
        run("mount", "-t", "tracefs", "tracefs", str(tracing))
    (tracing / "kprobe_events").write_text("p:plexd/wg_set_device wg_set_device\n")
    enable = tracing / "events/plexd/wg_set_device/enable"
    enable.write_text("1\n")
    calls: list[str] = []
    try:
        yield calls
        calls += [line for line in (tracing / "trace").read_text().splitlines() if "wg_set_device" in line]
    finally:
        enable.write_text("0\n")
        (tracing / "kprobe_events").write_text("")


@contextmanager
def route_notifications() -> Iterator[list[str]]:
    """Lists what `ip monitor` sees of links, addresses and routes."""
    seen: list[str] = []
    with subprocess.Popen(["ip", "monitor", "link", "address", "route"], stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        try:
            deadline = time.monotonic() + 20
            while not listens(monitor.pid):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield seen
            run("ip", "link", "add", "the-end", "type", "dummy")
            seen += itertools.takewhile(lambda line: "the-end" not in line, monitor.stdout)
        finally:
            monitor.kill()


def listens(pid: int) -> bool:
    """Whether the process has joined a group of rtnetlink, by /proc/net/netlink."""
    rows = [line.split() for line in Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]]
    return any(int(row[2]) == pid and int(row[3], 16) for row in rows)


def test_sound_mesh_is_left_alone(agent: Agent) -> None:
    before = agent.kernel.netlink_writes
    with device_writes() as on_device, route_notifications() as on_network:
        for _ in range(3):
            assert agent.converge() == []
    assert agent.kernel.netlink_writes == before
    assert on_device == []
    assert on_network == []


def test_judges_of_writes_notice_one(agent: Agent) -> None:
    """The counters that the test above relies on do count."""
    before = agent.kernel.netlink_writes
    with device_writes() as on_device, route_notifications() as on_network:
        run("ip", "link", "set", "plexd0", "down")
        run("wg", "set", "plexd0", "peer", SECOND_KEY, "remove")
        agent.converge()
    assert agent.kernel.netlink_writes > before
    assert len(on_device) == 2
    assert on_network


REPAIRS = {  # commands, and the corrections that must follow
    "wg set plexd0 peer {peer} remove": ["peer_added peer n_2"],
    "wg set plexd0 peer {foreign} allowed-ips 10.9.9.9/32": [f"peer_removed peer key {FOREIGN_KEY[:8]}"],
    "wg set plexd0 peer {foreign} allowed-ips 10.100.0.2/32": [
        f"peer_removed peer key {FOREIGN_KEY[:8]}",
        "peer_updated peer n_2: allowed_ips",
    ],
    "wg set plexd0 peer {peer} allowed-ips 10.100.0.2/32,10.9.9.9/32": ["peer_updated peer n_2: allowed_ips"],
    "wg set plexd0 peer {peer} persistent-keepalive off": ["peer_updated peer n_2: keepalive"],
    "wg set plexd0 peer {peer} preshared-key {key}": ["peer_updated peer n_2: psk"],
    "wg set plexd0 private-key {key}": ["interface_repaired plexd0: key"],
    "wg set plexd0 listen-port 40000": ["interface_repaired plexd0: port"],
    "wg set plexd0 fwmark 7": ["interface_repaired plexd0: fwmark"],
    "ip link set plexd0 mtu 1300": ["interface_repaired plexd0: mtu"],
    "ip link set plexd0 alias nobody": ["interface_repaired plexd0: alias"],
    "ip address add 10.9.9.9/24 dev plexd0": ["interface_repaired plexd0: address"],
    "ip route delete 10.100.0.2 dev plexd0": ["route_added 10.100.0.2/32"],
    "ip -6 route delete fd00:100:: dev plexd0": ["route_added fd00:100::/128"],
    "ip route add 10.9.9.0/24 dev plexd0 proto 112": ["route_removed 10.9.9.0/24"],
    "ip link delete plexd0": ["interface_repaired plexd0: link, 5 peers, 7 routes"],
}


@pytest.mark.parametrize(("damage", "corrections"), REPAIRS.items(), ids=REPAIRS)
def test_damage_is_reported_and_repaired(agent: Agent, damage: str, corrections: list[str], tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(run("wg", "genkey"))
    run(*damage.format(peer=SECOND_KEY, foreign=FOREIGN_KEY, key=key_file).split())
    assert agent.corrections() == corrections
    assert_in_kernel(agent.target)
    assert agent.converge() == []


@pytest.mark.parametrize("damage", ["ip address flush dev plexd0", "ip link set plexd0 down"])
def test_what_the_kernel_drops_along_is_brought_back_too(agent: Agent, damage: str) -> None:
    """Without the address its routes go, and all routes when the link goes down."""
    run(*damage.split())
    first, *others = agent.corrections()
    assert first.startswith("interface_repaired plexd0: ")
    assert {other.partition(" ")[0] for other in others} == {"route_added"}
    assert_in_kernel(agent.target)
    assert agent.converge() == []


def test_route_of_another_protocol_stays(agent: Agent) -> None:
    run("ip", "route", "add", "10.9.9.0/24", "dev", "plexd0", "proto", "static")
    assert agent.converge() == []
    assert [route["dst"] for route in ip_json("route", "show", "proto", "static")] == ["10.9.9.0/24"]


def test_everything_at_once_is_repaired_in_one_pass(agent: Agent) -> None:
    for command in (
        "wg set plexd0 listen-port 40000 fwmark 3",
        f"wg set plexd0 peer {SECOND_KEY} remove peer {FOREIGN_KEY} allowed-ips 10.100.0.1/32",
        "ip address flush dev plexd0",
        "ip link set plexd0 mtu 1300 down",
    ):
        run(*command.split())
    agent.corrections()
    assert_in_kernel(agent.target)
    assert agent.converge() == []


def test_link_with_a_thousand_peers_is_rebuilt_as_one_correction() -> None:
    agent = Agent(mesh_of([numbered_peer(number) for number in range(1000)]))
    agent.corrections()
    run("wg", "syncconf", "plexd0", "/dev/null")  # deleting the link with its peers takes the kernel 12 ms for each
    run("ip", "link", "delete", "plexd0")
    assert agent.corrections() == ["interface_repaired plexd0: link, 1000 peers, 1400 routes"]
    assert_in_kernel(agent.target)
