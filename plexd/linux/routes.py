"""Routes as netlink messages, packed and unpacked in bulk. Pure."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from plexd.linux.netlink import (
    ATTRIBUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    attribute,
    attributes,
)
from plexd.mesh.address import Prefix
from plexd.mesh.observed import ROUTE_PROTOCOL, Route

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_F_FIB_MATCH = 0x2000
RTA_DST, RTA_OIF, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH, RTA_TABLE = 1, 4, 6, 7, 8, 9, 15
RTAX_MTU = 2
RTN_UNICAST, RTN_LOCAL = 1, 2
TABLE_MAIN = 254
SCOPE_LINK, SCOPE_NOWHERE = 253, 255

# family, destination length, source length, tos, table, protocol, scope, type, flags
_RTMSG = struct.Struct("=BBBBBBBBI")
_U32 = struct.Struct("=I")
_NEXT_HOP = struct.Struct("=HBBi")
_ANY: dict[int, bytes] = {socket.AF_INET: bytes(4), socket.AF_INET6: bytes(16)}
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}


class Way(NamedTuple):
    """How packets leave by some route: `mtu` is that of the route itself, 0 when it has none and its links' counts."""

    mtu: int
    ifindexes: tuple[int, ...]


class DefaultRoute(NamedTuple):
    family: int
    metric: int
    way: Way


class RouteTable(NamedTuple):
    """What matters to us of table main: our routes through our interface, and everybody's default routes."""

    ours: frozenset[Route]
    defaults: tuple[DefaultRoute, ...]


def dump_request() -> Message:
    """Asks for the routes of both families and all tables."""
    return Message(RTM_GETROUTE, 0, _RTMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0))


def lookup_request(packed: bytes) -> Message:
    """Asks which route packets of our own to this address take, by all rules and tables; refused when there is none.

    The route itself, not what was made of it: a path MTU learnt from somebody's ICMP message is none of the route's,
    and of several next hops all are told.
    """
    header = _RTMSG.pack(_FAMILY[len(packed)], len(packed) * 8, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH)
    return Message(RTM_GETROUTE, 0, header + attribute(RTA_DST, packed))


def add_request(route: Route, ifindex: int, *, replace: bool) -> Message:
    """Without `replace` the kernel refuses with EEXIST when anybody holds this prefix and metric."""
    flags = NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL)
    return Message(RTM_NEWROUTE, flags, _payload(route, ifindex, SCOPE_LINK, route.source))


def remove_request(route: Route, ifindex: int) -> Message:
    """Refused with ESRCH when it is gone. Matches our protocol on our interface, whatever its scope or source."""
    return Message(RTM_DELROUTE, 0, _payload(route, ifindex, SCOPE_NOWHERE, None))


def _payload(route: Route, ifindex: int, scope: int, source: bytes | None) -> bytes:
    packed, length = route.prefix
    family = _FAMILY[len(packed)]
    return b"".join(
        (
            _RTMSG.pack(family, length, 0, 0, TABLE_MAIN, ROUTE_PROTOCOL, scope, RTN_UNICAST, 0),
            attribute(RTA_DST, packed),
            attribute(RTA_OIF, _U32.pack(ifindex)),
            attribute(RTA_PRIORITY, _U32.pack(route.metric)),
            attribute(RTA_PREFSRC, source) if source is not None else b"",
        )
    )


def read_dump(payloads: Iterable[bytes], ifindex: int | None) -> RouteTable:
    """Sort a dump into our routes through the interface `ifindex` and the default routes past it.

    Raises ValueError when it is no dump of routes.
    """
    ours: list[Route] = []
    defaults: list[DefaultRoute] = []
    for payload in payloads:
        route = read_route(payload, ifindex)
        if isinstance(route, Route):
            ours.append(route)
        elif route is not None:
            defaults.append(route)
    return RouteTable(frozenset(ours), tuple(defaults))


