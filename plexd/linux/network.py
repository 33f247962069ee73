"""Links, addresses and routes over rtnetlink: looks and routes as packed messages, other changes through pyroute2.

A look is taken at every pass and heartbeat, and routes come by the thousand; links and addresses change once in a
long while, so pyroute2 is loaded when they first do. A socket is opened for each call: that costs next to nothing, and
no call finds answers that an earlier one did not wait for.

Everything raises OSError. Deleting what is absent succeeds, and so does adding what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plexd.linux import links, routes
from plexd.linux.links import LinkState
from plexd.linux.netlink import NETLINK_ROUTE, TIMEOUT_SECONDS, NetlinkSocket
from plexd.linux.routes import Way
from plexd.linux.underlay import Underlay, narrowest
from plexd.mesh.address import Prefix, format_ip
from plexd.mesh.changes import AddRoute, RemoveRoute
from plexd.mesh.observed import Link, Route
from plexd.runtime.threads import in_mesh_thread

IFA_F_NODAD = 2
IPV6_SWITCHES = "/proc/sys/net/ipv6/conf/{}/disable_ipv6"


class Surroundings(NamedTuple):
    """A link of some name with what hangs on it, how much leaves for the peers at a time, and whether it has IPv6."""

    link: Link | None
    addresses: frozenset[Prefix]
    routes: frozenset[Route]
    underlay_mtu: int | None
    ipv6: bool


class Network:
    """`writes` counts the messages sent to change something. `ifindex` is that of the link that the last look found."""

    def __init__(self) -> None:
        self.writes = 0
        self.ifindex: int | None = None
        self.underlay = Underlay()

    async def observe(self, name: str, endpoints: Collection[bytes] | None = None) -> Surroundings:
        """With `endpoints`, packed addresses, also the smallest MTU of the ways to them, or of the default route's."""
        underlay = self.underlay
        unknown = underlay.follow(endpoints, time.monotonic()) if endpoints is not None else []
        known = underlay.ways if endpoints is not None else None
        epoch = underlay.epoch
        try:
            seen = await in_mesh_thread(_observe, name, unknown, known)
        except BaseException:
            if unknown:
                underlay.forget()
            raise
        self.ifindex = seen.link.ifindex if seen.link is not None else None
        underlay.learn(seen.answers, epoch)
        if endpoints is not None:
            underlay.links, underlay.mtu = seen.links, seen.mtu
        return Surroundings(seen.link, seen.addresses, seen.routes, seen.mtu, seen.ipv6)

    async def follow_too(self, endpoints: Iterable[bytes]) -> bool:
        """Whether these make the MTU another than the last look found; False while nobody wants to know it."""
        underlay = self.underlay
        unknown = underlay.follow_too(endpoints) if underlay.is_followed else []
        if not unknown:
            return False
        epoch = underlay.epoch
        try:
            answers, seen = await in_mesh_thread(_look_up, unknown, self.ifindex)
        except BaseException:
            underlay.forget()
            raise
        underlay.learn(answers, epoch)
        underlay.links = {**underlay.links, **seen}
        return bool(underlay.ways) and narrowest(underlay.ways, underlay.links) != underlay.mtu

    async def link(self, name: str) -> Link | None:
        return await in_mesh_thread(_link, name)

    async def create_wireguard_link(self, name: str) -> None:
        """EOPNOTSUPP when the kernel has no WireGuard, EEXIST when there is a link of that name."""
        await self._set("add", ifname=name, kind="wireguard")

    async def delete_link(self, name: str) -> None:
        try:
            await self._set("del", index=_index(name))
        except OSError as exc:
            if exc.errno != errno.ENODEV:
                raise

    async def set_alias(self, name: str, alias: str) -> None:
        await self._set("set", index=_index(name), ifalias=alias)

    async def set_mtu(self, name: str, mtu: int) -> None:
        await self._set("set", index=_index(name), mtu=mtu)

    async def set_up(self, name: str) -> None:
        await self._set("set", index=_index(name), state="up")

    async def set_down(self, name: str) -> None:
        await self._set("set", index=_index(name), state="down")

    async def _set(self, command: str, **what: Any) -> None:
        self.writes += 1
        async with _pyroute() as ipr:
            await ipr.link(command, **what)

    async def add_address(self, name: str, address: Prefix) -> None:
        # nobody else in there can have it: while the kernel made sure of that, it would refuse it as source of routes
        flags = {"flags": IFA_F_NODAD} if len(address.packed) == 16 else {}
        await self._address("add", name, address, errno.EEXIST, **flags)

    async def remove_address(self, name: str, address: Prefix) -> None:
        await self._address("del", name, address, errno.EADDRNOTAVAIL)

    async def _address(self, command: str, name: str, address: Prefix, done_already: int, **more: int) -> None:
        self.writes += 1
        what = {"index": _index(name), "address": format_ip(address.packed), "prefixlen": address.length}
        try:
            async with _pyroute() as ipr:
                await ipr.addr(command, **what, **more)
        except OSError as exc:
            if exc.errno != done_already:
                raise

    async def change_routes(self, name: str, changes: Sequence[AddRoute | RemoveRoute]) -> list[int]:
        """In order; for each 0 or the errno it was refused with, EEXIST when the route is somebody else's."""
        results, sent = await in_mesh_thread(_change_routes, _index(name), changes)
        self.writes += sent
        return results


