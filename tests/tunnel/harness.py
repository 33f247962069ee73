"""Two nodes with a tunnel between them, over an underlay that a test makes: the daemon's own converger and door.

The back end is the one that the daemon would choose here: a real wireguard-go on hosts without WireGuard, and the
kernel's own in the QEMU guest, where `tests/kernel` uses this stage too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from pydantic import SecretStr

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.lab.namespaces import UAPI_SOCKETS, Namespace, run, stop_processes
from plexd.mesh import firewall
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Desired, Peer, Policy, PolicyRule
from plexd.mesh.drift import Correction
from plexd.mesh.events import PeerAdded
from plexd.mesh.keys import PresharedKey, PrivateKey
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.store.identity import Identity
from tests.mesh_kernel import MeshKernel
from tests.namespaces import inside

PORT = 51820
DEADLINE_SECONDS = 60.0
PSK = PresharedKey(bytes(range(32)))
ALLOW_ALL = Policy("everybody", (PolicyRule("*", "*", 0, "any", "allow"),))


class Network:
    """Makes namespaces and cables; removes all of them, and what runs in them, at the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._made: list[Namespace] = []

    def namespace(self) -> Namespace:
        namespace = Namespace(f"{self._name}-{len(self._made)}")
        run("ip", "netns", "add", namespace.name)
        self._made.append(namespace)
        namespace.run("ip", "link", "set", "lo", "up")
        return namespace

    def router(self) -> Namespace:
        namespace = self.namespace()
        for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            namespace.run("sh", "-c", f"echo 1 > /proc/sys/net/{switch}")
        return namespace

    def remove(self) -> None:
        stop_processes([pid for namespace in self._made for pid in namespace.pids()])
        for namespace in self._made:
            run("ip", "netns", "delete", namespace.name)


def cable(
    one: Namespace, other: Namespace, name: str, numbers: tuple[int, int], *, mtu: int = 1500, ipv6: bool = True
) -> None:
    """A link of that name at both ends, with the addresses 192.0.N.H and (with `ipv6`) 2001:db8:N::H.

    `numbers` are N and the H of the first; the other has the next H.
    """
    one.run("ip", "link", "add", name, "mtu", str(mtu), "type", "veth", "peer", "name", name, "netns", other.name)
    net, host = numbers
    for namespace, number in ((one, host), (other, host + 1)):
        namespace.run("ip", "link", "set", name, "mtu", str(mtu), "up")
        namespace.run("ip", "address", "add", f"192.0.{net}.{number}/24", "dev", name)
        if ipv6:
            namespace.run("ip", "address", "add", f"2001:db8:{net}::{number}/64", "dev", name, "nodad")


def route(namespace: Namespace, net: int, via: tuple[int, int]) -> None:
    """Send what is for network `net` of both families by way of host `via[1]` in network `via[0]`."""
    namespace.run("ip", "route", "add", f"192.0.{net}.0/24", "via", f"192.0.{via[0]}.{via[1]}")
    namespace.run("ip", "route", "add", f"2001:db8:{net}::/64", "via", f"2001:db8:{via[0]}::{via[1]}")


class Member:
    """A node of the mesh in its namespace."""

    def __init__(self, namespace: Namespace, interface: str, mesh_ip: str, endpoint: str, *prefixes: str) -> None:
        self.namespace = namespace
        self.interface = interface
        self.mesh_ip = mesh_ip
        self.endpoint = endpoint
        self.key = PrivateKey.generate()
        self._prefixes = prefixes

    def as_peer(self) -> Peer:
        mesh_ip = parse_ip(self.mesh_ip)
        allowed_ips = (Prefix.host(mesh_ip), *map(Prefix.parse, self._prefixes))
        return Peer(f"n_{self.interface}", self.key.public(), mesh_ip, self.endpoint, allowed_ips, PSK)

    def settings(self, identity: Identity) -> Settings:
        """The defaults of the configuration."""
        policy = firewall.Settings(identity.mesh_ip, (self.interface,))
        return Settings(
            identity.node_id, self.interface, self.key, identity.mesh_ip, PORT, 0, 25, None, policy=policy
        )  # fmt: skip

    def join(self, *others: Member) -> None:
        """Set the interface up, and leave it to itself."""

        async def one_pass() -> None:
            async with Living(self, *others).entered():
                pass

        with inside(self.namespace.name):
            asyncio.run(one_pass())

    def leave(self) -> None:
        """Whoever made it, the interface goes."""

        async def take_down() -> None:
            door = MeshKernel(self.interface, "auto", "wireguard-go")
            await door.tear_down(self.key.public())
            await door.close()

        with inside(self.namespace.name):
            asyncio.run(take_down())
        (UAPI_SOCKETS / f"{self.interface}.sock").unlink(missing_ok=True)

    def switch_ipv6(self, *, on: bool) -> None:
        """For its whole host."""
        self.namespace.run("sh", "-c", f"echo {0 if on else 1} > /proc/sys/net/ipv6/conf/all/disable_ipv6")

    @property
    def mtu(self) -> int:
        return int(self.namespace.run("cat", f"/sys/class/net/{self.interface}/mtu"))

    def reaches(self, other: Member) -> bool:
        ping = self.namespace.command("ping", "-n", "-c", "1", "-W", "1", other.mesh_ip)
        return subprocess.run(ping, capture_output=True, check=False).returncode == 0