def read_route(payload: bytes, ifindex: int | None) -> Route | DefaultRoute | None:
    """A route of ours through the interface `ifindex`, or a default route past it; None when it is neither.

    Raises ValueError (or struct.error) when it is no route.
    """
    family, length, _, _, table, protocol, _, kind, _ = _RTMSG.unpack_from(payload)
    if table != TABLE_MAIN or kind != RTN_UNICAST or family not in _ANY:
        return None
    if protocol != ROUTE_PROTOCOL and length:  # most of a big table is of no concern: look no further
        return None
    destination, oif, metric = _ANY[family], 0, 0
    source: bytes | None = None
    start, end = _RTMSG.size, len(payload)
    while start + 4 <= end:
        size, attr = ATTRIBUTE.unpack_from(payload, start)
        if size < 4 or start + size > end:
            raise ValueError("route attribute overruns its message")
        if attr == RTA_DST:
            destination = payload[start + 4 : start + size]
        elif attr == RTA_OIF:
            (oif,) = _U32.unpack_from(payload, start + 4)
        elif attr == RTA_PRIORITY:
            (metric,) = _U32.unpack_from(payload, start + 4)
        elif attr == RTA_PREFSRC:
            source = payload[start + 4 : start + size]
        start += size + 3 & ~3
    if oif == ifindex:
        if protocol != ROUTE_PROTOCOL:
            return None
        if source is not None and len(source) != len(_ANY[family]):
            raise ValueError("route from an address of another family")
        return Route(_prefix(family, destination, length), source, metric)
    return None if length else DefaultRoute(family, metric, _read_way(payload))


def read_prefix(payload: bytes) -> Prefix | None:
    """Where a route of any table and kind leads, None when no IP packets do. Raises ValueError (or struct.error)."""
    family, length, *_ = _RTMSG.unpack_from(payload)
    if family not in _ANY:
        return None
    given = (
        payload[start:end] for kind, start, end in attributes(payload, _RTMSG.size, len(payload)) if kind == RTA_DST
    )
    return _prefix(family, next(given, _ANY[family]), length)


def _prefix(family: int, packed: bytes, length: int) -> Prefix:
    if len(packed) != len(_ANY[family]) or length > len(packed) * 8:
        raise ValueError("route to an address of another family, or with a prefix that is too long")
    return Prefix(packed, length)


def read_answer(payload: bytes) -> Way | None:
    """What a lookup found, None when it is a route that refuses packets. Raises ValueError (or struct.error)."""
    kind = _RTMSG.unpack_from(payload)[7]
    return _read_way(payload) if kind in {RTN_UNICAST, RTN_LOCAL} else None


def _read_way(payload: bytes) -> Way:
    oif = mtu = 0
    hops: list[int] = []
    for kind, start, end in attributes(payload, _RTMSG.size, len(payload)):
        if kind == RTA_OIF:
            (oif,) = _U32.unpack_from(payload, start)
        elif kind == RTA_METRICS:
            mtu = _route_mtu(payload, start, end)
        elif kind == RTA_MULTIPATH:
            hops = _next_hops(payload, start, end)
    return Way(mtu, tuple(hops) or (oif,))


def _route_mtu(payload: bytes, start: int, end: int) -> int:
    for kind, at, _ in attributes(payload, start, end):
        if kind == RTAX_MTU:
            return int(_U32.unpack_from(payload, at)[0])
    return 0


def _next_hops(payload: bytes, start: int, end: int) -> list[int]:
    ifindexes = []
    while start + _NEXT_HOP.size <= end:
        length, _, _, ifindex = _NEXT_HOP.unpack_from(payload, start)
        if length < _NEXT_HOP.size:
            raise ValueError("next hop overruns its route")
        ifindexes.append(ifindex)
        start += length + 3 & ~3
    return ifindexes


def preferred(defaults: Iterable[DefaultRoute]) -> tuple[DefaultRoute, ...]:
    """The default route each family uses: the one of the smallest metric."""
    best: dict[int, DefaultRoute] = {}
    for route in defaults:
        held = best.get(route.family)
        if held is None or route.metric < held.metric:
            best[route.family] = route
    return tuple(best.values())
