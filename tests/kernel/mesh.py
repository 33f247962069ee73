"""A mesh to put into the kernel, and what the real `wg` and `ip` say about it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import Change, Outcome, Subject
from plexd.mesh.drift import pass_corrections
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import ROUTE_METRIC, ROUTE_PROTOCOL, Backend, Observed, Route
from plexd.mesh.plan import plan
from plexd.mesh.target import Settings, Target, TargetPeer
from tests.mesh_kernel import MeshKernel

INTERFACE = "plexd0"
PRIVATE_KEY = PrivateKey(bytes([8, *range(30), 64]))


def numbered_peer(number: int) -> TargetPeer:
    """All kinds come by: with and without preshared key and endpoint, of both families, with several prefixes."""
    high, low = divmod(number, 256)
    endpoints = (
        Endpoint(parse_ip(f"192.0.2.{1 + low % 250}"), 1024 + number),
        Endpoint(parse_ip(f"2001:db8::{number:x}"), 51820),
        None,
    )
    allowed_ips = [Prefix.parse(f"10.100.{high}.{low}")]
    if number % 5 == 0:
        allowed_ips += [Prefix.parse(f"fd00:100::{number:x}"), Prefix.parse(f"10.{128 + high}.{low}.0/24")]
    digest = hashlib.sha256(b"%d" % number).digest()
    psk = PresharedKey(hashlib.sha256(digest).digest()) if number % 2 else NO_PRESHARED_KEY
    return TargetPeer(f"n_{number}", PublicKey(digest), psk, endpoints[number % 3], tuple(allowed_ips))


def mesh_of(peers: Sequence[TargetPeer], *, listen_port: int = 51820, private_key: PrivateKey = PRIVATE_KEY) -> Target:
    settings = Settings(
        node_id="n_self", interface=INTERFACE, private_key=private_key, mesh_ip=parse_ip("10.100.255.1"),
        listen_port=listen_port, mtu=1420, keepalive=25, backend=Backend.KERNEL,
    )  # fmt: skip
    target = Target(settings, {}, frozenset())
    return with_peers(target, peers)


def with_peers(target: Target, peers: Sequence[TargetPeer]) -> Target:
    own = target.settings.mesh_ip
    routes = frozenset(
        Route(prefix, own if len(prefix.packed) == len(own) else None, ROUTE_METRIC)
        for peer in peers
        for prefix in peer.allowed_ips
    )
    return replace(target, peers={peer.id: peer for peer in peers}, routes=routes)


@dataclass
class Agent:
    """Observe, plan, apply, as the daemon does it, with the kernel back end."""

    target: Target
    kernel: MeshKernel = field(default_factory=lambda: MeshKernel(INTERFACE, "kernel", "wireguard-go"))

    def observe(self) -> Observed:
        return asyncio.run(self.kernel.observe())

    def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        return asyncio.run(self.kernel.apply(changes))

    def converge(self) -> list[Outcome]:
        """One pass; what it did."""

        async def one_pass() -> list[Outcome]:
            changes = plan(self.target, await self.kernel.observe(), time.time())
            return await self.kernel.apply(changes) if changes else []

        return asyncio.run(one_pass())

    def tear_down(self) -> list[str]:
        async def take_down() -> list[str]:
            try:
                return await self.kernel.tear_down(PRIVATE_KEY.public())
            finally:
                await self.kernel.close()

        return asyncio.run(take_down())

    def corrections(self) -> list[str]:
        """One pass that must succeed, as the lines of the drift report."""
        outcomes = self.converge()
        assert [outcome.error for outcome in outcomes if outcome.error] == []
        return [f"{kind} {detail}" for kind, detail in pass_corrections(Subject(INTERFACE), outcomes, {})]


def run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def wg_dump() -> dict[str, tuple[str, ...]]:
    """`wg show plexd0 dump` without the counters: the device under "", each peer under its key, prefixes sorted."""
    device, *peers = run("wg", "show", INTERFACE, "dump").splitlines()
    shown = {"": tuple(device.split("\t"))}
    for line in peers:
        key, psk, endpoint, allowed_ips, _handshake, _rx, _tx, keepalive = line.split("\t")
        shown[key] = (psk, endpoint, ",".join(sorted(allowed_ips.split(","))), keepalive)
    return shown


def wg_dump_of(target: Target) -> dict[str, tuple[str, ...]]:
    """What `wg` must show of the target."""
    settings = target.settings
    private, public = settings.private_key.reveal(), str(settings.private_key.public())
    shown: dict[str, tuple[str, ...]] = {"": (private, public, str(settings.listen_port), "off")}
    for peer in target.peers.values():
        shown[str(peer.public_key)] = (
            "(none)" if peer.psk == NO_PRESHARED_KEY else base64.b64encode(peer.psk).decode(),
            str(peer.endpoint) if peer.endpoint else "(none)",
            ",".join(sorted(map(str, peer.allowed_ips))) or "(none)",
            str(settings.keepalive),
        )
    return shown


def ip_json(*arguments: str) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = json.loads(run("ip", "-json", *arguments) or "[]")
    return [entry for entry in shown if entry]


def ip_routes() -> set[tuple[str, str | None, int]]:
    """Destination, preferred source and metric of plexd's routes, as `ip` shows them."""
    shown = [
        route
        for family in ("-4", "-6")
        for route in ip_json(family, "route", "show", "dev", INTERFACE, "proto", str(ROUTE_PROTOCOL))
    ]
    return {(str(Prefix.parse(route["dst"])), route.get("prefsrc"), route["metric"]) for route in shown}


def ip_routes_of(target: Target) -> set[tuple[str, str | None, int]]:
    return {
        (str(route.prefix), str(Prefix.host(route.source)).partition("/")[0] if route.source else None, route.metric)
        for route in target.routes
    }


def assert_in_kernel(target: Target) -> None:
    """The kernel holds the target and nothing else of ours, says `wg` and says `ip`."""
    assert wg_dump() == wg_dump_of(target)
    assert ip_routes() == ip_routes_of(target)
    (link,) = ip_json("-details", "link", "show", INTERFACE)
    assert link["linkinfo"]["info_kind"] == "wireguard"
    assert (link["ifalias"], link["mtu"], "UP" in link["flags"]) == ("plexd:mesh", target.settings.mtu, True)
    (shown,) = ip_json("address", "show", INTERFACE)
    addresses = [f"{entry['local']}/{entry['prefixlen']}" for entry in shown["addr_info"] if entry["scope"] == "global"]
    assert addresses == [str(Prefix.host(target.settings.mesh_ip))]
