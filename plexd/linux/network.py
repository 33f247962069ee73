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
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from plexd.linux import links, routes
from plexd.linux.netlink import NETLINK_ROUTE, TIMEOUT_SECONDS, NetlinkSocket
from plexd.mesh.address import Prefix, format_ip
from plexd.mesh.changes import AddRoute, RemoveRoute
from plexd.mesh.observed import MESH_ALIAS, Link, Route


class Surroundings(NamedTuple):
    """A link of some name with what hangs on it, and the MTU of the way out."""

    link: Link | None
    addresses: frozenset[Prefix]
    routes: frozenset[Route]
    underlay_mtu: int | None


class Watched(NamedTuple):
    """What the last look went by: the link it found, and the MTUs of the links of the way out, all by index."""

    ifindex: int | None
    underlay_mtus: Mapping[int, int]


class Network:
    """`writes` counts the messages sent to change something; `watched` belongs to the last look."""

    def __init__(self) -> None:
        self.writes = 0
        self.watched = Watched(None, {})

    async def observe(self, name: str) -> Surroundings:
        surroundings, self.watched = await asyncio.to_thread(_observe, name)
        return surroundings

    async def link(self, name: str) -> Link | None:
        return await asyncio.to_thread(_link, name)

    async def create_wireguard_link(self, name: str) -> None:
        """EOPNOTSUPP when the kernel has no WireGuard, EEXIST when there is a link of that name."""
        await self._set("add", ifname=name, kind="wireguard")

    async def delete_link(self, name: str) -> None:
        try:
            await self._set("del", index=_index(name))
        except OSError as exc:
            if exc.errno != errno.ENODEV:
                raise

    async def set_alias(self, name: str) -> None:
        await self._set("set", index=_index(name), ifalias=MESH_ALIAS)

    async def set_mtu(self, name: str, mtu: int) -> None:
        await self._set("set", index=_index(name), mtu=mtu)

    async def set_up(self, name: str) -> None:
        await self._set("set", index=_index(name), state="up")

    async def _set(self, command: str, **what: Any) -> None:
        self.writes += 1
        async with _pyroute() as ipr:
            await ipr.link(command, **what)

    async def add_address(self, name: str, address: Prefix) -> None:
        await self._address("add", name, address, errno.EEXIST)

    async def remove_address(self, name: str, address: Prefix) -> None:
        await self._address("del", name, address, errno.EADDRNOTAVAIL)

    async def _address(self, command: str, name: str, address: Prefix, done_already: int) -> None:
        self.writes += 1
        try:
            async with _pyroute() as ipr:
                await ipr.addr(command, index=_index(name), address=format_ip(address.packed), prefixlen=address.length)
        except OSError as exc:
            if exc.errno != done_already:
                raise

    async def change_routes(self, name: str, changes: Sequence[AddRoute | RemoveRoute]) -> list[int]:
        """In order; for each 0 or the errno it was refused with, EEXIST when the route is somebody else's."""
        results, sent = await asyncio.to_thread(_change_routes, _index(name), changes)
        self.writes += sent
        return results


async def local_addresses() -> frozenset[bytes]:
    """Every address of every link of this host."""
    return await asyncio.to_thread(_local_addresses)


@contextlib.asynccontextmanager
async def _pyroute() -> AsyncIterator[Any]:
    """A pyroute2 socket whose errors are OSErrors; TimeoutError after 5 s."""
    # seldom needed, 7 MB, and 65 ms that would hold up the loop
    pyroute = await asyncio.to_thread(importlib.import_module, "plexd.linux.pyroute")
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


def _observe(name: str) -> tuple[Surroundings, Watched]:
    with _carrier() as carrier:
        link = _get_link(carrier, name)
        ifindex = link.ifindex if link is not None else None
        addresses = (
            links.read_addresses(carrier.dump(links.dump_addresses()), link.ifindex)
            if link is not None
            else frozenset[Prefix]()
        )
        table = routes.read_dump(carrier.dump(routes.dump_request()), ifindex)
        of_routes, of_links = _underlay_mtus(carrier, table.defaults)
        underlay_mtu = min((*of_routes, *of_links.values()), default=None)
        return Surroundings(link, addresses, table.ours, underlay_mtu), Watched(ifindex, of_links)


def _link(name: str) -> Link | None:
    with _carrier() as carrier:
        return _get_link(carrier, name)


def _local_addresses() -> frozenset[bytes]:
    with _carrier() as carrier:
        return links.read_local(carrier.dump(links.dump_addresses()))


def _get_link(carrier: NetlinkSocket, name: str) -> Link | None:
    try:
        (payload,) = carrier.get(links.get_link(name))
    except OSError as exc:
        if exc.errno == errno.ENODEV:
            return None
        raise
    return links.read_link(payload)


def _underlay_mtus(carrier: NetlinkSocket, defaults: Iterable[routes.DefaultRoute]) -> tuple[list[int], dict[int, int]]:
    """Of the default routes that have one of their own, and of the links of the others by index."""
    of_routes: list[int] = []
    of_links: dict[int, int] = {}
    for route in routes.preferred(defaults):
        if route.mtu:
            of_routes.append(route.mtu)
            continue
        for ifindex in route.ifindexes:
            with contextlib.suppress(OSError):  # the link may be gone since
                (payload,) = carrier.get(links.get_link_at(ifindex))
                of_links[ifindex] = links.read_link(payload).mtu
    return of_routes, of_links


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
