"""The changes that turn what the kernel holds into what is wanted. Pure, total, and empty when nothing differs.

`plan` compares the target of one WireGuard device with a look at everything: start-up, the periodic pass, repair.
`plan_event` compares two targets, before and after an event, and yields only what the event touches, without any look:
one event among a thousand peers costs the messages of one peer. `plan_table` compares an nftables table with its
ruleset.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from plexd.errors import ForeignLink, NotAddressable
from plexd.mesh.address import Prefix, format_ip
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    CreateLink,
    DeleteLink,
    DeviceChange,
    PeerChange,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    ReplaceTable,
    SetAlias,
    SetDevice,
    SetMtu,
    SetUp,
)
from plexd.mesh.firewall import Ruleset
from plexd.mesh.keys import PrivateKey, PublicKey
from plexd.mesh.observed import Backend, Device, DevicePeer, Link, Observed, Route, is_fresh
from plexd.mesh.sharing import differing
from plexd.mesh.target import TargetPeer, derive_mtu

ChangeT = TypeVar("ChangeT", bound=DeviceChange)


class DeviceSettings(Protocol):
    """A WireGuard device without its peers and routes.

    `alias` marks the link as plexd's, `section` is the part of the configuration about the interface. `backend` None
    takes either back end. `mtu` 0 follows the underlay. `keepalive` is in seconds, 0 for none.
    """

    @property
    def interface(self) -> str: ...

    @property
    def alias(self) -> str: ...

    @property
    def section(self) -> str: ...

    @property
    def private_key(self) -> PrivateKey: ...

    @property
    def listen_port(self) -> int: ...

    @property
    def address(self) -> Prefix: ...

    @property
    def mtu(self) -> int: ...

    @property
    def keepalive(self) -> int: ...

    @property
    def backend(self) -> Backend | None: ...


class DeviceTarget(Protocol):
    """A WireGuard device as the kernel should hold it. `peers` are by peer id."""

    @property
    def settings(self) -> DeviceSettings: ...

    @property
    def peers(self) -> Mapping[str, TargetPeer]: ...

    @property
    def routes(self) -> frozenset[Route]: ...


def plan(
    target: DeviceTarget, observed: Observed, now: float, moved: frozenset[str] = frozenset()
) -> tuple[DeviceChange, ...]:
    """Every step from `observed` to `target`, in the order they must be taken; `now` in Unix seconds.

    `moved` are the peers whose endpoint candidate is news since the last pass: it is written even to a fresh peer.

    Raises ForeignLink when a link of our name is not ours: it is never touched. Raises NotAddressable when no interface
    of this host can have the address.
    """
    settings = target.settings
    if not _is_addressable(settings, observed):
        raise NotAddressable(
            f"the {settings.section} address {format_ip(settings.address.packed)} needs IPv6, which this host has not: "
            f"switch it on (sysctl net.ipv6.conf.all.disable_ipv6=0) or register with an IPv4 address"
        )
    link = observed.link
    if link is not None and not is_ours(link, observed.device, settings):
        raise ForeignLink(
            f"{link.name} exists and is not plexd's: remove it (ip link delete {link.name}) "
            f"or set {settings.section}.interface"
        )
    changes: list[DeviceChange] = []
    if link is not None and (reason := _unusable(link, observed.device, settings)) is not None:
        changes.append(DeleteLink(reason))
        link = None
    if link is None:
        changes.extend(_build(target, observed))
        return tuple(changes)
    device = observed.device
    assert device is not None  # noqa: S101 - _unusable() is about exactly this
    changes.extend(_plan_device(link, device, settings))
    changes.extend(_plan_link(link, observed, settings))
    changes.extend(_plan_peers(target, device, now, moved))
    changes.extend(_plan_routes(_possible_routes(target, observed), observed.routes))
    if device.private_key != settings.private_key:
        changes.extend(_renew(target, (peer for peer in target.peers.values() if peer.public_key in device.peers)))
    return tuple(changes)


def plan_network(target: DeviceTarget, observed: Observed) -> tuple[DeviceChange, ...] | None:
    """The steps for link, addresses and routes alone, from a look without the device.

    None when that look says too little: the link is gone, or only the device tells whether the link is ours.
    """
    link, settings = observed.link, target.settings
    if link is None or link.backend is None or link.alias != settings.alias:
        return None
    if settings.backend not in {None, link.backend} or not _is_addressable(settings, observed):
        return None
    routes = _plan_routes(_possible_routes(target, observed), observed.routes)
    return (*_plan_link(link, observed, settings), *routes)


def plan_table(wanted: Ruleset | None, held: str | None) -> tuple[ReplaceTable, ...]:
    """The change that puts `wanted` in force; `held` is the digest of the table that is there, None without one."""
    return (ReplaceTable(wanted),) if wanted is not None and held != wanted.digest else ()


def withhold(changes: Iterable[ChangeT], admitted: Container[str]) -> tuple[ChangeT, ...]:
    """The changes that may be made although the kernel refused their table and an older table is in force.

    Only peers that the older table has `admitted` are added (docs/contract/mesh.md §6.7).
    """
    return tuple(
        change
        for change in changes
        if not (isinstance(change, PutPeer) and change.is_new and change.peer_id not in admitted)
    )


def plan_event(
    before: DeviceTarget, after: DeviceTarget, *, ipv6: bool = True, is_moved: Callable[[str], bool] = lambda _: True
) -> tuple[DeviceChange, ...]:
    """The changes from one target to the next. They may be repeated, and need no look at the kernel.

    `ipv6` tells whether the interface has IPv6. `is_moved` tells by peer id whether a new endpoint is a new candidate;
    a new address of an old name is left to the next pass, which knows whether the peer is fresh.
    """
    removed: list[PeerChange] = []
    put: list[PutPeer] = []
    for peer_id in differing(before.peers, after.peers):
        was, peer = before.peers.get(peer_id), after.peers.get(peer_id)
        if was is not None and (peer is None or peer.public_key != was.public_key):
            removed.append(RemovePeer(peer_id, was.public_key))
            was = None
        if peer is None:
            continue
        if was is None:
            put.append(new_peer(peer, after.settings))
        else:
            change = _update(
                peer,
                psk=peer.psk != was.psk,
                endpoint=peer.endpoint is not None and peer.endpoint != was.endpoint and is_moved(peer_id),
                keepalive=None,
                allowed_ips=peer.allowed_ips != was.allowed_ips,
            )
            if change is not None:
                put.append(change)
    updated = [change for change in put if not change.is_new]
    added = [change for change in put if change.is_new]
    device: tuple[DeviceChange, ...] = ()
    renewed: Iterable[DeviceChange] = ()
    if before.settings.private_key != after.settings.private_key:
        # after new preshared keys: a handshake under the new key must find them in place
        device = (SetDevice(after.settings.private_key, after.settings.listen_port, ("key",)),)
        stayed = {peer.public_key for peer in before.peers.values()}
        renewed = _renew(after, (peer for peer in after.peers.values() if peer.public_key in stayed))
    routes: Iterable[DeviceChange] = ()
    if after.routes is not before.routes:
        new, old = after.routes - before.routes, before.routes - after.routes
        routes = _plan_routes(new if ipv6 else _without_ipv6(new), old if ipv6 else _without_ipv6(old))
    return (*removed, *updated, *device, *added, *routes, *renewed)


def _renew(target: DeviceTarget, peers: Iterable[TargetPeer]) -> Iterator[DeviceChange]:
    """Without keepalive peers stay silent until there is something to send."""
    if target.settings.keepalive and (keys := tuple(peer.public_key for peer in peers)):
        yield RenewSessions(keys, target.settings.keepalive)


def _is_addressable(settings: DeviceSettings, observed: Observed) -> bool:
    return observed.ipv6 or len(settings.address.packed) == 4


def _possible_routes(target: DeviceTarget, observed: Observed) -> frozenset[Route]:
    """Without IPv6 its routes are left out: each of them would fail at every pass."""
    return target.routes if observed.ipv6 else _without_ipv6(target.routes)


def _without_ipv6(routes: frozenset[Route]) -> frozenset[Route]:
    return frozenset(route for route in routes if len(route.prefix.packed) == 4)


def is_ours(link: Link, device: Device | None, settings: DeviceSettings) -> bool:
    """Whether the link is ours: by its alias, or because the device holds our key (docs/contract/mesh.md §3, §3.2).

    A link that is down and has no alias, key or peers, or a TUN device whose program has no key yet, is left over from
    a start that died half-way.
    """
    if link.backend is None:
        return False
    if link.alias == settings.alias:
        return True
    if device is None:
        return False
    if device.private_key is None:
        return link.backend is Backend.USERSPACE or not (link.up or link.alias or device.peers)
    return device.private_key == settings.private_key


def _unusable(link: Link, device: Device | None, settings: DeviceSettings) -> str | None:
    if settings.backend is not None and link.backend is not settings.backend:
        return f"{settings.section}.backend asks for {settings.backend}"
    if device is None:
        return "no program answers for it"
    return None


def _build(target: DeviceTarget, observed: Observed) -> Iterator[DeviceChange]:
    settings = target.settings
    yield CreateLink(settings.private_key, settings.listen_port, derive_mtu(settings.mtu, observed.underlay_mtu))
    yield AddAddress(settings.address)
    yield SetUp()
    for peer in target.peers.values():
        yield new_peer(peer, settings)
    for route in sorted(_possible_routes(target, observed), key=_route_identity):
        yield AddRoute(route)


def _plan_device(link: Link, device: Device, settings: DeviceSettings) -> Iterator[DeviceChange]:
    if link.alias != settings.alias:
        yield SetAlias()
    differing = tuple(
        name
        for name, differs in (
            ("key", device.private_key != settings.private_key),
            ("port", device.listen_port != settings.listen_port),
            ("fwmark", device.fwmark != 0),
        )
        if differs
    )
    if differing:
        yield SetDevice(settings.private_key, settings.listen_port, differing)


def _plan_link(link: Link, observed: Observed, settings: DeviceSettings) -> Iterator[DeviceChange]:
    if link.mtu != (mtu := derive_mtu(settings.mtu, observed.underlay_mtu)):
        yield SetMtu(mtu)  # before the address: below 1280 there is no IPv6 on the link
    own = settings.address
    if own not in observed.addresses:
        yield AddAddress(own)
    for address in sorted(observed.addresses - {own}):
        yield RemoveAddress(address)
    if not link.up:
        yield SetUp()


def _plan_peers(target: DeviceTarget, device: Device, now: float, moved: frozenset[str]) -> Iterator[DeviceChange]:
    settings = target.settings
    ids = {peer.public_key: peer for peer in target.peers.values()}
    for key in device.peers:
        if key not in ids:
            yield RemovePeer(None, PublicKey(key))
    added: list[PutPeer] = []
    for peer in ids.values():
        held = device.peers.get(peer.public_key)
        if held is None:
            added.append(new_peer(peer, settings))
            continue
        if (held.allowed_ips, held.endpoint, held.psk, held.keepalive) == (
            peer.allowed_ips, peer.endpoint, peer.psk, settings.keepalive
        ):  # fmt: skip
            continue  # nearly every peer of a pass: no call is made for it
        change = _update(
            peer,
            psk=held.psk != peer.psk,
            endpoint=_endpoint_due(peer, held, now, peer.id in moved),
            keepalive=settings.keepalive if held.keepalive != settings.keepalive else None,
            allowed_ips=held.allowed_ips != peer.allowed_ips and set(held.allowed_ips) != set(peer.allowed_ips),
        )
        if change is not None:
            yield change
    yield from added


def _endpoint_due(peer: TargetPeer, held: DevicePeer, now: float, moved: bool) -> bool:
    """A peer with a fresh handshake may have roamed: it keeps its endpoint (docs/contract/mesh.md §4.4)."""
    if peer.endpoint is None or held.endpoint == peer.endpoint:
        return False
    return moved or held.endpoint is None or not is_fresh(held.last_handshake, now)


def new_peer(peer: TargetPeer, settings: DeviceSettings) -> PutPeer:
    return PutPeer(
        peer.id, peer.public_key, True, peer.psk, peer.endpoint, settings.keepalive, peer.allowed_ips, ("added",)
    )


def _update(peer: TargetPeer, *, psk: bool, endpoint: bool, keepalive: int | None, allowed_ips: bool) -> PutPeer | None:
    fields = tuple(
        name
        for name, differs in (
            ("allowed_ips", allowed_ips),
            ("psk", psk),
            ("keepalive", keepalive is not None),
            ("endpoint", endpoint),
        )
        if differs
    )
    if not fields:
        return None
    return PutPeer(
        peer.id,
        peer.public_key,
        False,
        peer.psk if psk else None,
        peer.endpoint if endpoint else None,
        keepalive,
        peer.allowed_ips if allowed_ips else None,
        fields,
    )


def _plan_routes(wanted: frozenset[Route], held: frozenset[Route]) -> Iterator[DeviceChange]:
    if held == wanted:
        return
    replaced = {_route_identity(route) for route in wanted}
    for route in sorted(held - wanted, key=_route_identity):
        if _route_identity(route) not in replaced:  # adding replaces it without a gap
            yield RemoveRoute(route)
    for route in sorted(wanted - held, key=_route_identity):
        yield AddRoute(route)


def _route_identity(route: Route) -> tuple[Prefix, int]:
    """The key by which the kernel distinguishes routes of one routing table."""
    return route.prefix, route.metric
