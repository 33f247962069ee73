"""What a look at the kernel shows. Tuples, because a dump of ten thousand peers builds ten thousand of them."""

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
    """Whether a peer is FRESH; both in Unix seconds, a handshake at 0 never was.

    One that lies ahead was made before the clock was set back: it says no more than one that is as far behind.
    """
    return last_handshake > 0 and abs(now - last_handshake) <= HANDSHAKE_FRESH_SECONDS


@dataclass(frozen=True, slots=True)
class Device:
    private_key: PrivateKey | None
    listen_port: int
    fwmark: int
    peers: Mapping[bytes, DevicePeer]


class Link(NamedTuple):
    """`backend` is None when the link is neither WireGuard of the kernel nor a TUN."""

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

    `device` is None when there is no link, or nobody answers for it (a userspace process that died).
    `underlay_mtu` is the smallest MTU of the routes to the peers' endpoints, or that of the default route when there is
    none; None without either, or when nobody asked. `ipv6`: whether the interface has, or would have, IPv6 at all.
    """

    link: Link | None = None
    device: Device | None = None
    addresses: frozenset[Prefix] = frozenset()
    routes: frozenset[Route] = frozenset()
    underlay_mtu: int | None = None
    ipv6: bool = True
