"""What the kernel tells of changes to links, addresses, routes and rules, boiled down to: a look is due.

WireGuard tells nothing, so peers are no part of this. A notification says only where to look, never what is there: by
the time it is read something else may be true. So nothing is kept of it, and those that were lost cost one look.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

from plexd.linux import links, routes
from plexd.linux.netlink import NETLINK_ROUTE, RECEIVE_BYTES, split
from plexd.linux.network import Network
from plexd.mesh.observed import Route

RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV4_RULE = 0x1, 0x10, 0x40, 0x80
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE, RTMGRP_IPV6_RULE = 0x100, 0x400, 0x40000
GROUPS = (
    RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV4_RULE
    | RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_ROUTE | RTMGRP_IPV6_RULE
)  # fmt: skip
RTM_NEWRULE, RTM_DELRULE = 32, 33
BUFFER_BYTES = 1 << 20  # room for some thousand notifications: our own changes come back as such
BURST = 64  # read in one go before others have their turn

SO_RCVBUFFORCE = 33


class Concern(IntEnum):
    """How far a change reaches; each includes those before it."""

    NONE = 0
    INTERFACE = 1
    WAYS = 2  # the ways to the peers may be others now


class Watched(Protocol):
    """An interface of ours. `network` knows what its last look went by; a look forgets what may be others now.

    A route that comes or goes just as `is_wanted` wants it needs no look; without `is_wanted` every route does.
    """

    @property
    def name(self) -> str: ...

    @property
    def network(self) -> Network: ...

    @property
    def is_wanted(self) -> Callable[[Route], bool] | None: ...


async def watch(watched: Sequence[Watched], noticed: asyncio.Event, readdressed: asyncio.Event) -> None:
    """Set `noticed` whenever a look is due, and once at the start: earlier changes were not heard. Raises OSError.

    `readdressed` is set when a link that is not `watched` gets or loses an address.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_ROUTE
    ) as sock:
        with contextlib.suppress(OSError):  # a smaller buffer only overflows sooner
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        sock.bind((0, GROUPS))

        def miss() -> None:
            for interface in watched:
                interface.network.underlay.forget()
            noticed.set()
            readdressed.set()

        miss()
        while True:
            for _ in range(BURST):
                try:
                    data = await loop.sock_recv(sock, RECEIVE_BYTES)
                except OSError as exc:
                    if exc.errno != errno.ENOBUFS:
                        raise
                    miss()
                    continue
                try:
                    concerns, is_readdressed = judge(data, watched)
                except (ValueError, struct.error, OSError):
                    miss()
                    continue
                for interface, concern in zip(watched, concerns, strict=True):
                    if concern is Concern.WAYS:
                        interface.network.underlay.forget()
                if any(concerns):
                    noticed.set()
                if is_readdressed:
                    readdressed.set()
            await asyncio.sleep(0)


def judge(data: bytes, watched: Sequence[Watched]) -> tuple[list[Concern], bool]:
    """For each interface the furthest that any of these notifications reaches, and whether one of them is about an
    address of another link.

    Raises ValueError, struct.error or OSError for notifications that are malformed.
    """
    furthest, is_readdressed = [Concern.NONE] * len(watched), False
    own = {interface.network.ifindex for interface in watched}
    for kind, _, _, start, end in split(data):
        payload = data[start:end]
        for i, interface in enumerate(watched):
            furthest[i] = max(furthest[i], _judge(kind, payload, interface))
        if kind in {links.RTM_NEWADDR, links.RTM_DELADDR}:
            ifindex, scope = links.read_owner(payload)
            is_readdressed = is_readdressed or (ifindex not in own and scope < links.SCOPE_LINK)
    return furthest, is_readdressed


def _judge(kind: int, payload: bytes, watched: Watched) -> Concern:
    network = watched.network
    if kind in {links.RTM_NEWLINK, links.RTM_DELLINK}:
        return _judge_link(kind, payload, watched.name, network)
    if kind in {links.RTM_NEWADDR, links.RTM_DELADDR}:
        ifindex, scope = links.read_owner(payload)
        if ifindex == network.ifindex:
            return Concern.INTERFACE
        # of the routes that go with an address the kernel does not tell; of those that come it does
        is_a_loss = kind == links.RTM_DELADDR and scope < links.SCOPE_LINK
        return Concern.WAYS if is_a_loss and network.underlay.is_followed else Concern.NONE
    if kind in {routes.RTM_NEWROUTE, routes.RTM_DELROUTE}:
        return _judge_route(kind, payload, network, watched.is_wanted)
    if kind in {RTM_NEWRULE, RTM_DELRULE}:
        return Concern.WAYS if network.underlay.is_followed else Concern.NONE
    return Concern.NONE


def _judge_link(kind: int, payload: bytes, interface: str, network: Network) -> Concern:
    link = links.read_link(payload)
    if interface == link.name or network.ifindex == link.ifindex:
        return Concern.INTERFACE
    known = network.underlay.links.get(link.ifindex)
    if known is None or (kind == links.RTM_NEWLINK and links.read_state(payload)[1] == known):
        return Concern.NONE
    return Concern.WAYS  # routes come and go with it untold


def _judge_route(kind: int, payload: bytes, network: Network, is_wanted: Callable[[Route], bool] | None) -> Concern:
    route = routes.read_route(payload, network.ifindex)
    if isinstance(route, Route):
        is_as_wanted = is_wanted is not None and is_wanted(route) == (kind == routes.RTM_NEWROUTE)
        return Concern.NONE if is_as_wanted else Concern.INTERFACE
    underlay = network.underlay
    if not underlay.is_followed:
        return Concern.NONE
    if route is not None and not underlay.ways:
        return Concern.WAYS  # a default route, by which the MTU is reckoned then
    prefix = routes.read_prefix(payload)
    return Concern.WAYS if prefix is not None and underlay.leads_to_any(prefix) else Concern.NONE
