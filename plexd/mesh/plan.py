"""The differ: what to do so that the kernel becomes the target. Pure, total, and empty when nothing differs.

Two ways in. `plan` compares the target with a look at everything: start-up, the periodic pass, repair. `plan_event`
compares two targets, before and after an event, and yields only what the event touches, without any look: one event
among a thousand peers costs the messages of one peer.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator

from plexd.errors import ForeignLink, NotAddressable
from plexd.mesh.address import Prefix, format_ip
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    PeerChange,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    ReplaceFirewall,
    SetAlias,
    SetDevice,
    SetMtu,
    SetUp,
)
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import MESH_ALIAS, Backend, Device, DevicePeer, Link, Observed, Route, is_fresh
from plexd.mesh.sharing import differing
from plexd.mesh.target import Settings, Target, TargetPeer, derive_mtu


def plan(target: Target, observed: Observed, now: float, moved: frozenset[str] = frozenset()) -> tuple[Change, ...]:
    """Every step from `observed` to `target`, in the order they must be taken; `now` in Unix seconds.

    `moved` are the peers whose endpoint candidate is news since the last pass: it is written even to a fresh peer.

    Raises ForeignLink when a link of our name is not ours: it is never touched. Raises NotAddressable when no interface
    of this host can have the mesh address.
    """
    if not _is_addressable(target.settings, observed):
        raise NotAddressable(
            f"the mesh address {format_ip(target.settings.mesh_ip)} needs IPv6, which this host has not: switch it on "
            f"(sysctl net.ipv6.conf.all.disable_ipv6=0) or register with an IPv4 address"
        )
    link = observed.link
    if link is not None and not is_ours(link, observed.device, target.settings):
        raise ForeignLink(
            f"{link.name} exists and is not plexd's: remove it (ip link delete {link.name}) or set mesh.interface"
        )
    changes: list[Change] = []
    if link is not None and (reason := _unusable(link, observed.device, target.settings)) is not None:
        changes.append(DeleteLink(reason))
        link = None
    if link is None:
        changes.extend(_build(target, observed))
        return (*_plan_firewall(target, observed), *changes)
    device = observed.device
    assert device is not None  # noqa: S101 - _unusable() is about exactly this
    changes.extend(_plan_device(link, device, target.settings))
    changes.extend(_plan_link(link, observed, target.settings))
    changes.extend(_plan_peers(target, device, now, moved))
    changes.extend(_plan_routes(_possible_routes(target, observed), observed.routes))
    if device.private_key != target.settings.private_key:
        changes.extend(_renew(target, (peer for peer in target.peers.values() if peer.public_key in device.peers)))
    return (*_plan_firewall(target, observed), *changes)


def plan_network(target: Target, observed: Observed) -> tuple[Change, ...] | None:
    """The steps for link, addresses and routes alone, from a look without the device.

    None when that says too little: the link is gone, or it takes the device to tell whether it is ours.
    """
    link = observed.link
    if link is None or link.backend is None or link.alias != MESH_ALIAS:
        return None
    if target.settings.backend not in {None, link.backend} or not _is_addressable(target.settings, observed):
        return None
    routes = _plan_routes(_possible_routes(target, observed), observed.routes)
    return (*_plan_firewall(target, observed), *_plan_link(link, observed, target.settings), *routes)


def withhold(changes: Iterable[Change], admitted: Container[str]) -> tuple[Change, ...]:
    """The steps that may be taken although the firewall they go with was refused and another one is in force.

    No peer is added but those `admitted` under that one (mesh contract, section 6.7).
    """
    return tuple(
        change
        for change in changes
        if not (isinstance(change, PutPeer) and change.is_new and change.peer_id not in admitted)
    )


def plan_event(
    before: Target, after: Target, *, ipv6: bool = True, is_moved: Callable[[str], bool] = lambda _: True
) -> tuple[Change, ...]:
    """What changed between two targets, as steps that may be repeated and need no look at the kernel.

    `ipv6`: whether the interface has it. `is_moved` tells of a peer's id whether its endpoint is news of its own, and
    no new answer for an old name: without a look it is not known whether the peer is fresh, and a pass decides.
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
    device: tuple[Change, ...] = ()
    renewed: Iterable[Change] = ()
    if before.settings.private_key != after.settings.private_key:
        # after new preshared keys: a handshake under the new key must find them in place
        device = (SetDevice(after.settings.private_key, after.settings.listen_port, ("key",)),)
        stayed = {peer.public_key for peer in before.peers.values()}
        renewed = _renew(after, (peer for peer in after.peers.values() if peer.public_key in stayed))
    routes: Iterable[Change] = ()
    if after.routes is not before.routes:
        new, old = after.routes - before.routes, before.routes - after.routes
        routes = _plan_routes(new if ipv6 else _without_ipv6(new), old if ipv6 else _without_ipv6(old))
    firewall: tuple[Change, ...] = ()
    if after.firewall is not None and after.firewall != before.firewall:
        firewall = (ReplaceFirewall(after.firewall),)
    return (*firewall, *removed, *updated, *device, *added, *routes, *renewed)


