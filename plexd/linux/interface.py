"""One WireGuard interface of the kernel, known by its name and its alias: look at it, change it, take it down.

The interface hides which WireGuard runs it (the kernel's, or a program in user space) and how plexd speaks to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, cast

from plexd.errors import BackendUnavailable, ForeignLink, KernelError
from plexd.linux.kernel_errors import KernelErrors, describe, failed
from plexd.linux.network import Network
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
    DeviceChange,
    Outcome,
    PeerChange,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    SetAlias,
    SetDevice,
    SetDown,
    SetMtu,
    SetUp,
)
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import Backend, Observed, Route

# a peer refused for one of these is no better off alone
HOPELESS = {errno.ENODEV, errno.EPERM, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET}
REMOVED_AT_ONCE = 1000  # peers, at tear-down
INSTALL = "install wireguard-go and provide /dev/net/tun, or run a kernel with WireGuard (Debian: linux-image-amd64)"


class InterfaceName(NamedTuple):
    """Which interface it is. `alias` marks the link as plexd's; `section` is the part of the configuration about it."""

    name: str
    alias: str
    section: str


class Interface:
    """`is_wanted` tells whether a route belongs on the interface: a route that comes or goes accordingly needs no look.

    `damaged` is set when the program that runs the interface in user space died, `noticed` when a look is due because a
    new endpoint is reached over a narrower way than all others.
    """

    def __init__(
        self,
        name: InterfaceName,
        backend: Literal["auto", "kernel", "userspace"],
        userspace_program: str,
        damaged: asyncio.Event,
        noticed: asyncio.Event,
    ) -> None:
        self.name = name.name
        self.network = Network()
        self.is_wanted: Callable[[Route], bool] | None = None
        self._alias = name.alias
        self._errors = KernelErrors(name.name, name.section)
        self._noticed = noticed
        self._allowed = tuple(Backend) if backend == "auto" else (Backend(backend),)
        self._program = Program(name.name, userspace_program, damaged, name.section)
        self._devices: dict[Backend, WireGuardDevice] = {
            Backend.KERNEL: KernelDevice(name.name),
            Backend.USERSPACE: UserspaceDevice(self._program),
        }
        self._backend: Backend | None = None
        self._roamed: frozenset[bytes] = frozenset()  # endpoints of peers at the last dump that no candidate names

    @property
    def writes(self) -> int:
        """The number of messages, on netlink or UAPI, that were sent to change something."""
        return self.network.writes + sum(device.writes for device in self._devices.values())

    async def observe(self, endpoints: Collection[bytes] | None = None, *, device: bool = True) -> Observed:
        """Without `device` the look leaves out keys and peers, without `endpoints` the MTU of the underlay.

        `endpoints` are the packed addresses of the peers' endpoints. Raises KernelError.
        """
        with self._errors.translated("look at the interface"):
            seen = await self.network.observe(
                self.name, self._roamed.union(endpoints) if endpoints is not None else None
            )
            backend = seen.link.backend if seen.link is not None else None
            dump = await self._devices[backend].dump() if device and backend is not None else None
        if dump is not None and endpoints is not None:
            held = {peer.endpoint.packed for peer in dump.peers.values() if peer.endpoint is not None}
            self._roamed = frozenset(held.difference(endpoints))
        return Observed(seen.link, dump, seen.addresses, seen.routes, seen.underlay_mtu, seen.ipv6)

    async def apply(self, changes: Sequence[DeviceChange]) -> list[Outcome]:
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
                        outcomes[created] = failed(changes[created], cause)
                        return outcomes + [failed(skipped, cause) for skipped in changes[len(outcomes) :]]
        await self._follow_new_endpoints(changes)
        return await self._begin_handshakes(outcomes)

    async def _begin_handshakes(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Of new peers in great number, now that everything is in place; none of them is done when this fails."""
        try:
            for device in self._devices.values():
                await device.begin_handshakes()
        except OSError as exc:
            cause = self._errors.translate(exc, "have the new peers shake hands")
            return [
                failed(outcome.change, cause) if outcome.error is None and _is_new_peer(outcome.change) else outcome
                for outcome in outcomes
            ]
        return outcomes

    async def _follow_new_endpoints(self, changes: Sequence[DeviceChange]) -> None:
        """A peer that an event brings may be at the end of a narrower way than all others: then a look is due."""
        endpoints = {
            change.endpoint.packed for change in changes if isinstance(change, PutPeer) and change.endpoint is not None
        }
        with contextlib.suppress(OSError):  # the next pass asks again
            if endpoints and await self.network.follow_too(endpoints):
                self._noticed.set()

    async def tear_down(self, own_public: PublicKey | None) -> bool:
        """Remove the peers, the link and the process of a userspace WireGuard; False when there is no link of ours.

        A link is ours by its alias, or when it holds the private key of `own_public`; no other link is touched. Every
        step is tried; KernelError then tells what failed.
        """
        observed = await self.observe()
        link, device = observed.link, observed.device
        key = device.private_key if device is not None else None
        if link is None or link.backend is None:
            return False
        if link.alias != self._alias and (own_public is None or key is None or key.public() != own_public):
            return False
        failures: list[str] = []
        with self._errors.collected(failures, "remove the peers"):
            await self._empty(link.backend, tuple(device.peers) if device is not None else ())
        with self._errors.collected(failures, f"delete link {self.name}"):
            await self._delete_link()
        if failures:
            with self._errors.collected(failures, "remove the routes"):
                await self.network.change_routes(self.name, [RemoveRoute(route) for route in observed.routes])
            raise KernelError("; ".join(failures))
        return True

    def close(self) -> None:
        """Let go of the interface, which stays as it is."""
        self._program.close()

    async def _attempt(self, change: DeviceChange) -> Outcome:
        try:
            with self._errors.translated(describe(change), change):
                await self._apply(change)
        except KernelError as exc:
            return failed(change, exc)
        return Outcome(change)

    async def _apply(self, change: DeviceChange) -> None:
        network, name = self.network, self.name
        match change:
            case CreateLink():
                await self._create_link(change)
            case DeleteLink():
                await self._delete_link()
            case SetAlias():
                await network.set_alias(name, self._alias)
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
                raise AssertionError("peers and routes are applied in runs")

    # the link

    async def _create_link(self, change: CreateLink) -> None:
        self._backend = None  # what is undone after a failure is what was made from here on
        if await self.network.link(self.name) is not None:
            raise ForeignLink(
                f"{self.name} exists already: remove it (ip link delete {self.name}) "
                f"or set {self._errors.section}.interface"
            )
        # the kernel would tell only when the link is brought up, with addresses on it and the world notified
        _probe_port(change.listen_port)
        self._backend = backend = await self._create_by_some_backend()
        await self.network.set_alias(self.name, self._alias)
        await self._devices[backend].set_device(change.private_key, change.listen_port)
        await self.network.set_mtu(self.name, change.mtu)

    async def _create_by_some_backend(self) -> Backend:
        causes: list[str] = []
        if Backend.KERNEL in self._allowed:
            try:
                await self.network.create_wireguard_link(self.name)
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
        await self.network.delete_link(self.name)
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
            link = await self.network.link(self.name)
            self._backend = link.backend if link is not None else None
        return self._backend

    # runs of peers and of routes

    async def _apply_peers(self, changes: Sequence[PeerChange]) -> list[Outcome]:
        try:
            await (await self._device()).change_peers(changes)
            return [Outcome(change) for change in changes]
        except OSError as exc:
            if len(changes) == 1 or isinstance(exc, TimeoutError) or exc.errno in HOPELESS:
                return [failed(change, self._errors.translate(exc, describe(change), change)) for change in changes]
        return [outcome for change in changes for outcome in await self._apply_peers([change])]

    async def _apply_routes(self, changes: Sequence[AddRoute | RemoveRoute]) -> list[Outcome]:
        try:
            codes = await self.network.change_routes(self.name, changes)
        except OSError as exc:
            return [failed(change, self._errors.translate(exc, describe(change), change)) for change in changes]
        return [
            Outcome(change)
            if not code
            else failed(change, self._errors.translate(OSError(code, os.strerror(code)), describe(change), change))
            for change, code in zip(changes, codes, strict=True)
        ]


# what is applied in runs
_KINDS: dict[type, str] = {RemovePeer: "peers", PutPeer: "peers", AddRoute: "routes", RemoveRoute: "routes"}


def _kind(change: DeviceChange) -> str:
    return _KINDS.get(type(change), "single")


def _is_new_peer(change: Change) -> bool:
    return isinstance(change, PutPeer) and change.is_new


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
