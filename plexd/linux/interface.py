"""The door to the kernel: look at the mesh interface, carry out changes, take it all down.

Which WireGuard runs the interface, and how it is spoken to, stays behind this door, and so do the kernel's error
numbers: beyond it there are sentences that say what to do, and types of `plexd.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, cast

from plexd.errors import BackendUnavailable, ForeignLink, KernelError, NotPermitted, PortInUse
from plexd.linux import notifications
from plexd.linux.firewall import FirewallTable
from plexd.linux.network import Network, host_addresses, local_addresses
from plexd.linux.wireguard import WireGuardDevice
from plexd.linux.wireguard.kernel import KernelDevice
from plexd.linux.wireguard.program import Program
from plexd.linux.wireguard.userspace import UserspaceDevice
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    Outcome,
    PeerChange,
    PutPeer,
    RemoveAddress,
    RemoveFirewall,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    ReplaceFirewall,
    SetAlias,
    SetDevice,
    SetDown,
    SetMtu,
    SetUp,
)
from plexd.mesh.firewall import FAMILY, TABLE
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import MESH_ALIAS, Backend, Observed, Route

# a peer refused for one of these is no better off alone
HOPELESS = {errno.ENODEV, errno.EPERM, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET}
REMOVED_AT_ONCE = 1000  # peers, at tear-down
WITHOUT_NFTABLES_SECONDS = 60.0  # between looks for it where the kernel has none
INSTALL = "install wireguard-go and provide /dev/net/tun, or run a kernel with WireGuard (Debian: linux-image-amd64)"


class Kernel:
    """`damaged` is set when a userspace WireGuard died, `noticed` (while `watch` runs) when something about the network
    may differ from what the last look showed: a pass is due. `readdressed` (likewise) is set when another interface of
    this host gets or loses an address."""

    def __init__(self, interface: str, backend: Literal["auto", "kernel", "userspace"], userspace_program: str) -> None:
        self.interface = interface
        self.damaged = asyncio.Event()
        self.noticed = asyncio.Event()
        self.readdressed = asyncio.Event()
        self._allowed = tuple(Backend) if backend == "auto" else (Backend(backend),)
        self._network = Network()
        self._firewall = FirewallTable()
        self._program = Program(interface, userspace_program, self.damaged)
        self._devices: dict[Backend, WireGuardDevice] = {
            Backend.KERNEL: KernelDevice(interface),
            Backend.USERSPACE: UserspaceDevice(self._program),
        }
        self._backend: Backend | None = None
        self._roamed: frozenset[bytes] = frozenset()  # where peers were at the last dump, though nobody said so

    @property
    def netlink_writes(self) -> int:
        """How many messages, on netlink or UAPI or through nft, were sent to change something."""
        return self._network.writes + self._firewall.writes + sum(device.writes for device in self._devices.values())

    async def watch(self, is_wanted: Callable[[Route], bool]) -> None:
        """Set `noticed` at changes, until cancelled. Raises KernelError.

        Routes of ours that come or go as `is_wanted` has it are passed over: most of them are our own work.
        """
        with self._door("listen for changes of the network"):
            await notifications.watch(self.interface, self._network, is_wanted, self.noticed, self.readdressed)

    async def watch_firewall(self) -> None:
        """Set `noticed` when our table may have been changed, until cancelled. Raises KernelError."""
        while True:
            with self._door("listen for changes of the firewall"):
                try:
                    await self._firewall.watch(self.noticed)
                except OSError as exc:
                    if exc.errno not in {errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT}:
                        raise
                    await asyncio.sleep(WITHOUT_NFTABLES_SECONDS)  # the module may still be loaded

    async def observe(
        self, endpoints: Collection[bytes] | None = None, *, device: bool = True, firewall: bool = True
    ) -> Observed:
        """Without `device` nobody is asked about keys and peers, without `endpoints` not about the underlay's MTU.

        `endpoints` are the peers' packed addresses. Without `firewall` the table is not looked at. Raises KernelError.
        """
        with self._door("look at the interface"):
            seen = await self._network.observe(
                self.interface, self._roamed.union(endpoints) if endpoints is not None else None
            )
            backend = seen.link.backend if seen.link is not None else None
            dump = await self._devices[backend].dump() if device and backend is not None else None
        if dump is not None and endpoints is not None:
            held = {peer.endpoint.packed for peer in dump.peers.values() if peer.endpoint is not None}
            self._roamed = frozenset(held.difference(endpoints))
        table = await self._firewall.observe() if firewall else None
        return Observed(seen.link, dump, seen.addresses, seen.routes, seen.underlay_mtu, seen.ipv6, table)

    async def read_firewall(self) -> Any | None:
        """The table as nft tells it, None when there is none. Raises KernelError."""
        return await self._firewall.read()

    async def local_addresses(self) -> frozenset[bytes]:
        """Those of every interface of this host. Raises KernelError."""
        with self._door("list the addresses of this host"):
            return await local_addresses()

    async def host_addresses(self) -> frozenset[bytes]:
        """Those of other interfaces that reach beyond their link. Raises KernelError."""
        with self._door("list the addresses of this host"):
            return await host_addresses(self.interface)

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        """Take each change on its own, in order; what failed says so in its outcome, and the next is tried.

        Peers next to each other go as one batch, and one by one when the batch is refused. When the link cannot be
        created, or not be brought up after it was, it is deleted again and the rest fails with the same error.
        """
        self._backend = None  # whoever made the link since the last time
        outcomes: list[Outcome] = []
        created: int | None = None
        for kind, group in itertools.groupby(changes, _kind):
            run = list(group)
            if kind == "peers":
                outcomes += await self._apply_peers(cast("list[PeerChange]", run))
            elif kind == "routes":
                outcomes += await self._apply_routes(cast("list[AddRoute | RemoveRoute]", run))
            else:
                for change in run:
                    outcomes.append(await self._attempt(change))
                    cause = outcomes[-1].cause
                    if isinstance(change, CreateLink):
                        created = len(outcomes) - 1
                    if cause is not None and created is not None and isinstance(change, CreateLink | SetUp):
                        await self._undo_creation()
                        outcomes[created] = _failed(changes[created], cause)
                        return outcomes + [_failed(skipped, cause) for skipped in changes[len(outcomes) :]]
        await self._follow_new_endpoints(changes)
        return await self._begin_handshakes(outcomes)

    async def _begin_handshakes(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Of new peers in great number, now that everything is in place; none of them is done when this fails."""
        try:
            for device in self._devices.values():
                await device.begin_handshakes()
        except OSError as exc:
            cause = self._translate(exc, "have the new peers shake hands")
            return [
                _failed(outcome.change, cause) if outcome.error is None and _is_new_peer(outcome.change) else outcome
                for outcome in outcomes
            ]
        return outcomes

    async def _follow_new_endpoints(self, changes: Sequence[Change]) -> None:
        """A peer that an event brings may be at the end of a narrower way than all others: then a look is due."""
        endpoints = {
            change.endpoint.packed for change in changes if isinstance(change, PutPeer) and change.endpoint is not None
        }
        with contextlib.suppress(OSError):  # the next pass asks again
            if endpoints and await self._network.follow_too(endpoints):
                self.noticed.set()

    async def tear_down(self, own_public: PublicKey | None) -> list[str]:
        """Remove peers, link, the process of a userspace WireGuard, and the table; the names of what was removed.

        Touches only a link that is ours by its alias, or holds the private key of `own_public`. Absent is done.
        Every step is tried; KernelError then tells what failed.
        """
        observed = await self.observe(firewall=False)
        link, device = observed.link, observed.device
        failures: list[str] = []
        removed: list[str] = []
        key = device.private_key if device is not None else None
        is_ours = link is not None and (
            link.alias == MESH_ALIAS or (own_public is not None and key is not None and key.public() == own_public)
        )
        if link is not None and link.backend is not None and is_ours:
            with self._collect(failures, "remove the peers"):
                await self._empty(link.backend, tuple(device.peers) if device is not None else ())
            with self._collect(failures, f"delete link {self.interface}"):
                await self._delete_link()
                removed.append(self.interface)
            if failures:
                with self._collect(failures, "remove the routes"):
                    leftover = [RemoveRoute(route) for route in observed.routes]
                    await self._network.change_routes(self.interface, leftover)
        with self._collect(failures, f"delete table {FAMILY} {TABLE}"):
            if await self._firewall.remove():
                removed.append(f"{FAMILY} {TABLE}")
        if failures:
            raise KernelError("; ".join(failures))
        return removed

    async def close(self) -> None:
        """Let go. What runs in the kernel, or in a program in its place, goes on."""
        self._program.close()
        await self._firewall.close()

    async def _attempt(self, change: Change) -> Outcome:
        try:
            with self._door(_describe(change), change):
                await self._apply(change)
        except KernelError as exc:
            return _failed(change, exc)
        return Outcome(change)

    async def _apply(self, change: Change) -> None:
        network, name = self._network, self.interface
        match change:
            case ReplaceFirewall(ruleset):
                await self._firewall.replace(ruleset)
            case RemoveFirewall():
                await self._firewall.remove()
            case CreateLink():
                await self._create_link(change)
            case DeleteLink():
                await self._delete_link()
            case SetAlias():
                await network.set_alias(name)
            case SetDevice(private_key, listen_port):
                await (await self._device()).set_device(private_key, listen_port)
            case RenewSessions(public_keys, keepalive):
                await (await self._device()).renew_sessions(public_keys, keepalive)
            case AddAddress(address):
                await network.add_address(name, address)
            case RemoveAddress(address):
                await network.remove_address(name, address)
            case SetMtu(mtu):
                await network.set_mtu(name, mtu)
            case SetUp():
                await network.set_up(name)
            case SetDown():
                await network.set_down(name)
            case RemovePeer() | PutPeer() | AddRoute() | RemoveRoute():
                raise AssertionError("applied in runs")

    # the link

    async def _create_link(self, change: CreateLink) -> None:
        self._backend = None  # what is undone after a failure is what was made from here on
        if await self._network.link(self.interface) is not None:
            raise ForeignLink(
                f"{self.interface} exists already: remove it (ip link delete {self.interface}) or set mesh.interface"
            )
        # the kernel would tell only when the link is brought up, with addresses on it and the world notified
        _probe_port(change.listen_port)
        self._backend = backend = await self._create_by_some_backend()
        await self._network.set_alias(self.interface)
        await self._devices[backend].set_device(change.private_key, change.listen_port)
        await self._network.set_mtu(self.interface, change.mtu)

    async def _create_by_some_backend(self) -> Backend:
        causes: list[str] = []
        if Backend.KERNEL in self._allowed:
            try:
                await self._network.create_wireguard_link(self.interface)
                return Backend.KERNEL
            except OSError as exc:
                if exc.errno not in {errno.EOPNOTSUPP, errno.ENODEV}:
                    raise
                causes.append("kernel: no wireguard module")
        if Backend.USERSPACE in self._allowed:
            missing = self._program.missing()
            if missing is None:
                await self._program.start()
                return Backend.USERSPACE
            causes.append(f"userspace: {missing}")
        raise BackendUnavailable(*causes, INSTALL)

    async def _undo_creation(self) -> None:
        with contextlib.suppress(OSError):
            if self._backend is not None:
                await self._delete_link()

    async def _delete_link(self) -> None:
        backend = await self._current_backend()
        if backend is Backend.KERNEL:
            # the kernel takes 12 ms for each peer still on a link it deletes, and lets nobody else in meanwhile
            device = await self._devices[backend].dump()
            await self._empty(backend, tuple(device.peers) if device is not None else ())
        self._program.expect_end()
        await self._network.delete_link(self.interface)
        if backend is Backend.USERSPACE:
            await self._program.end()
        self._backend = None

    async def _empty(self, backend: Backend, keys: Sequence[bytes]) -> None:
        for start in range(0, len(keys), REMOVED_AT_ONCE):
            batch = [RemovePeer(None, PublicKey(key)) for key in keys[start : start + REMOVED_AT_ONCE]]
            await self._devices[backend].change_peers(batch)

    async def _device(self) -> WireGuardDevice:
        """The side of the interface that knows WireGuard. ENODEV without one."""
        backend = await self._current_backend()
        if backend is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return self._devices[backend]

    async def _current_backend(self) -> Backend | None:
        if self._backend is None:
            link = await self._network.link(self.interface)
            self._backend = link.backend if link is not None else None
        return self._backend

    # runs of peers and of routes

    async def _apply_peers(self, changes: Sequence[PeerChange]) -> list[Outcome]:
        try:
            await (await self._device()).change_peers(changes)
            return [Outcome(change) for change in changes]
        except OSError as exc:
            if len(changes) == 1 or isinstance(exc, TimeoutError) or exc.errno in HOPELESS:
                return [_failed(change, self._translate(exc, _describe(change), change)) for change in changes]
        return [outcome for change in changes for outcome in await self._apply_peers([change])]

    async def _apply_routes(self, changes: Sequence[AddRoute | RemoveRoute]) -> list[Outcome]:
        try:
            codes = await self._network.change_routes(self.interface, changes)
        except OSError as exc:
            return [_failed(change, self._translate(exc, _describe(change), change)) for change in changes]
        return [
            Outcome(change)
            if not code
            else _failed(change, self._translate(OSError(code, os.strerror(code)), _describe(change), change))
            for change, code in zip(changes, codes, strict=True)
        ]

    # errors

    @contextlib.contextmanager
    def _door(self, doing: str, change: Change | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise self._translate(exc, doing, change) from exc

    @contextlib.contextmanager
    def _collect(self, failures: list[str], doing: str) -> Iterator[None]:
        try:
            with self._door(doing):
                yield
        except KernelError as exc:
            failures.append(str(exc))

    def _translate(self, exc: OSError, doing: str, change: Change | None = None) -> KernelError:
        code = exc.errno
        if code in {errno.EPERM, errno.EACCES}:
            return NotPermitted(f"no permission to {doing}: run as root or grant CAP_NET_ADMIN")
        if code == errno.EADDRINUSE:
            port = f" {change.listen_port}" if isinstance(change, CreateLink | SetDevice) else ""
            return PortInUse(f"UDP port{port} is in use by another program: stop it or set mesh.listen_port")
        if isinstance(exc, TimeoutError):
            return KernelError(f"could not {doing}: no answer within 5 s")
        if code in {errno.ENODEV, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET}:
            return KernelError(f"could not {doing}: {self.interface} is gone")
        if code == errno.EEXIST and isinstance(change, AddRoute):
            return KernelError(f"could not {doing}: another program has a route with this prefix and metric, remove it")
        return KernelError(f"could not {doing}: {exc.strerror}")


# what is applied in runs
_KINDS: dict[type, str] = {RemovePeer: "peers", PutPeer: "peers", AddRoute: "routes", RemoveRoute: "routes"}


def _kind(change: Change) -> str:
    return _KINDS.get(type(change), "single")


def _is_new_peer(change: Change) -> bool:
    return isinstance(change, PutPeer) and change.is_new


def _failed(change: Change, cause: KernelError) -> Outcome:
    return Outcome(change, str(cause), cause)


def _describe(change: Change) -> str:
    """What was being done, as it follows "could not"."""
    match change:
        case ReplaceFirewall():
            return f"replace table {FAMILY} {TABLE}"
        case RemoveFirewall():
            return f"delete table {FAMILY} {TABLE}"
        case CreateLink():
            return "create a WireGuard interface"
        case DeleteLink():
            return "delete the interface"
        case SetAlias():
            return "set the alias"
        case SetDevice():
            return "set key and port"
        case RenewSessions():
            return "renew the sessions"
        case AddAddress(address):
            return f"add address {address}"
        case RemoveAddress(address):
            return f"remove address {address}"
        case SetMtu(mtu):
            return f"set MTU {mtu}"
        case SetUp():
            return "bring the interface up"
        case SetDown():
            return "take the interface down"
        case RemovePeer(peer_id, public_key):
            return f"remove peer {peer_id or public_key.short}"
        case PutPeer(peer_id):
            return f"write peer {peer_id}"
        case AddRoute(route):
            return f"add route {route.prefix}"
        case RemoveRoute(route):
            return f"remove route {route.prefix}"


def _probe_port(port: int) -> None:
    """EADDRINUSE when some socket holds the port, on either family."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise
