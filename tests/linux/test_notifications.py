"""Notifications of a real kernel, judged by what `ip` does in a namespace."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import subprocess
from collections.abc import AsyncIterator, Callable

import pytest

from plexd.linux import notifications
from plexd.linux.network import Network
from plexd.mesh.address import parse_ip
from plexd.mesh.observed import Route
from tests.mesh_kernel import MeshKernel

pytestmark = pytest.mark.namespaces

DEADLINE_SECONDS = 10.0


def run(*command: str, stdin: str = "") -> None:
    subprocess.run(command, input=stdin, text=True, check=True, capture_output=True)


class Watch:
    """`endpoints` are what the looks ask the ways to; None: they do not."""

    def __init__(
        self, interface: str, is_wanted: Callable[[Route], bool], endpoints: frozenset[bytes] | None = frozenset()
    ) -> None:
        self.noticed = asyncio.Event()
        self.readdressed = asyncio.Event()
        self.name = interface
        self.is_wanted = is_wanted
        self.network = Network()
        self._endpoints = endpoints

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Watch]:
        task = asyncio.create_task(notifications.watch([self], self.noticed, self.readdressed))
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await self.noticed.wait()
            await self.settle()
            yield self
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def settle(self) -> None:
        """Look, as a pass does, and forget what came before."""
        await self.network.observe(self.name, self._endpoints)
        await self.read_all()
        self.noticed.clear()

    async def read_all(self) -> None:
        """What the kernel has told is in the socket's queue by the time `ip` ends: two turns of the loop read it."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def notices(self, *command: str) -> bool:
        self.noticed.clear()
        self.readdressed.clear()
        run(*command)
        await self.read_all()
        return self.noticed.is_set()


def watch(
    interface: str,
    script: Callable[[Watch], object],
    wanted: bool = False,
    endpoints: frozenset[bytes] | None = frozenset(),
) -> None:
    async def main() -> None:
        async with Watch(interface, lambda _: wanted, endpoints).running() as watch:
            await script(watch)  # type: ignore[misc]

    asyncio.run(main())


def ours(interface: str) -> None:
    run("ip", "tuntap", "add", interface, "mode", "tun")
    run("ip", "address", "add", "10.99.0.1/32", "dev", interface)
    run("ip", "link", "set", interface, "up")


@pytest.mark.parametrize(
    "command",
    [
        "ip link delete {0}",
        "ip link set {0} down",
        "ip link set {0} mtu 1300",
        "ip link set {0} alias nobody",
        "ip address delete 10.99.0.1/32 dev {0}",
        "ip address add 10.9.9.9/24 dev {0}",
        "ip route add 10.99.1.0/24 dev {0} proto 112",
        "ip route add default dev lo",
    ],
)
def test_what_concerns_the_interface_is_noticed(namespace: str, interface: str, command: str) -> None:
    ours(interface)

    async def script(watch: Watch) -> None:
        assert await watch.notices(*command.format(interface).split())

    watch(interface, script)


