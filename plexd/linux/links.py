"""Links and their addresses as the kernel dumps them. Pure, and only what a look needs."""

from __future__ import annotations

import socket
import struct
from collections.abc import Container, Iterable
from typing import NamedTuple

from plexd.linux.netlink import Message, attribute, attributes
from plexd.mesh.address import Prefix
from plexd.mesh.observed import Backend, Link

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_EXT_MASK = 3, 4, 18, 20, 29
IFLA_INFO_KIND = 1
RTEXT_FILTER_SKIP_STATS = 8
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFF_UP, IFF_RUNNING, IFF_LOWER_UP = 0x1, 0x40, 0x10000
SCOPE_LINK = 253
BACKENDS = {"wireguard": Backend.KERNEL, "tun": Backend.USERSPACE}

_IFINFOMSG = struct.Struct("=BxHiII")  # family, hardware type, index, flags, change mask
_IFADDRMSG = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
_ADDRESS_BYTES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}
_U32 = struct.Struct("=I")
_NO_STATS = attribute(IFLA_EXT_MASK, _U32.pack(RTEXT_FILTER_SKIP_STATS))


class LinkState(NamedTuple):
    """What decides about packets that leave by a link: its MTU, and the flags that say whether it carries any."""

    mtu: int
    flags: int


def get_link(name: str) -> Message:
    """Answered with ENODEV when there is none."""
    request = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0") + _NO_STATS
    return Message(RTM_GETLINK, 0, request)


def get_link_at(ifindex: int) -> Message:
    return Message(RTM_GETLINK, 0, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0) + _NO_STATS)


def dump_addresses() -> Message:
    return Message(RTM_GETADDR, 0, _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))


def read_link(payload: bytes) -> Link:
    """Raises ValueError (or struct.error) when it is no link."""
    _, _, ifindex, flags, _ = _IFINFOMSG.unpack_from(payload)
    name = alias = ""
    mtu = 0
    backend: Backend | None = None
    for kind, start, end in attributes(payload, _IFINFOMSG.size, len(payload)):
        if kind == IFLA_IFNAME:
            name = _text(payload[start:end])
        elif kind == IFLA_IFALIAS:
            alias = _text(payload[start:end])
        elif kind == IFLA_MTU:
            (mtu,) = _U32.unpack_from(payload, start)
        elif kind == IFLA_LINKINFO:
            for inner, begin, stop in attributes(payload, start, end):
                if inner == IFLA_INFO_KIND:
                    backend = BACKENDS.get(_text(payload[begin:stop]))
    return Link(name, ifindex, backend, alias, mtu, bool(flags & IFF_UP))


def read_state(payload: bytes) -> tuple[int, LinkState]:
    """By index. Raises ValueError (or struct.error) when it is no link."""
    _, _, ifindex, flags, _ = _IFINFOMSG.unpack_from(payload)
    mtu = 0
    for kind, start, _ in attributes(payload, _IFINFOMSG.size, len(payload)):
        if kind == IFLA_MTU:
            (mtu,) = _U32.unpack_from(payload, start)
    return ifindex, LinkState(mtu, flags & (IFF_UP | IFF_RUNNING | IFF_LOWER_UP))


def read_addresses(payloads: Iterable[bytes], ifindex: int) -> frozenset[Prefix]:
    """The global addresses of one link, with the length they carry. Raises ValueError (or struct.error)."""
    found: list[Prefix] = []
    for payload in payloads:
        family, length, _, scope, index = _IFADDRMSG.unpack_from(payload)
        if index != ifindex or scope >= SCOPE_LINK or family not in _ADDRESS_BYTES:
            continue
        packed = _own_address(payload, family)
        if length > len(packed) * 8:
            raise ValueError("address with a prefix length that it cannot have")
        found.append(Prefix(packed, length))
    return frozenset(found)


def read_local(payloads: Iterable[bytes]) -> frozenset[bytes]:
    """The addresses of every link, packed, whatever their scope. Raises ValueError (or struct.error)."""
    families = ((payload, _IFADDRMSG.unpack_from(payload)[0]) for payload in payloads)
    return frozenset(_own_address(payload, family) for payload, family in families if family in _ADDRESS_BYTES)


def read_reachable(payloads: Iterable[bytes], without: Container[int]) -> frozenset[bytes]:
    """The addresses that reach beyond their link, of every link whose index is not in `without`.

    Raises ValueError (or struct.error).
    """
    found: list[bytes] = []
    for payload in payloads:
        family, _, _, scope, ifindex = _IFADDRMSG.unpack_from(payload)
        if ifindex not in without and scope < SCOPE_LINK and family in _ADDRESS_BYTES:
            found.append(_own_address(payload, family))
    return frozenset(found)


def _own_address(payload: bytes, family: int) -> bytes:
    given = {kind: payload[start:end] for kind, start, end in attributes(payload, _IFADDRMSG.size, len(payload))}
    # on a point-to-point link IFA_ADDRESS is the other end
    packed = given.get(IFA_LOCAL) or given.get(IFA_ADDRESS, b"")
    if len(packed) != _ADDRESS_BYTES[family]:
        raise ValueError("address message without an address of its family")
    return packed


def read_owner(payload: bytes) -> tuple[int, int]:
    """Which link an address message is about, and the scope of the address. Raises struct.error."""
    _, _, _, scope, ifindex = _IFADDRMSG.unpack_from(payload)
    return int(ifindex), int(scope)


def _text(value: bytes) -> str:
    """Links of others have names and aliases of any bytes."""
    return value.partition(b"\0")[0].decode("utf-8", "replace")