async def local_addresses() -> frozenset[bytes]:
    """Every address of every link of this host."""
    return await in_mesh_thread(_local_addresses)


async def host_addresses(without: Collection[str]) -> frozenset[bytes]:
    """The addresses that reach beyond their link, of every link but those with the names in `without`."""
    return await in_mesh_thread(_host_addresses, without)


@contextlib.asynccontextmanager
async def _pyroute() -> AsyncIterator[Any]:
    """A pyroute2 socket whose errors are OSErrors; TimeoutError after 5 s."""
    # seldom needed, 7 MB, and 65 ms that would hold up the loop
    pyroute = await in_mesh_thread(importlib.import_module, "plexd.linux.pyroute")
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS), pyroute.AsyncIPRoute() as ipr:
            yield ipr
    except pyroute.NetlinkError as exc:
        raise OSError(exc.code, os.strerror(exc.code)) from exc


def _index(name: str) -> int:
    """Asked for anew at each use: a link made anew has another one. ENODEV without such a link."""
    try:
        return socket.if_nametoindex(name)
    except OSError as exc:  # which comes without a number
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from exc


# in threads


@contextlib.contextmanager
def _carrier() -> Iterator[NetlinkSocket]:
    """A socket whose answers are understood, or EPROTO."""
    try:
        with NetlinkSocket(NETLINK_ROUTE) as carrier:
            yield carrier
    except (ValueError, struct.error) as exc:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO)) from exc


class _Seen(NamedTuple):
    """`answers` are the ways asked for, `links` those that packets leave by, by index."""

    link: Link | None
    addresses: frozenset[Prefix]
    routes: frozenset[Route]
    ipv6: bool
    answers: Mapping[bytes, Way | None]
    links: Mapping[int, LinkState]
    mtu: int | None


def _observe(name: str, unknown: Sequence[bytes], known: Collection[Way] | None) -> _Seen:
    with _carrier() as carrier:
        link = _get_link(carrier, name)
        ifindex = link.ifindex if link is not None else None
        addresses = (
            links.read_addresses(carrier.dump(links.dump_addresses()), link.ifindex)
            if link is not None
            else frozenset[Prefix]()
        )
        table = routes.read_dump(carrier.dump(routes.dump_request()), ifindex)
        answers: dict[bytes, Way | None] = {}
        states: dict[int, LinkState] = {}
        mtu: int | None = None
        if known is not None:
            answers = _get_ways(carrier, unknown, ifindex)
            ways = {*known, *(way for way in answers.values() if way is not None)}
            if not ways:
                ways = {route.way for route in routes.preferred(table.defaults)}
            states = _get_states(carrier, ways)
            mtu = narrowest(ways, states)
        return _Seen(link, addresses, table.ours, _has_ipv6(name), answers, states, mtu)


