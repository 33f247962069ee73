"""The door with a real wireguard-go behind it, in network namespaces; judged by ip, wg and ping."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from plexd.errors import BackendUnavailable, ForeignLink, NotPermitted, PortInUse
from plexd.linux.wireguard import program
from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    Outcome,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    SetUp,
)
from plexd.mesh.handshakes import EAGER, Awaited, assess, plan_again
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import ROUTE_METRIC, Backend, Observed, Route
from plexd.mesh.plan import plan
from plexd.mesh.target import Settings, Target, TargetPeer
from tests.mesh_kernel import MeshKernel
from tests.tunnel.post import DATA, INITIATION, INITIATIONS_APART_SECONDS, RESPONSE, Post

pytestmark = [pytest.mark.namespaces, pytest.mark.usefixtures("left_behind")]

DEADLINE_SECONDS = 20.0
PORT = 51820


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def settings(interface: str, mesh_ip: str = "10.99.0.1") -> Settings:
    return Settings("n_self", interface, PrivateKey.generate(), parse_ip(mesh_ip), PORT, 1400, 25, None)


def peer(number: int, **parts: object) -> TargetPeer:
    host = Prefix.host(bytes((10, 99, 1 + (number >> 8), number & 255)))
    given = TargetPeer(
        f"n_{number}",
        PrivateKey.generate().public(),
        PresharedKey(os.urandom(32)) if number % 2 else NO_PRESHARED_KEY,
        Endpoint(bytes((192, 0, 2, number % 250 + 1)), 51820),
        (host,),
    )
    return given._replace(**parts)  # type: ignore[arg-type]


def target(own: Settings, *peers: TargetPeer) -> Target:
    routes = frozenset(
        Route(prefix, own.mesh_ip if len(prefix.packed) == len(own.mesh_ip) else None, ROUTE_METRIC)
        for each in peers
        for prefix in each.allowed_ips
    )
    return Target(own, {each.id: each for each in peers}, routes)


def kernel(interface: str) -> MeshKernel:
    return MeshKernel(interface, "userspace", "wireguard-go")


async def converge(door: MeshKernel, wanted: Target) -> list[Outcome]:
    outcomes = await door.apply(plan(wanted, await door.observe(), time.time()))
    assert [outcome.error for outcome in outcomes if outcome.error is not None] == []
    return outcomes


async def changes_due(door: MeshKernel, wanted: Target) -> tuple[Change, ...]:
    return plan(wanted, await door.observe(), time.time())


def wg_dump(interface: str) -> dict[str, list[str]]:
    """What wg shows of the peers: psk, endpoint, allowed IPs, handshake, rx, tx, keepalive by public key."""
    lines = run("wg", "show", interface, "dump").splitlines()[1:]
    return {fields[0]: fields[1:] for fields in (line.split("\t") for line in lines)}


def pid_of(interface: str) -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"/var/run/wireguard/{interface}.sock")
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - the kernel sets no asyncio.Event
            await asyncio.sleep(0.01)


@pytest.fixture
def left_behind(interface: str) -> Iterator[None]:
    """Ends what the test left running."""
    yield
    try:
        pid = pid_of(interface)
    except OSError:
        return
    os.kill(pid, signal.SIGKILL)


async def test_first_pass_builds_everything_and_second_finds_nothing_to_do(namespace: str, interface: str) -> None:
    own = settings(interface)
    wanted = target(
        own,
        peer(1),
        peer(2),
        peer(3, endpoint=None),
        peer(4, allowed_ips=(Prefix.parse("fd00:99::4"), Prefix.parse("10.50.0.0/16"))),
        peer(5, endpoint=Endpoint(parse_ip("2001:db8::5"), 4000)),
    )
    door = kernel(interface)
    await converge(door, wanted)
    writes = door.netlink_writes
    assert await changes_due(door, wanted) == ()
    assert await door.apply(()) == []
    assert door.netlink_writes == writes
    observed = await door.observe()
    assert observed.link is not None
    assert observed.link[2:] == (Backend.USERSPACE, "plexd:mesh", 1400, True)
    await door.close()
    shown = wg_dump(interface)
    assert shown == {
        str(each.public_key): [
            "(none)" if each.psk == NO_PRESHARED_KEY else each.psk.reveal(),
            str(each.endpoint or "(none)"),
            ",".join(str(prefix) for prefix in each.allowed_ips),
            *("0", "0"),
            shown[str(each.public_key)][5],  # bytes of handshakes nobody answers
            "25",
        ]
        for each in wanted.peers.values()
    }
    addresses = run("ip", "-o", "address", "show", "dev", interface, "scope", "global")
    assert "10.99.0.1/32" in addresses
    assert f"10.50.0.0/16 dev {interface} proto 112 scope link src 10.99.0.1 metric 2048" in run("ip", "route")
    assert f"fd00:99::4 dev {interface} proto 112 metric 2048" in run("ip", "-6", "route")


@pytest.mark.parametrize(
    "sabotage",
    [
        "ip link set {i} alias something",
        "ip link set {i} down",
        "ip link set {i} mtu 1300",
        "ip address delete 10.99.0.1/32 dev {i}",
        "ip address add 10.77.0.1/24 dev {i}",
        "ip address add fd77::1/64 dev {i}",
        "ip route delete 10.99.1.1",
        "ip route add 10.33.0.0/16 dev {i} proto 112 metric 2048",
        "ip route replace 10.99.1.1 dev {i} proto 112 metric 2048",
        "wg set {i} peer {p} remove",
        "wg set {i} peer {p} allowed-ips 10.88.0.0/16",
        "wg set {i} peer {p} preshared-key /dev/null",
        "wg set {i} peer {p} persistent-keepalive 7",
        "wg set {i} peer {p} endpoint 192.0.2.99:9",
        "wg set {i} peer AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE= allowed-ips 10.44.0.0/16",
        "wg set {i} listen-port 51999",
        "wg set {i} fwmark 0x7",
        "ip link delete {i}",
    ],
)
async def test_damage_is_healed_by_one_pass(namespace: str, interface: str, sabotage: str) -> None:
    wanted = target(settings(interface), peer(1), peer(2))
    door = kernel(interface)
    await converge(door, wanted)
    run(*sabotage.format(i=interface, p=wanted.peers["n_1"].public_key).split())
    if "delete {i}" in sabotage:
        await door.damaged.wait()  # its process ended with it, and is not started again at once
    assert await changes_due(door, wanted)
    await converge(door, wanted)
    assert await changes_due(door, wanted) == ()
    await door.close()


async def test_disk_that_hangs_holds_up_no_repair(namespace: str, interface: str) -> None:
    wanted = target(settings(interface), peer(1))
    free = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    door = kernel(interface)
    hanging = asyncio.create_task(asyncio.to_thread(free.wait))
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await converge(door, wanted)
            run("ip", "address", "flush", "dev", interface)
            await converge(door, wanted)
            assert await changes_due(door, wanted) == ()
        assert not hanging.done()
    finally:
        free.set()
        await hanging
    await door.close()


def test_packets_go_through_the_tunnel_of_two_nodes(
    make_namespace: Callable[[], str], inside: Callable[[str], AbstractContextManager[None]], interface: str
) -> None:
    left, right = make_namespace(), make_namespace()
    run("ip", "-n", left, "link", "add", "uplink", "type", "veth", "peer", "name", "uplink", "netns", right)
    names = {left: f"{interface}a", right: f"{interface}b"}
    own = {left: settings(names[left], "10.99.0.1"), right: settings(names[right], "10.99.0.2")}
    underlay = {left: "192.0.2.1", right: "192.0.2.2"}

    async def join(node: str, other: str) -> None:
        door = kernel(names[node])
        known = peer(
            2,
            public_key=own[other].private_key.public(),
            psk=PresharedKey(bytes(range(32))),
            endpoint=Endpoint(parse_ip(underlay[other]), PORT),
            allowed_ips=(Prefix.host(own[other].mesh_ip),),
        )
        await converge(door, target(own[node], known))
        await door.close()

    async def handshake_is_seen() -> bool:
        door = kernel(names[left])
        device = (await door.observe()).device
        await door.close()
        assert device is not None
        (seen,) = device.peers.values()
        return time.time() - seen.last_handshake < 60 and seen.rx_bytes > 0 and seen.tx_bytes > 0

    async def take_down(node: str) -> None:
        door = kernel(names[node])
        assert await door.tear_down(None) == [names[node]]
        await door.close()

    for node in (left, right):
        run("ip", "-n", node, "address", "add", f"{underlay[node]}/24", "dev", "uplink")
        run("ip", "-n", node, "link", "set", "uplink", "up")
    for node, other in ((left, right), (right, left)):
        with inside(node):
            asyncio.run(join(node, other))
    with inside(left):
        run("ping", "-c", "3", "-i", "0.2", "-W", "10", "10.99.0.2")
        asyncio.run(until(handshake_is_seen))
    for node in (left, right):
        with inside(node):
            asyncio.run(take_down(node))


async def test_process_that_was_killed_is_started_again_and_configured_anew(namespace: str, interface: str) -> None:
    wanted = target(settings(interface), peer(1))
    door = kernel(interface)
    await converge(door, wanted)
    killed = pid_of(interface)
    os.kill(killed, signal.SIGKILL)

    async def is_gone() -> bool:
        return (await door.observe()).link is None

    await until(is_gone)
    outcomes = await door.apply(await changes_due(door, wanted))
    assert outcomes[0].error == "wireguard-go ended; it is started again in 1 s"
    assert all(outcome.error == outcomes[0].error for outcome in outcomes)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await door.damaged.wait()
    door.damaged.clear()
    await converge(door, wanted)
    assert await changes_due(door, wanted) == ()
    assert pid_of(interface) != killed
    await door.close()


async def test_link_made_anew_needs_no_waiting_and_is_watched_like_the_first(namespace: str, interface: str) -> None:
    """What the agent ended itself did not die."""
    wanted = target(settings(interface), peer(1))
    door = kernel(interface)
    await converge(door, wanted)
    first = pid_of(interface)
    changes = [DeleteLink("test"), *plan(wanted, Observed(), time.time())]
    assert await door.apply(changes) == [Outcome(change) for change in changes]
    assert pid_of(interface) != first
    os.kill(pid_of(interface), signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await door.damaged.wait()
    await converge(door, wanted)
    await door.close()


def test_next_agent_adopts_the_process_and_watches_it(namespace: str, interface: str) -> None:
    wanted = target(settings(interface), peer(1))

    async def first_agent() -> None:
        door = kernel(interface)
        await converge(door, wanted)
        await door.close()

    async def next_agent() -> None:
        door = kernel(interface)
        assert await changes_due(door, wanted) == ()
        assert pid_of(interface) == pid
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await door.damaged.wait()
        await converge(door, wanted)
        await door.close()

    asyncio.run(first_agent())
    pid = pid_of(interface)
    asyncio.run(next_agent())


def test_process_outlives_an_agent_that_was_killed(namespace: str, interface: str) -> None:
    """The agent is a real process here: nothing of it may hold the tunnel."""
    agent = f"""
