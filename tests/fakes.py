"""An interface and a table in memory, with the methods of the real ones (`plexd.linux.interface`, `.firewall`).

It keeps the habits that plans must cope with: an allowed IP given to a second peer silently leaves the first, a link
takes everything on it along, taking it down drops its routes, a route wants its source address in place, IPv6 wants
an MTU of 1280 and to be switched on, an update of an unknown peer and a peer with the device's own key are silently
ignored. Of the firewall it knows which ruleset is in force. Changes can be refused, and things can be damaged by hand.
`str(kernel)` reads like what `ip` and `wg` print.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from plexd.errors import KernelError
from plexd.mesh.address import Endpoint, Prefix, format_ip
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    DeviceChange,
    Outcome,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    ReplaceTable,
    SetAlias,
    SetDevice,
    SetDown,
    SetMtu,
    SetUp,
    TableChange,
)
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.observed import MESH_ALIAS, Backend, Device, DevicePeer, Link, Observed, Route


class FakeKernel:
    """Starts empty, with a default route of `underlay_mtu` (None: without one).

    `ways` holds the MTU of other routes, by the address they lead to.

    `refuse` is asked before each change and answers with the error, or None to let it pass. `failure` is raised by
    whole calls. `netlink_writes` counts changes that were tried, `looks` the dumps, `device_looks` those with peers.
    `noticed` is set by every change of link, addresses and routes, also by our own.
    """

    def __init__(
        self,
        interface: str = "plexd0",
        backend: Backend = Backend.KERNEL,
        underlay_mtu: int | None = 1500,
        alias: str = MESH_ALIAS,
    ) -> None:
        self.damaged = asyncio.Event()
        self.noticed = asyncio.Event()
        self.netlink_writes = 0
        self.looks = self.device_looks = 0
        self.applied: list[Change] = []
        self.refuse: Callable[[Change], str | None] = lambda change: None
        self.failure: KernelError | None = None
        self.underlay_mtu = underlay_mtu
        self.ways: dict[bytes, int] = {}
        self.ipv6 = True
        self.name = interface
        self.table = FakeTable(self)
        self._backend = backend
        self._alias = alias
        self._ifindex = 7
        self.link: Link | None = None
        self.answers = False
        self.private_key: PrivateKey | None = None
        self.listen_port = 0
        self.fwmark = 0
        self.peers: dict[bytes, DevicePeer] = {}
        self.addresses: set[Prefix] = set()
        self.routes: dict[tuple[Prefix, int], Route] = {}
        self.firewall: str | None = None
        self.hits: Any | None = None

    # the methods of the real interface

    async def observe(self, endpoints: Collection[bytes] | None = None, *, device: bool = True) -> Observed:
        self.looks += 1
        self.device_looks += device
        if self.failure is not None:
            raise self.failure
        mtu = self._underlay_mtu(endpoints) if endpoints is not None else None
        return replace(self.state, underlay_mtu=mtu, device=self.state.device if device else None)

    def _underlay_mtu(self, endpoints: Collection[bytes]) -> int | None:
        mtus = [self.ways.get(endpoint, self.underlay_mtu) for endpoint in endpoints]
        return min((mtu for mtu in mtus if mtu is not None), default=self.underlay_mtu)

    async def apply(self, changes: Sequence[DeviceChange]) -> list[Outcome]:
        if self.failure is not None:
            raise self.failure
        outcomes: list[Outcome] = []
        created: int | None = None
        for change in changes:
            self.netlink_writes += 1
            error = self.refuse(change) or self._take(change)
            outcomes.append(_outcome(change, error))
            if error is None:
                self.applied.append(change)
                if not isinstance(change, SetDevice | PutPeer | RemovePeer | RenewSessions):
                    self.noticed.set()
                if isinstance(change, PutPeer) and change.endpoint is not None:
                    self._follow(change.endpoint.packed)
            if isinstance(change, CreateLink):
                created = len(outcomes) - 1
            if error is not None and created is not None and isinstance(change, CreateLink | SetUp):
                if isinstance(change, SetUp):
                    self._forget_link()
                outcomes[created] = _outcome(changes[created], error)
                return outcomes + [_outcome(skipped, error) for skipped in changes[len(outcomes) :]]
        return outcomes

    async def tear_down(self, own_public: PublicKey | None) -> list[str]:
        removed = []
        if self.link is not None and self._is_ours(own_public):
            self._forget_link()
            removed.append(self.name)
        if self.firewall is not None:
            self.firewall = None
            removed.append("inet plexd")
        return removed

    async def close(self) -> None:
        pass

    @property
    def state(self) -> Observed:
        """What a look would show."""
        device = Device(self.private_key, self.listen_port, self.fwmark, dict(self.peers)) if self.answers else None
        return Observed(
            self.link,
            device,
            frozenset(self.addresses),
            frozenset(self.routes.values()),
            self.underlay_mtu,
            self.ipv6,
        )

    # damage by hand

    def delete_link(self) -> None:
        self._forget_link()
        self.noticed.set()

    def flush_ruleset(self) -> None:
        """`nft flush ruleset`."""
        self.firewall = None
        self.noticed.set()

    def touch_firewall(self) -> None:
        """Somebody changes the table, or left one of its name."""
        self.firewall = ""
        self.noticed.set()

    def kill_program(self) -> None:
        """A userspace WireGuard dies: its TUN goes with it, and the agent hears of it."""
        self._forget_link()
        self.noticed.set()
        self.damaged.set()

    def make_link(self, backend: Backend | None, alias: str = "", private_key: PrivateKey | None = None) -> None:
        """Somebody else's work: any link of our name. `backend` None is neither WireGuard nor a TUN."""
        self._forget_link()
        self.link = Link(self.name, self._ifindex, backend, alias, 1500, False)
        self.private_key = private_key
        self.answers = backend is not None
        self.noticed.set()

    def stop_answering(self) -> None:
        """The link stands, but no WireGuard speaks for it."""
        self.answers = False

    def set_link(self, *, alias: str | None = None, mtu: int | None = None, up: bool | None = None) -> None:
        assert self.link is not None
        self.noticed.set()
        if alias is not None:
            self.link = self.link._replace(alias=alias)
        if mtu is not None:
            self.link = self.link._replace(mtu=mtu)
            if mtu < 1280:
                self._drop_ipv6()
        if up is not None:
            self.link = self.link._replace(up=up)
            if not up:
                self.routes.clear()
                self._drop_ipv6()

    def set_device(
        self, *, private_key: PrivateKey | None = None, listen_port: int | None = None, fwmark: int | None = None
    ) -> None:
        if private_key is not None:
            self._take_private_key(private_key)
        if listen_port is not None:
            self.listen_port = listen_port
        if fwmark is not None:
            self.fwmark = fwmark

    def switch_ipv6(self, *, on: bool) -> None:
        """`sysctl net.ipv6.conf.all.disable_ipv6`: switched on again, what was lost stays lost."""
        self.ipv6 = on
        if not on:
            self._drop_ipv6()
        self.noticed.set()

    def add_address(self, address: Prefix) -> None:
        """Raises ValueError where the kernel refuses people too."""
        if self._too_small_for(address):
            raise ValueError("IPv6 needs an MTU of 1280")
        self.addresses.add(address)
        self.noticed.set()

    def remove_address(self, address: Prefix) -> None:
        self._drop_address(address)
        self.noticed.set()

    def add_route(self, route: Route) -> None:
        """Raises ValueError where the kernel refuses people too."""
        if error := self._put_route(route):
            raise ValueError(error)
        self.noticed.set()

    def remove_route(self, route: Route) -> None:
        self.routes.pop((route.prefix, route.metric), None)
        self.noticed.set()

    def put_peer(self, peer: DevicePeer) -> None:
        """`wg set … peer`: add it, or replace it whole."""
        self._steal(peer.allowed_ips, peer.public_key)
        self.peers[peer.public_key] = peer

    def remove_peer(self, public_key: bytes) -> None:
        self.peers.pop(public_key, None)

    def roam(self, public_key: bytes, endpoint: Endpoint, handshake: float) -> None:
        """A handshake came from elsewhere: the endpoint follows it. `handshake` in Unix seconds."""
        self.peers[public_key] = self.peers[public_key]._replace(endpoint=endpoint, last_handshake=handshake)

    def shake_hands(self, public_key: bytes, handshake: float) -> None:
        self.peers[public_key] = self.peers[public_key]._replace(last_handshake=handshake)

    def carry(self, public_key: bytes, received: int, sent: int) -> None:
        """Bytes with a peer since it is on the interface."""
        self.peers[public_key] = self.peers[public_key]._replace(rx_bytes=received, tx_bytes=sent)

    # what the changes do

    def _take(self, change: DeviceChange) -> str | None:
        """Carry a change out; the error, None when it was done."""
        if isinstance(change, CreateLink):
            return self._create(change)
        if isinstance(change, DeleteLink):
            self._forget_link()
            return None
        if self.link is None:
            return "no such device"
        match change:
            case SetAlias():
                self.link = self.link._replace(alias=self._alias)
            case SetMtu(mtu):
                self.link = self.link._replace(mtu=mtu)
            case SetUp():
                self.link = self.link._replace(up=True)
            case SetDown():
                self.set_link(up=False)
            case AddAddress(address):
                if self._is_ipv6(address) and not self.ipv6:
                    return "permission denied: IPv6 is switched off"
                if self._too_small_for(address):
                    return "invalid argument: IPv6 needs an MTU of 1280"
                self.addresses.add(address)
            case RemoveAddress(address):
                self._drop_address(address)
            case AddRoute(route):
                return self._put_route(route)
            case RemoveRoute(route):
                self.routes.pop((route.prefix, route.metric), None)
            case SetDevice() | RemovePeer() | PutPeer():
                return self._configure(change)
            case RenewSessions():
                return None if self.answers else "no WireGuard answers"
        return None

    def _follow(self, endpoint: bytes) -> None:
        """A narrower way than those known makes a look due."""
        if self.underlay_mtu is not None and self.ways.get(endpoint, self.underlay_mtu) < self.underlay_mtu:
            self.noticed.set()

    def _create(self, change: CreateLink) -> str | None:
        if self.link is not None:
            return "file exists"
        self._ifindex += 1
        self.link = Link(self.name, self._ifindex, self._backend, self._alias, change.mtu, False)
        self.answers = True
        self.private_key = change.private_key
        self.listen_port = change.listen_port
        return None

    def _configure(self, change: SetDevice | RemovePeer | PutPeer) -> str | None:
        if not self.answers:
            return "no WireGuard answers"
        match change:
            case SetDevice():
                self._take_private_key(change.private_key)
                self.listen_port = change.listen_port
                self.fwmark = 0
            case RemovePeer():
                self.peers.pop(bytes(change.public_key), None)
            case PutPeer():
                self._put_peer(change)
        return None

    def _put_peer(self, change: PutPeer) -> None:
        key = bytes(change.public_key)
        if self.private_key is not None and key == self.private_key.public():
            return
        known = self.peers.get(key)
        if known is None:
            if not change.is_new:
                return
            known = DevicePeer(key, bytes(NO_PRESHARED_KEY), None, 0, 0.0, 0, 0, ())
        if change.psk is not None:
            known = known._replace(psk=bytes(change.psk))
        if change.endpoint is not None:
            known = known._replace(endpoint=change.endpoint)
        if change.keepalive is not None:
            known = known._replace(keepalive=change.keepalive)
        if change.allowed_ips is not None:
            self._steal(change.allowed_ips, key)
            # a dump has an order of its own
            known = known._replace(allowed_ips=tuple(sorted(set(change.allowed_ips), reverse=True)))
        self.peers[key] = known

    def _steal(self, prefixes: Sequence[Prefix], key: bytes) -> None:
        for other, peer in self.peers.items():
            if other != key and not set(prefixes).isdisjoint(peer.allowed_ips):
                self.peers[other] = peer._replace(allowed_ips=tuple(p for p in peer.allowed_ips if p not in prefixes))

    def _take_private_key(self, private_key: PrivateKey) -> None:
        self.private_key = private_key
        self.peers.pop(bytes(private_key.public()), None)

    def _put_route(self, route: Route) -> str | None:
        assert self.link is not None
        if not self.link.up:
            return "network is down"
        if self._is_ipv6(route.prefix) and not self.ipv6:
            return "permission denied: IPv6 is switched off"
        if self._too_small_for(route.prefix):
            return "invalid argument: IPv6 needs an MTU of 1280"
        if route.source is not None and all(address.packed != route.source for address in self.addresses):
            return "invalid argument: the source address is not ours"
        self.routes[route.prefix, route.metric] = route
        return None

    def _drop_address(self, address: Prefix) -> None:
        self.addresses.discard(address)
        if any(other.packed == address.packed for other in self.addresses):
            return
        for identity, route in list(self.routes.items()):
            if route.source != address.packed:
                continue
            if len(address.packed) == 4:
                del self.routes[identity]
            else:  # an IPv6 route only loses its preferred source
                self.routes[identity] = route._replace(source=None)

    @staticmethod
    def _is_ipv6(prefix: Prefix) -> bool:
        return len(prefix.packed) == 16

    def _too_small_for(self, prefix: Prefix) -> bool:
        return self._is_ipv6(prefix) and self.link is not None and self.link.mtu < 1280

    def _drop_ipv6(self) -> None:
        self.addresses = {address for address in self.addresses if len(address.packed) == 4}
        self.routes = {key: route for key, route in self.routes.items() if len(route.prefix.packed) == 4}

    def _forget_link(self) -> None:
        self.link = None
        self.answers = False
        self.private_key = None
        self.listen_port = 0
        self.fwmark = 0
        self.peers = {}
        self.addresses = set()
        self.routes = {}

    def _is_ours(self, own_public: PublicKey | None) -> bool:
        assert self.link is not None
        return self.link.alias == self._alias or (
            own_public is not None and self.private_key is not None and self.private_key.public() == own_public
        )

    def __str__(self) -> str:
        if self.link is None:
            return f"{self.name} does not exist"
        kind = self.link.backend or "other"
        lines = [f"{self.name}: {'UP' if self.link.up else 'DOWN'} {kind} mtu {self.link.mtu}"]
        if self.link.alias:
            lines.append(f"  alias {self.link.alias}")
        lines += [f"  {_family(address.packed)} {address}" for address in sorted(self.addresses)]
        if self.answers:
            lines.append(f"  listening port: {self.listen_port}")
            if self.fwmark:
                lines.append(f"  fwmark: {self.fwmark:#x}")
        else:
            lines.append("  no WireGuard answers")
        for peer in sorted(self.peers.values()):
            lines.append(f"peer: {PublicKey(peer.public_key).short}")
            if peer.psk != NO_PRESHARED_KEY:
                lines.append("  preshared key: (hidden)")
            if peer.endpoint is not None:
                lines.append(f"  endpoint: {peer.endpoint}")
            lines.append(f"  allowed ips: {', '.join(map(str, sorted(peer.allowed_ips))) or '(none)'}")
            if peer.keepalive:
                lines.append(f"  persistent keepalive: every {peer.keepalive} seconds")
        for route in sorted(self.routes.values(), key=lambda route: (route.prefix, route.metric)):
            source = f" src {format_ip(route.source)}" if route.source is not None else ""
            lines.append(f"{route.prefix} dev {self.name} proto 112 scope link{source} metric {route.metric}")
        return "\n".join(lines)


class FakeTable:
    """The nftables table of the fake kernel: it knows which ruleset is in force."""

    name = "inet plexd"

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel

    async def observe(self) -> str | None:
        if self._kernel.failure is not None:
            raise self._kernel.failure
        return self._kernel.firewall

    async def apply(self, changes: Sequence[TableChange]) -> list[Outcome]:
        if self._kernel.failure is not None:
            raise self._kernel.failure
        return [self._attempt(change) for change in changes]

    def _attempt(self, change: TableChange) -> Outcome:
        kernel = self._kernel
        kernel.netlink_writes += 1
        ruleset = change.ruleset if isinstance(change, ReplaceTable) else None
        error = kernel.refuse(change) or (ruleset.fault or None if ruleset is not None else None)
        if error is None:
            kernel.firewall = ruleset.digest if ruleset is not None else None
            kernel.applied.append(change)
            kernel.noticed.set()
        return _outcome(change, error)

    async def read(self) -> Any | None:
        return self._kernel.hits


def _outcome(change: Change, error: str | None) -> Outcome:
    return Outcome(change) if error is None else Outcome(change, error, KernelError(error))


def _family(packed: bytes) -> str:
    return "inet" if len(packed) == 4 else "inet6"