def _look_up(endpoints: Sequence[bytes], ifindex: int | None) -> tuple[dict[bytes, Way | None], dict[int, LinkState]]:
    with _carrier() as carrier:
        answers = _get_ways(carrier, endpoints, ifindex)
        return answers, _get_states(carrier, {way for way in answers.values() if way is not None})


def _get_ways(carrier: NetlinkSocket, endpoints: Sequence[bytes], own: int | None) -> dict[bytes, Way | None]:
    """A way through the mesh itself is none: its MTU would follow itself down to the smallest."""
    requests = [routes.lookup_request(endpoint) for endpoint in endpoints]
    answers: dict[bytes, Way | None] = {}
    shared: dict[Way, Way] = {}  # thousands of peers are at the end of a few different ways
    for endpoint, payload in zip(endpoints, carrier.get_each(requests), strict=True):
        way = routes.read_answer(payload) if payload is not None else None
        answers[endpoint] = shared.setdefault(way, way) if way is not None and own not in way.ifindexes else None
    return answers


def _get_states(carrier: NetlinkSocket, ways: Iterable[Way]) -> dict[int, LinkState]:
    """Of the links that the ways leave by; one may be gone since."""
    ifindexes = sorted({ifindex for way in ways for ifindex in way.ifindexes})
    payloads = carrier.get_each([links.get_link_at(ifindex) for ifindex in ifindexes])
    return dict(links.read_state(payload) for payload in payloads if payload is not None)


def _has_ipv6(name: str) -> bool:
    """Whether a link of this name has IPv6, or would have it if it were made: not every kernel does, nor every host."""
    for which in (name, "default"):  # a link with an MTU below 1280 has no switch
        try:
            return Path(IPV6_SWITCHES.format(which)).read_text(encoding="ascii").strip() == "0"
        except FileNotFoundError:
            continue
    return False


def _link(name: str) -> Link | None:
    with _carrier() as carrier:
        return _get_link(carrier, name)


def _local_addresses() -> frozenset[bytes]:
    with _carrier() as carrier:
        return links.read_local(carrier.dump(links.dump_addresses()))


def _host_addresses(without: Collection[str]) -> frozenset[bytes]:
    with _carrier() as carrier:
        own = [_get_link(carrier, name) for name in without]
        ifindexes = {link.ifindex for link in own if link is not None}
        return links.read_reachable(carrier.dump(links.dump_addresses()), ifindexes)


def _get_link(carrier: NetlinkSocket, name: str) -> Link | None:
    try:
        (payload,) = carrier.get(links.get_link(name))
    except OSError as exc:
        if exc.errno == errno.ENODEV:
            return None
        raise
    return links.read_link(payload)


def _change_routes(ifindex: int, changes: Sequence[AddRoute | RemoveRoute]) -> tuple[list[int], int]:
    """The results, and how many messages were sent."""
    requests = [
        routes.add_request(change.route, ifindex, replace=False)
        if isinstance(change, AddRoute)
        else routes.remove_request(change.route, ifindex)
        for change in changes
    ]
    with _carrier() as carrier:
        results = carrier.send(requests)
        taken = [i for i, code in enumerate(results) if code == errno.EEXIST]
        replaced = _replace_ours(carrier, ifindex, changes, taken, results)
    for i, change in enumerate(changes):
        if isinstance(change, RemoveRoute) and results[i] == errno.ESRCH:
            results[i] = 0
    return results, len(requests) + replaced


def _replace_ours(
    carrier: NetlinkSocket,
    ifindex: int,
    changes: Sequence[AddRoute | RemoveRoute],
    taken: Sequence[int],
    results: list[int],
) -> int:
    """Of the refused additions, replace those where the route in the way is ours; how many that were.

    The kernel's own replacing would also take a route of another program that has the same prefix and metric.
    """
    if not taken:
        return 0
    held = routes.read_dump(carrier.dump(routes.dump_request()), ifindex).ours
    ours = {(route.prefix, route.metric) for route in held}
    replaced = [i for i in taken if (changes[i].route.prefix, changes[i].route.metric) in ours]
    requests = [routes.add_request(changes[i].route, ifindex, replace=True) for i in replaced]
    for i, code in zip(replaced, carrier.send(requests), strict=True):
        results[i] = code
    return len(requests)