class Living:
    """A member whose agent is running in this process; `reports` are what it repaired, as the drift report says it."""

    def __init__(self, member: Member, *others: Member) -> None:
        self.health = Health()
        self.reports: list[str] = []
        identity = Identity(f"n_{member.interface}", parse_ip(member.mesh_ip), SecretStr(""), member.key)
        self.node = Node(identity, Desired(policies=(ALLOW_ALL,)), 0.0, self.health)
        for other in others:
            self.add(other)
        self.door = MeshKernel(member.interface, "auto", "wireguard-go")
        self.mesh = build_mesh(self.door.mesh, self.door.mesh_table, self.node, member.settings, self.health)
        self.door.mesh.is_wanted = self.mesh.wanted.is_wanted
        self.converger = Converger([self.mesh.resource], self.health)

    def add(self, other: Member) -> None:
        """The control plane tells of another member."""
        self.node.fold(PeerAdded(other.as_peer()))

    @contextlib.asynccontextmanager
    async def entered(self) -> AsyncIterator[Living]:
        """After a first pass, which must succeed."""
        try:
            result = await self.converger.converge()
            assert result.failed == 0, self.health.findings()
            yield self
        finally:
            await self.door.close()

    @contextlib.asynccontextmanager
    async def repairing(self) -> AsyncIterator[Living]:
        """Entered, and it heeds what the kernel tells."""
        async with self.entered():
            repair = Repair(self.door, self.converger, self.mesh.resource.up, self._report)
            loops = [asyncio.create_task(self.door.watch()), asyncio.create_task(repair.run())]
            try:
                yield self
                assert not any(loop.done() for loop in loops), loops
            finally:
                for loop in loops:
                    loop.cancel()
                await asyncio.wait(loops)

    def _report(self, corrections: object) -> None:
        assert isinstance(corrections, tuple)
        self.reports += [f"{c.type} {c.detail}" for c in corrections if isinstance(c, Correction)]


async def until(happened: Callable[[], bool]) -> None:
    """Raises TimeoutError when it does not happen."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await asyncio.to_thread(happened):  # noqa: ASYNC110 - what happens is not ours
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def members(*who: Member) -> Iterator[None]:
    """All know each other and are up; they leave at the end."""
    try:
        for one in who:
            one.join(*(other for other in who if other is not one))
        yield
    finally:
        for one in who:
            with contextlib.suppress(FileNotFoundError):
                one.leave()


def live(one: Member, other: Member, script: Callable[[Living], Awaitable[None]]) -> None:
    """Run the script beside the agent of `one`; the interface of `other` is left to itself."""

    async def main() -> None:
        async with Living(one, other).repairing() as living:
            await script(living)

    other.join(one)
    try:
        with inside(one.namespace.name):
            asyncio.run(main())
    finally:
        one.leave()
        other.leave()


@contextlib.asynccontextmanager
async def pinging(one: Member, other: Member) -> AsyncIterator[list[int]]:
    """A hundred pings, one every 10 ms, whose end ends the context; the list then has the numbers of those answered."""
    answered: list[int] = []
    ping = await asyncio.create_subprocess_exec(
        *one.namespace.command("ping", "-n", "-i", "0.01", "-c", "100", other.mesh_ip), stdout=subprocess.PIPE
    )
    try:
        yield answered
    finally:
        told, _ = await ping.communicate()
    answered += map(int, re.findall(rb"icmp_seq=(\d+) ", told))


RECEIVE = """
import hashlib, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 5001), family=family) as server:
    print("listening", flush=True)
    server.settimeout(60)
    sock, _ = server.accept()
    sock.settimeout(60)
    digest, length = hashlib.sha256(), 0
    while data := sock.recv(1 << 16):
        digest.update(data)
        length += len(data)
    print(length, digest.hexdigest())
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5001), timeout=60) as sock:
    sock.sendall(sys.stdin.buffer.read())
"""


def transfer(sender: Member, receiver: Member, length: int) -> bool:
    """Send that much over TCP through the tunnel; whether it arrived as it left."""
    data = os.urandom(length)
    with subprocess.Popen(
        receiver.namespace.command(sys.executable, "-c", RECEIVE, receiver.mesh_ip), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        try:
            subprocess.run(
                sender.namespace.command(sys.executable, "-c", SEND, receiver.mesh_ip),
                input=data, check=True, timeout=90,
            )  # fmt: skip
            arrived = process.stdout.readline()
        finally:
            process.kill()
    return arrived == f"{length} {hashlib.sha256(data).hexdigest()}\n"