import asyncio, sys, time
from plexd.linux.wireguard import program
from tests.mesh_kernel import MeshKernel
from plexd.mesh.changes import CreateLink
from plexd.mesh.keys import PrivateKey

async def main():
    outcomes = await MeshKernel({interface!r}, "userspace", "wireguard-go").apply(
        [CreateLink(PrivateKey.generate(), {PORT}, 1400)]
    )
    print(outcomes[0].error, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", agent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "None\n"
        os.killpg(os.getpgid(process.pid), 0)
        process.send_signal(signal.SIGKILL)
    assert os.getsid(pid_of(interface)) == pid_of(interface)
    assert "listening port: 51820" in run("wg", "show", interface)


async def test_link_of_somebody_else_is_never_touched(namespace: str, interface: str) -> None:
    own = settings(interface)
    run("ip", "link", "add", interface, "mtu", "1234", "type", "bridge")
    door = kernel(interface)
    observed = await door.observe()
    assert observed.link is not None
    assert observed.link.backend is None
    with pytest.raises(ForeignLink):
        plan(target(own), observed, time.time())
    first, second = await door.apply([CreateLink(own.private_key, PORT, 1400), SetUp()])
    assert isinstance(first.cause, ForeignLink)
    assert first.error == f"{interface} exists already: remove it (ip link delete {interface}) or set mesh.interface"
    assert second.error == first.error
    assert await door.tear_down(own.private_key.public()) == []
    assert door.netlink_writes == 0
    await door.close()
    assert "mtu 1234" in run("ip", "link", "show", interface)


async def test_tun_of_somebody_else_is_never_touched(namespace: str, interface: str) -> None:
    run("ip", "tuntap", "add", interface, "mode", "tun")
    door = kernel(interface)
    observed = await door.observe()
    with pytest.raises(ForeignLink):
        plan(target(settings(interface)), observed, time.time())
    (outcome,) = await door.apply([CreateLink(PrivateKey.generate(), PORT, 1400)])
    assert isinstance(outcome.cause, ForeignLink)
    assert await door.tear_down(PrivateKey.generate().public()) == []
    await door.close()
    assert interface in run("ip", "link", "show", interface)


async def test_busy_port_fails_the_creation_and_leaves_nothing(namespace: str, interface: str) -> None:
    wanted = target(settings(interface), peer(1))
    door = kernel(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", PORT))
        outcomes = await door.apply(await changes_due(door, wanted))
    assert all(isinstance(outcome.cause, PortInUse) for outcome in outcomes)
    assert {outcome.error for outcome in outcomes} == {
        "UDP port 51820 is in use by another program: stop it or set mesh.listen_port"
    }
    assert (await door.observe()).link is None
    assert door.netlink_writes == 0
    await converge(door, wanted)
    await door.close()


async def test_busy_port_of_a_running_interface_is_told(namespace: str, interface: str) -> None:
    own = settings(interface)
    door = kernel(interface)
    await converge(door, target(own))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 51821))
        (outcome,) = await door.apply(await changes_due(door, target(replace(own, listen_port=51821))))
    assert isinstance(outcome.cause, PortInUse)
    assert outcome.error == "UDP port 51821 is in use by another program: stop it or set mesh.listen_port"
    await converge(door, target(own))
    assert await changes_due(door, target(own)) == ()
    await door.close()


