"""Links, addresses and routes, `plexd/linux/links.py`, `routes.py` and `notifications.py`: what is read can be written.

The input is what a socket receives: netlink messages, one after the other.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from ipaddress import ip_address
from typing import NamedTuple

from plexd.linux import links, routes
from plexd.linux.netlink import attribute, split
from plexd.linux.network import Network
from plexd.linux.notifications import judge
from plexd.mesh.observed import Link, Route

REFUSALS = (ValueError, struct.error)
OURS = 7  # index of the mesh interface
WORDS = (
    attribute(links.IFLA_IFNAME, b"plexd0\0"),
    attribute(links.IFLA_IFALIAS, b"plexd:mesh\0"),
    attribute(links.IFLA_MTU, b"\xdc\5\0\0"),
    attribute(links.IFLA_LINKINFO, attribute(links.IFLA_INFO_KIND, b"wireguard\0")),
    attribute(links.IFA_LOCAL, bytes(4)),
    attribute(routes.RTA_DST, bytes(16)),
    attribute(routes.RTA_OIF, struct.pack("=I", OURS)),
    attribute(routes.RTA_PRIORITY, struct.pack("=I", 2048)),
    attribute(routes.RTA_PREFSRC, bytes(4)),
    attribute(routes.RTA_METRICS, attribute(routes.RTAX_MTU, b"\x78\5\0\0")),
    attribute(routes.RTA_MULTIPATH, struct.pack("=HBBi", 8, 0, 0, 2)),
)
KINDS = {backend: kind for kind, backend in links.BACKENDS.items()}


class Followed(NamedTuple):
    """An interface whose notifications are judged."""

    name: str
    network: Network
    is_wanted: Callable[[Route], bool]


def check(data: bytes) -> None:
    with contextlib.suppress(OSError, *REFUSALS):
        judge(data, [Followed("plexd0", followed(), lambda route: route.source is None)])
    with contextlib.suppress(OSError):  # whatever came before counts
        for kind, _, _, start, end in split(data):
            if kind == links.RTM_NEWLINK:
                check_link(data[start:end])
            elif kind == links.RTM_NEWADDR:
                check_address(data[start:end])
            elif kind == routes.RTM_NEWROUTE:
                check_route(data[start:end])


def check_link(payload: bytes) -> None:
    name = payload.replace(b"\0", b"")[:15]  # others may give their links any
    named = link_message(Link("", 2, None, "", 1500, True)) + attribute(links.IFLA_IFNAME, name)
    assert links.read_link(named).mtu == 1500
    try:
        link = links.read_link(payload)
        ifindex, state = links.read_state(payload)
    except REFUSALS:
        return
    assert links.read_link(link_message(link)) == link
    assert (ifindex, state.mtu) == (link.ifindex, link.mtu)


def check_address(payload: bytes) -> None:
    try:
        of_all = links.read_local([payload])
        of_one = links.read_addresses([payload], links.read_owner(payload)[0])
    except REFUSALS:
        return
    for prefix in of_one:
        assert prefix.packed in of_all
        assert 0 <= prefix.length <= bits(prefix.packed)
    assert sum(map(bits, of_all)) in {0, 32, 128}


def check_route(payload: bytes) -> None:
    try:
        found = routes.read_dump([payload], OURS)
        routes.read_answer(payload)
    except REFUSALS:
        return
    for route in found.ours:
        assert 0 <= route.prefix.length <= bits(route.prefix.packed)
        assert route.source is None or bits(route.source) == bits(route.prefix.packed)
        for source in (route.source, route.prefix.packed, None):
            with_source = route._replace(source=source)
            written = routes.add_request(with_source, OURS, replace=False)
            assert routes.read_route(bytes(written.payload), OURS) == with_source


def followed() -> Network:
    """As a look leaves it that found the mesh, and a peer of each family behind link 2."""
    network = Network()
    network.ifindex = OURS
    way = routes.Way(0, (2,))
    peers = (bytes((192, 0, 2, 7)), bytes(16))
    network.underlay.follow(peers, 0.0)
    network.underlay.learn(dict.fromkeys(peers, way), network.underlay.epoch)
    network.underlay.links = {2: links.LinkState(1500, links.IFF_UP)}
    return network


def bits(packed: bytes) -> int:
    return ip_address(packed).max_prefixlen


def link_message(link: Link) -> bytes:
    parts = [struct.pack("=BxHiII", 0, 0, link.ifindex, int(link.up), 0)]
    parts += [
        attribute(links.IFLA_IFNAME, link.name.encode() + b"\0"),
        attribute(links.IFLA_IFALIAS, link.alias.encode()),
        attribute(links.IFLA_MTU, struct.pack("=I", link.mtu)),
    ]
    if link.backend is not None:
        kind = attribute(links.IFLA_INFO_KIND, KINDS[link.backend].encode() + b"\0")
        parts.append(attribute(links.IFLA_LINKINFO, kind))
    return b"".join(parts)
