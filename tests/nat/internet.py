"""A small internet of namespaces: public servers at two addresses, and agents behind as many NATs as a test wants."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plexd.lab.controlplane import LabControlPlane
from plexd.lab.namespaces import UAPI_SOCKETS, Namespace, connect, run, stop_processes, translate

SERVERS = ("203.0.113.10", "203.0.113.11")
SERVERS_IPV6 = ("2001:db8::10", "2001:db8::11")
STUN_PORT = 3478
MESH_PORT = 51820
STOP_SECONDS = 60.0
MASQUERADE = "masquerade"
SYMMETRIC = "masquerade random"
_numbers = itertools.count(1)

# read at the start of an interpreter: the clock that goes on in a suspended machine is ahead
AHEAD = """
import pathlib, time
real = time.clock_gettime
asleep = pathlib.Path(__file__).with_name("asleep")
def clock_gettime(clock):
    return real(clock) + (float(asleep.read_text()) if clock == time.CLOCK_BOOTTIME else 0.0)
time.clock_gettime = clock_gettime
"""


def to_port(port: int) -> str:
    """The nft statement of a NAT that maps every UDP source to one port of its own."""
    return f'meta l4proto udp masquerade to :{port}; oifname "wan" masquerade'


class Internet:
    """`public` is a bridge with the servers' addresses; what is plugged in gets 203.0.113.101 and so on."""

    def __init__(self) -> None:
        self._namespaces: list[Namespace] = []
        self._addresses = itertools.count(101)
        self.public = self._make()
        self.public.run("ip", "link", "add", "br0", "type", "bridge")
        for address in SERVERS:
            self.public.run("ip", "address", "add", f"{address}/24", "dev", "br0")
        for address in SERVERS_IPV6:
            self.public.run("ip", "address", "add", f"{address}/64", "dev", "br0", "nodad")
        self.public.run("ip", "link", "set", "br0", "up")

    def _make(self) -> Namespace:
        namespace = Namespace(f"plxn-{os.getpid()}-{next(_numbers)}")
        run("ip", "netns", "add", namespace.name)
        self._namespaces.append(namespace)
        namespace.run("ip", "link", "set", "lo", "up")
        return namespace

    def add_host(self, *nats: str) -> Host:
        """A host behind NATs, each an nft statement, the outermost first."""
        number = next(self._addresses)
        address, port = f"203.0.113.{number}", f"p{number}"
        gateways = [self._make() for _ in nats]
        host = self._make()
        outer, outer_link, own, router = self.public, port, f"{address}/24", SERVERS[0]
        for depth, (gateway, statement) in enumerate(zip(gateways, nats, strict=True)):
            connect(outer, outer_link, gateway, "wan", own, router)
            translate(gateway, statement)
            inner = f"192.168.{depth + 1}"
            outer, outer_link, own, router = gateway, "lan", f"{inner}.2/24", f"{inner}.1"
        connect(outer, outer_link, host, "eth0", own, router)
        for depth, gateway in enumerate(gateways):
            gateway.run("ip", "address", "add", f"192.168.{depth + 1}.1/24", "dev", "lan")
        if not nats:
            host.run("ip", "address", "add", f"2001:db8::{number}/64", "dev", "eth0", "nodad")
        self.public.run("ip", "link", "set", port, "master", "br0")
        return Host(host, gateways, address)

    def remove(self) -> None:
        stop_processes([pid for namespace in self._namespaces for pid in namespace.pids()])
        for namespace in self._namespaces:
            run("ip", "netns", "delete", namespace.name)


class Host:
    """`address` is what the internet sees: its own, or that of the outermost NAT. Hosts behind none have IPv6 too."""

    def __init__(self, namespace: Namespace, gateways: list[Namespace], address: str) -> None:
        self.namespace = namespace
        self.gateways = gateways
        self.address = address
        self.address_ipv6 = f"2001:db8::{address.rpartition('.')[2]}"

    def forget_quickly(self) -> None:
        """The outermost NAT keeps a mapping of UDP for a second."""
        for name in ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"):
            self.gateways[0].run("sh", "-c", f"echo 1 > /proc/sys/net/netfilter/{name}")

    def translate_anew(self, statement: str) -> None:
        """The outermost NAT maps by another rule from now on; what is mapped stays so until it is forgotten."""
        translate(self.gateways[0], statement)

    def has_forgotten(self) -> bool:
        return not self._mappings()

    def open_ports(self) -> list[str]:
        """Our ends of established TCP connections."""
        rows = [line.split() for line in self.namespace.run("cat", "/proc/net/tcp").splitlines()[1:]]
        return [str(int(row[1].rpartition(":")[2], 16)) for row in rows if row[3] == "01"]

    def mapped_port(self, server: str) -> int:
        """The port under which the outermost NAT sends to a STUN server."""
        (line,) = (line for line in self._mappings() if f" dst={server} " in line)
        return int(line.rpartition(" dport=")[2].split()[0])

    def _mappings(self) -> list[str]:
        """To STUN servers."""
        table = self.gateways[0].run("cat", "/proc/net/nf_conntrack")
        return [line for line in table.splitlines() if f" dport={STUN_PORT} " in line]