async def test_a_thousand_peers_go_out_in_a_few_writes_and_come_back_equal(namespace: str, interface: str) -> None:
    wanted = target(settings(interface), *(peer(number) for number in range(1000)))
    door = kernel(interface)
    await converge(door, target(wanted.settings))
    before = door.netlink_writes
    await converge(door, replace(wanted, routes=frozenset()))
    assert door.netlink_writes - before <= 4
    await converge(door, wanted)
    assert await changes_due(door, wanted) == ()
    await door.close()
    assert len(wg_dump(interface)) == 1000


def test_tear_down_leaves_nothing(namespace: str, interface: str) -> None:
    own = settings(interface)
    wanted = target(own, *(peer(number) for number in range(20)))

    async def build() -> None:
        door = kernel(interface)
        await converge(door, wanted)
        await door.close()

    async def take_down() -> None:
        door = kernel(interface)
        assert await door.tear_down(own.private_key.public()) == [interface]
        assert await door.tear_down(own.private_key.public()) == []
        assert await door.observe() == Observed()
        assert not door.damaged.is_set()
        await door.close()

    asyncio.run(build())
    pid = pid_of(interface)
    asyncio.run(take_down())
    assert not Path(f"/var/run/wireguard/{interface}.sock").exists()
    assert not Path(f"/proc/{pid}").exists()
    assert run("ip", "route", "show", "table", "all", "proto", "112") == ""


