"""What a look at the kernel shows. Peers are tuples, because a dump may build ten thousand of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from plexd.mesh.address import Endpoint, Prefix
from plexd.mesh.keys import PrivateKey

MESH_ALIAS = "plexd:mesh"  # IFLA_IFALIAS of the mesh interface: the mark that it is ours
MESH_SECTION = "mesh"  # of the configuration, about the mesh interface
ROUTE_PROTOCOL = 112
ROUTE_METRIC = 2048
HANDSHAKE_FRESH_SECONDS = 180  # a peer with a handshake at most this old is FRESH


class Backend(StrEnum):
    """Who runs WireGuard for the interface."""

    KERNEL = "kernel"
    USERSPACE = "userspace"


class DevicePeer(NamedTuple):
    """A peer in the device. Keys are plain bytes here; `psk` is 32 zero bytes when there is none.

    `last_handshake` is in Unix seconds, 0 for never.
    """

    public_key: bytes
    psk: bytes
    endpoint: Endpoint | None
    keepalive: int
    last_handshake: float
    rx_bytes: int
    tx_bytes: int
    allowed_ips: tuple[Prefix, ...]


def is_fresh(last_handshake: float, now: float) -> bool:
    """Whether a peer is FRESH. Both arguments are in Unix seconds; 0 means that there was no handshake.

    A handshake in the future was made before the clock was set back, and counts like one as far in the past.
    """
    return last_handshake > 0 and abs(now - last_handshake) <= HANDSHAKE_FRESH_SECONDS


@dataclass(frozen=True, slots=True)
class Device:
    private_key: PrivateKey | None
    listen_port: int
    fwmark: int
    peers: Mapping[bytes, DevicePeer]


class Link(NamedTuple):
    """`backend` is None when the link is neither a WireGuard link of the kernel nor a TUN device."""

    name: str
    ifindex: int
    backend: Backend | None
    alias: str
    mtu: int
    up: bool


class Route(NamedTuple):
    """A route of protocol 112 through the mesh interface in table main. `source` is the preferred source, if any."""

    prefix: Prefix
    source: bytes | None
    metric: int


@dataclass(frozen=True, slots=True)
class Observed:
    """`addresses` are the global ones, with the length they carry; link-local ones are not ours to judge.

    `device` is None when there is no link, or when no WireGuard answers for it (a userspace process that died).
    `underlay_mtu` is the smallest MTU of the routes to the peers' endpoints, or that of the default route when there
    are none; None without a route, or when the look left it out. `ipv6` tells whether the interface can have IPv6.
    """

    link: Link | None = None
    device: Device | None = None
    addresses: frozenset[Prefix] = frozenset()
    routes: frozenset[Route] = frozenset()
    underlay_mtu: int | None = None
    ipv6: bool = True