class Agent:
    """A real `plexd up` on a host."""

    def __init__(self, host: Host, plane: LabControlPlane, directory: Path) -> None:
        number = next(_numbers)
        self.host = host
        self.name = f"agent-{number}"
        self.interface = f"plxn{os.getpid() % 1_000_000}n{number}"
        self._plane = plane
        self._directory = directory / self.name
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, stun_servers: list[str], *wrapper: str, refresh: str = "1m", reconcile: str = "1s") -> None:
        """`wrapper` are words in front of the command."""
        self._directory.mkdir(mode=0o700)
        config = {
            "api": self._plane.url,
            "tls": {"insecure_skip_verify": True},
            "data_dir": str(self._directory / "data"),
            "hostname": self.name,
            "token": {"value": self._plane.admin.issue_token()},
            "mesh": {"interface": self.interface, "listen_port": MESH_PORT},
            "policy": {"enabled": False},
            "nat_traversal": {"stun_servers": stun_servers, "refresh_interval": refresh, "timeout": "2s"},
            "heartbeat": {"interval": "5s"},
            "reconcile": {"interval": reconcile},
            "node_api": {"socket": str(self._directory / "api.sock")},
        }
        path = self._directory / "config.yaml"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        command = (*wrapper, sys.executable, "-m", "plexd", "up", "--config", str(path))
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(self.host.namespace.command(*command), stdout=log, stderr=log)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            finally:
                self._process.kill()
                self._process.wait()
        (UAPI_SOCKETS / f"{self.interface}.sock").unlink(missing_ok=True)

    def logged(self, message: str) -> list[dict[str, Any]]:
        lines = (self._directory / "log").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["message"] == message]

    async def report(self, number: int = 1, within: float = 20.0) -> tuple[str, str]:
        """Endpoint and type of the NAT in the report of that number."""
        await self._registered(within)
        reports = await self._plane.admin.wait_for("endpoint", self.name, count=number, timeout=within)
        body = reports[number - 1].body
        assert set(body) == {"public_endpoint", "nat_type"}
        return body["public_endpoint"], body["nat_type"]

    async def heartbeat(self, number: int) -> dict[str, Any]:
        await self._registered(within=20.0)
        beats = await self._plane.admin.wait_for("heartbeat", self.name, count=number, timeout=40)
        body: dict[str, Any] = beats[number - 1].body
        return body

    async def _registered(self, within: float) -> None:
        """A node has a name only from then on."""
        await self._plane.admin.wait_for(
            "register", where=lambda arrival: arrival.body["hostname"] == self.name, timeout=within
        )

    def mesh_ip(self) -> str:
        return self._plane.admin.node(self.name).mesh_ip

    def reaches(self, other: Agent) -> bool:
        ping = self.host.namespace.command("ping", "-n", "-c", "1", "-W", "1", other.mesh_ip())
        return subprocess.run(ping, capture_output=True, check=False).returncode == 0


class Suspension:
    """Pretended to an agent that was started with `wrapper` in front of its command."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.wrapper = ("env", f"PYTHONPATH={directory}")
        self._host = host
        self._directory = directory
        (directory / "sitecustomize.py").write_text(AHEAD)
        (directory / "asleep").write_text("0")

    def end(self, seconds: float) -> None:
        """As after so long a sleep: the clock tells, and nobody on the way knows the open connections any more."""
        ports = ",".join(self._host.open_ports())
        self._host.namespace.run(
            "nft",
            "add table inet asleep;"
            "add chain inet asleep in { type filter hook input priority 0; };"
            "add chain inet asleep out { type filter hook output priority 0; };"
            f"add rule inet asleep in tcp dport {{ {ports} }} drop;"
            f"add rule inet asleep out tcp sport {{ {ports} }} drop",
        )
        (self._directory / "awake").write_text(str(seconds))
        (self._directory / "awake").rename(self._directory / "asleep")


async def until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    """Raises TimeoutError when it does not happen."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(happened):  # noqa: ASYNC110 - what happens is not ours
            await asyncio.sleep(0.05)