async def test_interface_without_alias_but_with_our_key_is_taken_down(namespace: str, interface: str) -> None:
    own = settings(interface)
    door = kernel(interface)
    await converge(door, target(own))
    run("ip", "link", "set", interface, "alias", "")
    assert await door.tear_down(PrivateKey.generate().public()) == []
    assert await door.tear_down(own.private_key.public()) == [interface]
    await door.close()


async def test_no_key_in_arguments_or_environment(
    namespace: str, interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings(interface)
    known = peer(1)
    monkeypatch.setenv("PLEXD_BOOTSTRAP_TOKEN", "plx_not-for-children")
    door = kernel(interface)
    await converge(door, target(own, known))
    await door.close()
    proc = Path(f"/proc/{pid_of(interface)}")
    shown = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
    assert b"plx_not-for-children" not in shown
    for secret in (own.private_key, known.psk):
        assert secret.reveal().encode() not in shown
        assert secret.hex().encode() not in shown
    assert {(proc / "fd" / name).readlink() for name in "012"} == {Path("/dev/null")}


async def test_missing_program_is_said_with_what_to_install(namespace: str, interface: str) -> None:
    door = MeshKernel(interface, "auto", "wireguard-nowhere")
    (outcome,) = await door.apply([CreateLink(PrivateKey.generate(), PORT, 1400)])
    await door.close()
    if outcome.error is None:
        pytest.skip("this kernel has WireGuard")
    assert isinstance(outcome.cause, BackendUnavailable)
    assert outcome.cause.causes[:2] == ("kernel: no wireguard module", "userspace: wireguard-nowhere not found")
    assert "install wireguard-go" in outcome.error


async def test_program_that_ends_at_once_is_said(namespace: str, interface: str, tmp_path: Path) -> None:
    broken = tmp_path / "wireguard-broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    door = MeshKernel(interface, "userspace", str(broken))
    (outcome,) = await door.apply([CreateLink(PrivateKey.generate(), PORT, 1400)])
    assert outcome.error == f"{broken} ended at its start (exit status 3)"
    await door.close()


async def test_socket_left_by_a_killed_process_is_no_obstacle(namespace: str, interface: str) -> None:
    directory = Path("/var/run/wireguard")
    directory.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / f"{interface}.sock"))
    door = kernel(interface)
    await converge(door, target(settings(interface)))
    await door.close()


