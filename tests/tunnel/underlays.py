"""Underlays with a narrow place, and a mesh of two over each."""

from __future__ import annotations

from collections.abc import Callable

from plexd.lab.namespaces import Namespace
from tests.tunnel.harness import PORT, Member, Network, cable, route

Ends = tuple[Namespace, Namespace, int]  # and the number of the second one's network


def narrow_link(network: Network) -> Ends:
    """One cable that carries 1280 bytes."""
    one, other = network.namespace(), network.namespace()
    cable(one, other, "net", (2, 1), mtu=1280)
    return one, other, 2


def narrow_at_one_end(network: Network) -> Ends:
    """The first is on Ethernet, the second behind a router that reaches it with 1280 bytes."""
    one, router, other = network.namespace(), network.router(), network.namespace()
    cable(one, router, "net", (2, 1))
    cable(other, router, "far", (3, 2), mtu=1280)
    route(one, 3, (2, 2))
    route(other, 2, (3, 3))
    return one, other, 3


def narrow_in_the_middle(network: Network) -> Ends:
    """Both are on Ethernet, and between their routers 1280 bytes get through."""
    one, near, far, other = network.namespace(), network.router(), network.router(), network.namespace()
    cable(one, near, "net", (2, 1))
    cable(near, far, "narrow", (4, 1), mtu=1280)
    cable(far, other, "net", (3, 1))
    route(one, 3, (2, 2))
    route(near, 3, (4, 2))
    route(far, 2, (4, 1))
    route(other, 2, (3, 1))
    return one, other, 3


NARROW: dict[str, tuple[Callable[[Network], Ends], tuple[int, int]]] = {  # and the MTUs that the mesh gets
    "link of 1280 bytes": (narrow_link, (1280, 1280)),
    "1280 bytes at one end": (narrow_at_one_end, (1420, 1280)),
    "1280 bytes on the way": (narrow_in_the_middle, (1420, 1420)),
}


def endpoint(family: int, net: int, host: int) -> str:
    return f"192.0.{net}.{host}:{PORT}" if family == 4 else f"[2001:db8:{net}::{host}]:{PORT}"


def mesh_over(ends: Ends, interface: str, *, underlay: int, mesh: int) -> tuple[Member, Member]:
    """Two members; `underlay` and `mesh` are the IP versions below and above."""
    one, other, net = ends
    first, second = ("10.100.0.1", "10.100.0.2") if mesh == 4 else ("fd00:100::1", "fd00:100::2")
    return (
        Member(one, f"{interface}a", first, endpoint(underlay, 2, 1)),
        Member(other, f"{interface}b", second, endpoint(underlay, net, 2)),
    )