def test_what_does_not_is_passed_over(namespace: str, interface: str) -> None:
    ours(interface)

    async def script(watch: Watch) -> None:
        assert not await watch.notices("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        assert not await watch.notices("ip", "link", "set", "v0", "mtu", "1400", "up")
        assert not await watch.notices("ip", "address", "add", "192.0.2.1/24", "dev", "v0")
        assert not await watch.notices("ip", "route", "add", "10.99.1.0/24", "dev", interface, "proto", "static")
        assert not await watch.notices("ip", "route", "add", "10.99.2.0/24", "dev", "v0", "proto", "112")

    watch(interface, script)


def test_link_that_appears_is_noticed(namespace: str, interface: str) -> None:
    async def script(watch: Watch) -> None:
        assert await watch.notices("ip", "tuntap", "add", interface, "mode", "tun")

    watch(interface, script)


def test_mtu_of_the_way_out_is_noticed(namespace: str, interface: str) -> None:
    ours(interface)
    run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    run("ip", "link", "set", "v0", "up")
    run("ip", "route", "add", "default", "dev", "v0")

    async def script(watch: Watch) -> None:
        assert not await watch.notices("ip", "link", "set", "v0", "alias", "uplink")
        assert not await watch.notices("ip", "link", "set", "v1", "mtu", "1400")
        assert await watch.notices("ip", "link", "set", "v0", "mtu", "1400")

    watch(interface, script)


@pytest.mark.parametrize("wanted", [True, False])
def test_routes_that_come_or_go_as_wanted_are_passed_over(namespace: str, interface: str, wanted: bool) -> None:
    ours(interface)
    route = ("10.99.1.0/24", "dev", interface, "proto", "112", "metric", "2048")

    async def script(watch: Watch) -> None:
        assert await watch.notices("ip", "route", "add", *route) != wanted
        assert await watch.notices("ip", "route", "delete", *route) == wanted

    watch(interface, script, wanted)


def test_lost_notifications_count_as_noticed(namespace: str, interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of these concerns us, but among what was lost there may be something that does."""
    ours(interface)
    monkeypatch.setattr(notifications, "BUFFER_BYTES", 4096)

    async def script(watch: Watch) -> None:
        commands = "".join(f"address add 192.0.2.{n}/32 dev lo\n" for n in range(200))
        run("ip", "-batch", "-", stdin=commands)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await watch.noticed.wait()
        assert watch.readdressed.is_set()
        await watch.settle()
        assert await watch.notices("ip", "link", "delete", interface)

    watch(interface, script)


@pytest.mark.parametrize("nonsense", [b"\x14\0\0\0\x10\0" + bytes(14), b"\xff\0\0\0" + bytes(30)])
def test_nonsense_is_no_notification(nonsense: bytes) -> None:
    with pytest.raises((ValueError, OSError, struct.error)):
        notifications.judge(nonsense, [Watch("plexd0", lambda _: True)])


PEERS = frozenset(map(parse_ip, ("198.51.100.7", "2001:db8:1::7")))


def uplink() -> None:
    """v0 is the way out, v2 another link."""
    for one, other in (("v0", "v1"), ("v2", "v3")):
        run("ip", "link", "add", one, "type", "veth", "peer", "name", other)
        run("ip", "link", "set", one, "up")
        run("ip", "link", "set", other, "up")
    run("ip", "address", "add", "192.0.2.1/24", "dev", "v0")
    run("ip", "address", "add", "192.0.2.9/32", "dev", "lo")
    run("ip", "-6", "address", "add", "2001:db8::1/64", "dev", "v0", "nodad")
    run("ip", "route", "add", "default", "via", "192.0.2.254", "src", "192.0.2.9")
    run("ip", "-6", "route", "add", "default", "via", "2001:db8::fe")
    run("ip", "route", "add", "203.0.113.0/24", "dev", "v2")


@pytest.mark.parametrize(
    "command",
    [
        "ip route add 198.51.100.0/24 dev v2",
        "ip -6 route add 2001:db8:1::7 dev v2",
        "ip route add 198.51.0.0/16 dev v2 table 77",
        "ip route add unreachable 198.51.100.7",
        "ip route delete default",
        "ip route change default via 192.0.2.254 mtu 1300",
        "ip rule add from all lookup 77",
        "ip -6 rule add from all lookup 77",
        "ip link set v0 mtu 1400",
        "ip link set v0 down",
        "ip link set v1 down",
        "ip link delete v0",
        "ip address delete 192.0.2.9/32 dev lo",
    ],
)
def test_what_may_change_the_way_to_a_peer_is_noticed_and_the_ways_forgotten(
    namespace: str, interface: str, command: str
) -> None:
    ours(interface)
    uplink()

    async def script(watch: Watch) -> None:
        epoch = watch.network.underlay.epoch
        run(*command.split())
        async with asyncio.timeout(DEADLINE_SECONDS):
            await watch.noticed.wait()  # the kernel takes its time to tell of a lost carrier
        assert watch.network.underlay.epoch > epoch

    watch(interface, script, endpoints=PEERS)


@pytest.mark.parametrize(
    "command",
    [
        "ip route add 198.51.101.0/24 dev v2",
        "ip route delete 203.0.113.0/24",
        "ip -6 route add 2001:db8:2::/48 dev v2",
        "ip link set v2 mtu 1400",
        "ip link set v2 down",
        "ip link set v0 alias uplink",
        "ip address add 198.51.101.1/24 dev v2",
    ],
)
def test_other_ways_are_passed_over(namespace: str, interface: str, command: str) -> None:
    ours(interface)
    uplink()

    async def script(watch: Watch) -> None:
        epoch = watch.network.underlay.epoch
        assert not await watch.notices(*command.split())
        assert watch.network.underlay.epoch == epoch

    watch(interface, script, endpoints=PEERS)


def test_ways_that_nobody_asked_for_are_passed_over(namespace: str, interface: str) -> None:
    ours(interface)
    uplink()

    async def script(watch: Watch) -> None:
        for command in ("ip link set v0 mtu 1400", "ip rule add from all lookup 77", "ip route delete default"):
            assert not await watch.notices(*command.split())

    watch(interface, script, endpoints=None)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("ip address add 192.0.2.77/24 dev v0", True),
        ("ip address delete 192.0.2.1/24 dev v0", True),
        ("ip -6 address add 2001:db8::77/64 dev v2 nodad", True),
        ("ip -6 address add fe80::77/64 dev v2 nodad", False),
        ("ip address add 192.0.2.77/24 dev {0}", False),
        ("ip address delete 10.99.0.1/32 dev {0}", False),
        ("ip route add 198.51.100.0/24 dev v2", False),
    ],
)
def test_host_whose_addresses_change_is_told(namespace: str, interface: str, command: str, told: bool) -> None:
    ours(interface)
    uplink()

    async def script(watch: Watch) -> None:
        await watch.notices(*command.format(interface).split())
        if told:  # of an IPv6 address the kernel tells from a queue of its own
            async with asyncio.timeout(DEADLINE_SECONDS):
                await watch.readdressed.wait()
        assert watch.readdressed.is_set() == told

    watch(interface, script)


async def test_door_tells_of_damage(namespace: str, interface: str) -> None:
    ours(interface)
    kernel = MeshKernel(interface, "userspace", "wireguard-go")
    task = asyncio.create_task(kernel.watch())
    async with asyncio.timeout(DEADLINE_SECONDS):
        await kernel.noticed.wait()
        await kernel.observe(frozenset(), device=False)
        kernel.noticed.clear()
        run("ip", "link", "delete", interface)
        await kernel.noticed.wait()
    task.cancel()
    await asyncio.wait({task})
    await kernel.close()