def test_socket_of_another_program_is_said_and_left_alone(namespace: str, interface: str) -> None:
    path = Path(f"/var/run/wireguard/{interface}.sock")
    path.parent.mkdir(exist_ok=True)

    async def scenario() -> None:
        door = kernel(interface)
        (outcome,) = await door.apply([CreateLink(PrivateKey.generate(), PORT, 1400)])
        assert outcome.error == f"{path} is answered by another program: stop it or choose another mesh.interface"
        await door.close()

    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(2000)
        asyncio.run(scenario())
        assert path.exists()
        path.unlink()


async def test_one_refused_peer_does_not_keep_the_others_out(namespace: str, interface: str) -> None:
    def put(number: int, keepalive: int) -> PutPeer:
        each = peer(number)
        return PutPeer(each.id, each.public_key, True, each.psk, None, keepalive, each.allowed_ips, ("added",))

    changes = [put(1, 25), put(2, 70_000), put(3, 25)]
    door = kernel(interface)
    await converge(door, target(settings(interface)))
    outcomes = await door.apply(changes)
    assert [outcome.change for outcome in outcomes] == changes
    assert [outcome.error for outcome in outcomes] == [None, "could not write peer n_2: Invalid argument", None]
    await door.close()
    assert {str(changes[0].public_key), str(changes[2].public_key)} <= wg_dump(interface).keys()


