"""What the kernel tells of changes to links, addresses and routes, boiled down to: a look is due.

WireGuard tells nothing, so peers are no part of this. A notification says only where to look, never what is there: by
the time it is read something else may be true. So nothing is kept of it, and those that were lost cost one look.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable

from plexd.linux import links, routes
from plexd.linux.netlink import NETLINK_ROUTE, RECEIVE_BYTES, split
from plexd.linux.network import Watched
from plexd.mesh.observed import Route

RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE = 0x100, 0x400
GROUPS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE
BUFFER_BYTES = 1 << 20  # room for some thousand notifications: our own changes come back as such
BURST = 64  # read in one go before others have their turn

SO_RCVBUFFORCE = 33


async def watch(
    interface: str,
    watched: Callable[[], Watched],
    is_wanted: Callable[[Route], bool],
    noticed: asyncio.Event,
) -> None:
    """Set `noticed` whenever a look is due, for a start at once: what came before was not heard. Raises OSError.

    `watched` is what the last look went by. A route that comes or goes just as `is_wanted` wants it needs no look.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_ROUTE
    ) as sock:
        with contextlib.suppress(OSError):  # a smaller buffer only overflows sooner
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        sock.bind((0, GROUPS))
        noticed.set()
        while True:
            for _ in range(BURST):
                try:
                    data = await loop.sock_recv(sock, RECEIVE_BYTES)
                except OSError as exc:
                    if exc.errno != errno.ENOBUFS:
                        raise
                    noticed.set()  # some were lost
                    continue
                if not noticed.is_set() and is_concern(data, interface, watched(), is_wanted):
                    noticed.set()
            await asyncio.sleep(0)


def is_concern(data: bytes, interface: str, watched: Watched, is_wanted: Callable[[Route], bool]) -> bool:
    """Whether any of these notifications makes a look due; one that is not understood does."""
    try:
        return any(
            _concerns(kind, data[start:end], interface, watched, is_wanted) for kind, _, _, start, end in split(data)
        )
    except (ValueError, struct.error, OSError):
        return True


def _concerns(kind: int, payload: bytes, interface: str, watched: Watched, is_wanted: Callable[[Route], bool]) -> bool:
    if kind in {links.RTM_NEWLINK, links.RTM_DELLINK}:
        link = links.read_link(payload)
        if link.name == interface or link.ifindex == watched.ifindex:
            return True
        return watched.underlay_mtus.get(link.ifindex, link.mtu) != link.mtu
    if kind in {links.RTM_NEWADDR, links.RTM_DELADDR}:
        return links.address_ifindex(payload) == watched.ifindex
    if kind in {routes.RTM_NEWROUTE, routes.RTM_DELROUTE}:
        route = routes.read_route(payload, watched.ifindex)
        if isinstance(route, Route):
            return is_wanted(route) != (kind == routes.RTM_NEWROUTE)
        return route is not None
    return False