def _renew(target: Target, peers: Iterable[TargetPeer]) -> Iterator[Change]:
    """Without keepalive the mesh is one that stays silent until there is something to send."""
    if target.settings.keepalive and (keys := tuple(peer.public_key for peer in peers)):
        yield RenewSessions(keys, target.settings.keepalive)


def _is_addressable(settings: Settings, observed: Observed) -> bool:
    return observed.ipv6 or len(settings.mesh_ip) == 4


def _possible_routes(target: Target, observed: Observed) -> frozenset[Route]:
    """Where there is no IPv6, its routes are not wanted: each would fail at every pass."""
    return target.routes if observed.ipv6 else _without_ipv6(target.routes)


def _without_ipv6(routes: frozenset[Route]) -> frozenset[Route]:
    return frozenset(route for route in routes if len(route.prefix.packed) == 4)


def is_ours(link: Link, device: Device | None, settings: Settings) -> bool:
    """The ownership rule of the mesh contract, sections 3 and 3.2: the alias, or a device that holds our own key.

    A link without alias, key and peers that is down, or a TUN whose program has no key yet, is the remains of a start
    that died half-way.
    """
    if link.backend is None:
        return False
    if link.alias == MESH_ALIAS:
        return True
    if device is None:
        return False
    if device.private_key is None:
        return link.backend is Backend.USERSPACE or not (link.up or link.alias or device.peers)
    return device.private_key == settings.private_key


def _unusable(link: Link, device: Device | None, settings: Settings) -> str | None:
    if settings.backend is not None and link.backend is not settings.backend:
        return f"mesh.backend asks for {settings.backend}"
    if device is None:
        return "no program answers for it"
    return None


def _plan_firewall(target: Target, observed: Observed) -> Iterator[Change]:
    """First of all, so that nothing ever passes that it has not judged."""
    if target.firewall is not None and observed.firewall != target.firewall.digest:
        yield ReplaceFirewall(target.firewall)


def _build(target: Target, observed: Observed) -> Iterator[Change]:
    settings = target.settings
    yield CreateLink(settings.private_key, settings.listen_port, derive_mtu(settings, observed.underlay_mtu))
    yield AddAddress(Prefix.host(settings.mesh_ip))
    yield SetUp()
    for peer in target.peers.values():
        yield new_peer(peer, settings)
    for route in sorted(_possible_routes(target, observed), key=_route_identity):
        yield AddRoute(route)


def _plan_device(link: Link, device: Device, settings: Settings) -> Iterator[Change]:
    if link.alias != MESH_ALIAS:
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


def _plan_link(link: Link, observed: Observed, settings: Settings) -> Iterator[Change]:
    if link.mtu != (mtu := derive_mtu(settings, observed.underlay_mtu)):
        yield SetMtu(mtu)  # before the address: below 1280 there is no IPv6 on the link
    own = Prefix.host(settings.mesh_ip)
    if own not in observed.addresses:
        yield AddAddress(own)
    for address in sorted(observed.addresses - {own}):
        yield RemoveAddress(address)
    if not link.up:
        yield SetUp()


def _plan_peers(target: Target, device: Device, now: float, moved: frozenset[str]) -> Iterator[Change]:
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
            continue  # the peer of nearly every pass: no call is made for it
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
    """A peer that shook hands lately may have roamed: its endpoint is its own business (section 4.4)."""
    if peer.endpoint is None or held.endpoint == peer.endpoint:
        return False
    return moved or held.endpoint is None or not is_fresh(held.last_handshake, now)


def new_peer(peer: TargetPeer, settings: Settings) -> PutPeer:
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


def _plan_routes(wanted: frozenset[Route], held: frozenset[Route]) -> Iterator[Change]:
    if held == wanted:
        return
    replaced = {_route_identity(route) for route in wanted}
    for route in sorted(held - wanted, key=_route_identity):
        if _route_identity(route) not in replaced:  # adding replaces it without a gap
            yield RemoveRoute(route)
    for route in sorted(wanted - held, key=_route_identity):
        yield AddRoute(route)


def _route_identity(route: Route) -> tuple[Prefix, int]:
    """What the kernel tells routes of one table apart by."""
    return route.prefix, route.metric