async def test_changes_to_a_link_that_is_gone_say_so_and_deleting_it_succeeds(namespace: str, interface: str) -> None:
    known = peer(1)
    route = Route(known.allowed_ips[0], None, ROUTE_METRIC)
    door = kernel(interface)
    changes: list[Change] = [
        SetUp(),
        DeleteLink("test"),
        AddAddress(Prefix.parse("10.99.0.1")),
        RemovePeer("n_1", known.public_key),
        RemovePeer("n_2", known.public_key),
        AddRoute(route),
        RemoveRoute(route),
    ]
    outcomes = await door.apply(changes)
    assert [outcome.error for outcome in outcomes] == [
        f"could not bring the interface up: {interface} is gone",
        None,
        f"could not add address 10.99.0.1/32: {interface} is gone",
        f"could not remove peer n_1: {interface} is gone",
        f"could not remove peer n_2: {interface} is gone",
        f"could not add route 10.99.1.1/32: {interface} is gone",
        f"could not remove route 10.99.1.1/32: {interface} is gone",
    ]
    await door.close()


async def test_everything_may_be_done_twice(namespace: str, interface: str) -> None:
    own = settings(interface)
    known = peer(1)
    address = Prefix.parse("10.77.0.1")
    route = Route(known.allowed_ips[0], own.mesh_ip, ROUTE_METRIC)
    other_route = Route(Prefix.parse("fd00:99::/64"), None, ROUTE_METRIC)
    door = kernel(interface)
    await converge(door, target(own))
    steps: list[Change] = [
        AddAddress(address),
        AddRoute(route),
        AddRoute(other_route),
        RemoveRoute(route),
        RemoveRoute(other_route),
        RemoveAddress(address),
        SetUp(),
    ]
    for change in steps:
        for _ in range(2):
            assert await door.apply([change]) == [Outcome(change)]
    await door.close()


async def test_endpoint_alone_leaves_psk_and_allowed_ips(namespace: str, interface: str) -> None:
    known = peer(1)
    moved = Endpoint(bytes((192, 0, 2, 200)), 1)
    door = kernel(interface)
    await converge(door, target(settings(interface), known))
    change = PutPeer(known.id, known.public_key, False, None, moved, None, None, ("endpoint",))
    assert await door.apply([change]) == [Outcome(change)]
    device = (await door.observe()).device
    assert device is not None
    held = device.peers[known.public_key]
    assert (held.endpoint, held.psk, held.allowed_ips) == (moved, known.psk, known.allowed_ips)
    await door.close()


async def test_what_is_gone_is_removed_with_success_and_not_updated(namespace: str, interface: str) -> None:
    stranger = PublicKey(os.urandom(32))
    door = kernel(interface)
    await converge(door, target(settings(interface)))
    update = PutPeer("n_1", stranger, False, NO_PRESHARED_KEY, None, None, (), ("psk",))
    outcomes = await door.apply([RemovePeer(None, stranger), update])
    assert [outcome.error for outcome in outcomes] == [None, None]
    device = (await door.observe()).device
    assert device is not None
    assert device.peers == {}
    await door.close()


async def test_route_of_another_program_is_not_replaced(namespace: str, interface: str) -> None:
    wanted = target(settings(interface), peer(1), peer(2))
    door = kernel(interface)
    await converge(door, target(wanted.settings))
    run("ip", "route", "add", "10.99.1.1/32", "dev", "lo", "metric", "2048", "proto", "static")
    outcomes = await door.apply(await changes_due(door, wanted))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    assert [type(outcome.change) for outcome in failed] == [AddRoute]
    assert failed[0].error is not None
    assert failed[0].error.startswith("could not add route 10.99.1.1/32: another program has a route")
    await door.close()
    assert "10.99.1.1 dev lo proto static" in run("ip", "route")


