"""Links, addresses and routes over rtnetlink: single things through pyroute2, routes in bulk as packed messages.

A socket is opened for each call: it costs 0.3 ms, and no call finds answers that an earlier one did not wait for.
Everything raises OSError. Deleting what is absent succeeds, and so does adding what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

from plexd.linux import routes
from plexd.linux.netlink import NETLINK_ROUTE, TIMEOUT_SECONDS, NetlinkSocket
from plexd.linux.pyroute import AsyncIPRoute, NetlinkError
from plexd.mesh.address import Prefix, format_ip, parse_ip
from plexd.mesh.changes import AddRoute, RemoveRoute
from plexd.mesh.observed import MESH_ALIAS, Backend, Link, Route

IFF_UP = 1
SCOPE_LINK = 253
BACKENDS = {"wireguard": Backend.KERNEL, "tun": Backend.USERSPACE}


class Surroundings(NamedTuple):
    """A link of some name with what hangs on it, and the MTU of the way out."""

    link: Link | None
    addresses: frozenset[Prefix]
    routes: frozenset[Route]
    underlay_mtu: int | None


class Network:
    """`writes` counts the messages sent to change something."""

    def __init__(self) -> None:
        self.writes = 0

    async def observe(self, name: str) -> Surroundings:
        async with _pyroute() as ipr:
            link = await _link(ipr, name)
            addresses = await _addresses(ipr, link.ifindex) if link is not None else frozenset()
            table = await asyncio.to_thread(_route_table, link.ifindex if link is not None else None)
            return Surroundings(link, addresses, table.ours, await _underlay_mtu(ipr, table.defaults))

    async def link(self, name: str) -> Link | None:
        async with _pyroute() as ipr:
            return await _link(ipr, name)

    async def create_wireguard_link(self, name: str) -> None:
        """EOPNOTSUPP when the kernel has no WireGuard, EEXIST when there is a link of that name."""
        await self._set("add", ifname=name, kind="wireguard")

    async def delete_link(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
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
        async with _pyroute() as ipr:
            try:
                await ipr.addr(command, index=_index(name), address=format_ip(address.packed), prefixlen=address.length)
            except NetlinkError as exc:
                if exc.code != done_already:
                    raise

    async def change_routes(self, name: str, changes: Sequence[AddRoute | RemoveRoute]) -> list[int]:
        """In order; for each 0 or the errno it was refused with, EEXIST when the route is somebody else's."""
        ifindex = _index(name)
        results, sent = await asyncio.to_thread(_change_routes, ifindex, changes)
        self.writes += sent
        return results


@contextlib.asynccontextmanager
async def _pyroute() -> AsyncIterator[Any]:
    """A pyroute2 socket whose errors are OSErrors; TimeoutError after 5 s."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS), AsyncIPRoute() as ipr:
            yield ipr
    except NetlinkError as exc:
        raise OSError(exc.code, os.strerror(exc.code)) from exc


def _index(name: str) -> int:
    """Asked for anew at each use: a link made anew has another one. ENODEV without such a link."""
    return socket.if_nametoindex(name)


async def _link(ipr: Any, name: str) -> Link | None:
    try:
        (link,) = await ipr.link("get", ifname=name)
    except NetlinkError as exc:
        if exc.code == errno.ENODEV:
            return None
        raise
    info = link.get("linkinfo")
    kind = info.get("kind") if info else ""
    return Link(
        name,
        link["index"],
        BACKENDS.get(kind),
        link.get("ifalias") or "",
        link.get("mtu"),
        bool(link["flags"] & IFF_UP),
    )


async def _addresses(ipr: Any, ifindex: int) -> frozenset[Prefix]:
    found = [address async for address in await ipr.addr("dump", index=ifindex)]
    return frozenset(
        # IFA_ADDRESS is the other end on a point-to-point link, IFA_LOCAL ours
        Prefix(parse_ip(address.get("local") or address.get("address")), address["prefixlen"])
        for address in found
        if address["index"] == ifindex and address["scope"] < SCOPE_LINK
    )


async def _underlay_mtu(ipr: Any, defaults: Iterable[routes.DefaultRoute]) -> int | None:
    mtus: list[int] = []
    for route in routes.preferred(defaults):
        if route.mtu:
            mtus.append(route.mtu)
            continue
        for ifindex in route.ifindexes:
            with contextlib.suppress(NetlinkError):  # the link may be gone since
                (link,) = await ipr.link("get", index=ifindex)
                mtus.append(link.get("mtu"))
    return min(mtus, default=None)


def _route_table(ifindex: int | None) -> routes.RouteTable:
    with NetlinkSocket(NETLINK_ROUTE) as carrier:
        payloads = carrier.dump(routes.dump_request())
    try:
        return routes.read_dump(payloads, ifindex)
    except (ValueError, struct.error) as exc:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO)) from exc


def _change_routes(ifindex: int, changes: Sequence[AddRoute | RemoveRoute]) -> tuple[list[int], int]:
    """The results, and how many messages were sent."""
    requests = [
        routes.add_request(change.route, ifindex, replace=False)
        if isinstance(change, AddRoute)
        else routes.remove_request(change.route, ifindex)
        for change in changes
    ]
    with NetlinkSocket(NETLINK_ROUTE) as carrier:
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
    differing: list[int] = []
    for i in taken:
        wanted = changes[i].route
        if wanted in held:
            results[i] = 0
        elif (wanted.prefix, wanted.metric) in ours:
            differing.append(i)
    requests = [routes.add_request(changes[i].route, ifindex, replace=True) for i in differing]
    for i, code in zip(differing, carrier.send(requests), strict=True):
        results[i] = code
    return len(requests)
