"""Route messages; that kernels take them is shown where real ones do."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.linux import routes
from plexd.linux.netlink import attribute
from plexd.linux.routes import DefaultRoute, Way
from plexd.mesh.address import Prefix
from plexd.mesh.observed import Route

IFINDEX = 7
packed_ips = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
any_route = packed_ips.flatmap(
    lambda packed: st.builds(
        Route,
        st.builds(Prefix.of, st.just(packed), st.integers(0, len(packed) * 8)),
        st.none() | st.binary(min_size=len(packed), max_size=len(packed)),
        st.integers(1, 2**32 - 1),
    )
)


@given(st.lists(any_route))
def test_what_is_added_is_read_as_ours(wanted: list[Route]) -> None:
    """The kernel dumps a route in the form in which it is added."""
    payloads = [bytes(routes.add_request(route, IFINDEX, replace=False).payload) for route in wanted]
    assert routes.read_dump(payloads, IFINDEX).ours == frozenset(wanted)
    assert routes.read_dump(payloads, IFINDEX + 1).ours == frozenset()


def dumped(
    *parts: bytes, length: int = 0, table: int = 254, protocol: int = 4, kind: int = 1, family: int = socket.AF_INET
) -> bytes:
    return struct.pack("=BBBBBBBBI", family, length, 0, 0, table, protocol, 0, kind, 0) + b"".join(parts)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


@pytest.mark.parametrize(
    ("payload", "default"),
    [
        (dumped(number(routes.RTA_OIF, 2)), DefaultRoute(socket.AF_INET, 0, Way(0, (2,)))),
        (
            dumped(number(routes.RTA_OIF, 2), number(routes.RTA_PRIORITY, 100), family=socket.AF_INET6),
            DefaultRoute(socket.AF_INET6, 100, Way(0, (2,))),
        ),
        (
            dumped(
                attribute(routes.RTA_METRICS, number(5, 1) + number(routes.RTAX_MTU, 1300)), number(routes.RTA_OIF, 2)
            ),
            DefaultRoute(socket.AF_INET, 0, Way(1300, (2,))),
        ),
        (
            dumped(attribute(routes.RTA_MULTIPATH, struct.pack("=HBBiHBBi", 8, 0, 0, 2, 8, 0, 0, 3))),
            DefaultRoute(socket.AF_INET, 0, Way(0, (2, 3))),
        ),
    ],
)
def test_default_route_tells_how_it_leaves(payload: bytes, default: DefaultRoute) -> None:
    assert routes.read_dump([payload], IFINDEX).defaults == (default,)


@pytest.mark.parametrize(
    "payload",
    [
        dumped(number(routes.RTA_OIF, 2), table=100),
        dumped(number(routes.RTA_OIF, 2), kind=7),
        dumped(number(routes.RTA_OIF, IFINDEX)),
        dumped(number(routes.RTA_OIF, IFINDEX), attribute(routes.RTA_DST, bytes(4)), length=24),
        dumped(number(routes.RTA_OIF, 2), attribute(routes.RTA_DST, bytes(4)), length=24, protocol=112),
        dumped(number(routes.RTA_OIF, IFINDEX), attribute(routes.RTA_DST, bytes(4)), length=24, protocol=112, table=9),
    ],
)
def test_other_routes_are_of_no_concern(payload: bytes) -> None:
    assert routes.read_dump([payload], IFINDEX) == routes.RouteTable(frozenset(), ())


def test_each_family_prefers_its_smallest_metric() -> None:
    high, low = DefaultRoute(socket.AF_INET, 200, Way(0, (2,))), DefaultRoute(socket.AF_INET, 100, Way(0, (3,)))
    other = DefaultRoute(socket.AF_INET6, 1024, Way(0, (2,)))
    assert set(routes.preferred([high, low, other])) == {low, other}


def test_truncated_route_is_refused() -> None:
    with pytest.raises(ValueError, match="overruns"):
        routes.read_dump([dumped(struct.pack("=HH", 64, routes.RTA_OIF))], IFINDEX)