def test_missing_capability_is_said(namespace: str, interface: str) -> None:
    """In a process of its own, since a capability given up does not come back."""
    agent = f"""
import asyncio
from plexd.linux.wireguard import program
from tests.mesh_kernel import MeshKernel
from plexd.mesh.changes import CreateLink
from plexd.mesh.keys import PrivateKey

async def main():
    door = MeshKernel({interface!r}, "auto", "wireguard-go")
    (outcome,) = await door.apply([CreateLink(PrivateKey.generate(), {PORT}, 1400)])
    print(type(outcome.cause).__name__, outcome.error)

asyncio.run(main())
"""
    said = run("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", agent)
    assert said == (
        f"{NotPermitted.__name__} no permission to create a WireGuard interface: run as root or grant CAP_NET_ADMIN\n"
    )


async def test_under_systemd_the_program_gets_a_scope_of_its_own(
    namespace: str, interface: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for systemd-run, which becomes the command it is given, as the real one does with --scope."""
    asked = tmp_path / "asked"
    stand_in = tmp_path / "systemd-run"
    stand_in.write_text(f'#!/bin/sh\necho "$@" > {asked}\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("INVOCATION_ID", "0123456789abcdef0123456789abcdef")
    monkeypatch.setattr(program, "SYSTEMD_RUNNING", tmp_path)
    monkeypatch.setattr(program, "SEARCH_PATH", f"{tmp_path}:{program.SEARCH_PATH}")
    door = kernel(interface)
    await converge(door, target(settings(interface)))
    await door.close()
    path = shutil.which("wireguard-go")
    assert asked.read_text() == (
        f"--scope --quiet --collect --description=WireGuard of {interface}, for plexd -- {path} -f {interface}\n"
    )


def test_handshakes_that_cross_cost_both_until_one_device_takes_its_peer_out_and_puts_it_back(
    namespace: str, interface: str
) -> None:
    own, key = settings(interface), PrivateKey.generate()
    with Post(PORT, PORT + 1) as post, other_device(f"{interface}o") as other:
        far = peer(1, public_key=key.public(), endpoint=Endpoint(parse_ip("127.0.0.1"), post.ports[0]))
        wanted = target(own, far)
        awaited = {far.id: Awaited(0.0, EAGER, EAGER.tries[0])}

        async def scenario() -> None:
            door = kernel(interface)
            await converge(door, wanted)
            configure_other_device(other, key, own.private_key.public(), far.psk, post.ports[1])
            assert post.swap() == [INITIATION, INITIATION]
            assert post.swap() == [RESPONSE, RESPONSE]
            await asyncio.sleep(2 * INITIATIONS_APART_SECONDS)
            await door.apply([RenewSessions((far.public_key,), 25)])  # nor does that, within five seconds
            device = (await door.observe()).device
            assert device is not None
            again, _ = assess(awaited, wanted, device, may_be_deaf=True)
            outcomes = await door.apply(plan_again(again, wanted, device))
            assert [outcome.error for outcome in outcomes] == [None, None]
            assert [post.carry(0), post.carry(1), post.carry(0)] == [INITIATION, RESPONSE, DATA]
            assert await changes_due(door, wanted) == ()
            device = (await door.observe()).device
            assert device is not None
            assert assess(awaited, wanted, device, may_be_deaf=True)[0] == ()
            await door.close()

        asyncio.run(scenario())


@contextlib.contextmanager
def other_device(name: str) -> Iterator[str]:
    with subprocess.Popen(
        ["wireguard-go", "-f", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while subprocess.run(["wg", "show", name], capture_output=True, check=False).returncode:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield name
        finally:
            process.terminate()


def configure_other_device(name: str, own: PrivateKey, peer_key: PublicKey, psk: PresharedKey, port: int) -> None:
    """The peer, in the same namespace, with nothing but keys and a session to begin."""
    text = (
        f"[Interface]\nPrivateKey = {own.reveal()}\nListenPort = {PORT + 1}\n"
        f"[Peer]\nPublicKey = {peer_key}\nPresharedKey = {psk.reveal()}\n"
        f"Endpoint = 127.0.0.1:{port}\nPersistentKeepalive = 25\n"
    )
    subprocess.run(["wg", "setconf", name, "/dev/stdin"], input=text, text=True, check=True)
    run("ip", "link", "set", name, "up")
