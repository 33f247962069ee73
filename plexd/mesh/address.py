"""Prefixes and endpoints as small tuples over packed bytes.

The ipaddress module would do, but a dump of ten thousand peers builds twenty thousand of these, and these cost a
tenth. Text is read as strictly as ipaddress does: no short forms, no leading zeros.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import NamedTuple

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")


def parse_ip(text: str) -> bytes:
    """4 or 16 packed bytes; ValueError when `text` is not an address. Zones are refused."""
    if _IPV4.fullmatch(text) is not None:  # a fifth of the time that ipaddress takes
        return bytes(map(int, text.split(".")))
    if "%" in text:
        raise ValueError(f"{text!r} has a zone")
    return ipaddress.ip_address(text).packed


def is_unicast(packed: bytes) -> bool:
    """Whether the address can be one host's: not unspecified, multicast, broadcast or reserved."""
    if len(packed) == 4:
        return any(packed) and packed[0] < 224
    return any(packed) and packed[0] != 0xFF


def format_ip(packed: bytes) -> str:
    if len(packed) == 4:
        return f"{packed[0]}.{packed[1]}.{packed[2]}.{packed[3]}"
    return str(ipaddress.ip_address(packed))


class Prefix(NamedTuple):
    """An IP network: packed address with host bits cleared, and length."""

    packed: bytes
    length: int

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """CIDR, or a bare address as a host prefix; host bits are masked off. ValueError otherwise."""
        address, slash, length = text.partition("/")
        packed = parse_ip(address)
        if not slash:
            return cls(packed, len(packed) * 8)
        # ipaddress would also take a netmask here
        if not (
            length.isascii() and length.isdigit() and str(int(length)) == length and int(length) <= len(packed) * 8
        ):
            raise ValueError(f"{text!r} has no valid prefix length")
        return cls.of(packed, int(length))

    @classmethod
    def of(cls, packed: bytes, length: int) -> Prefix:
        bits = len(packed) * 8
        value = int.from_bytes(packed, "big") >> (bits - length) << (bits - length)
        return cls(value.to_bytes(len(packed), "big"), length)

    @classmethod
    def host(cls, packed: bytes) -> Prefix:
        return cls(packed, len(packed) * 8)

    @property
    def is_host(self) -> bool:
        return self.length == len(self.packed) * 8

    def contains(self, other: bytes) -> bool:
        """Whether the packed address lies inside; False across families."""
        if len(other) != len(self.packed):
            return False
        drop = len(self.packed) * 8 - self.length
        return int.from_bytes(other, "big") >> drop == int.from_bytes(self.packed, "big") >> drop

    def covers(self, other: Prefix) -> bool:
        """Whether every address of `other` lies inside."""
        return self.length <= other.length and self.contains(other.packed)

    def __str__(self) -> str:
        return f"{format_ip(self.packed)}/{self.length}"


class Endpoint(NamedTuple):
    """Where UDP packets to a peer go: packed address and port."""

    packed: bytes
    port: int

    def __str__(self) -> str:
        ip = format_ip(self.packed)
        return f"[{ip}]:{self.port}" if len(self.packed) == 16 else f"{ip}:{self.port}"


class HostPort(NamedTuple):
    """An endpoint by name, to be resolved."""

    host: str
    port: int


@lru_cache(maxsize=1 << 15)  # the target is built from the same texts at every pass
def parse_endpoint(text: str) -> Endpoint | HostPort:
    """`1.2.3.4:51820`, `[2001:db8::7]:51820` or `name:51820`; ValueError when it is none of them."""
    host, colon, port_text = text.rpartition(":")
    if not colon or not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5):
        raise ValueError("no port")
    port = int(port_text)
    if not 1 <= port <= 65535 or str(port) != port_text:
        raise ValueError("port out of range")
    if host.startswith("["):
        if not host.endswith("]"):
            raise ValueError("unbalanced bracket")
        packed = parse_ip(host[1:-1])
        if len(packed) != 16:
            raise ValueError("brackets around an IPv4 address")
        return Endpoint(packed, port)
    if ":" in host:
        raise ValueError("an IPv6 address needs brackets")
    if host.replace(".", "").isdigit():  # no name is all digits and dots, so it must be IPv4
        return Endpoint(parse_ip(host), port)
    if not 1 <= len(host) <= 253 or not all(_is_label(label) for label in host.removesuffix(".").split(".")):
        raise ValueError("not an address or a host name")
    return HostPort(host, port)


def _is_label(text: str) -> bool:
    return (
        1 <= len(text) <= 63
        and text.isascii()
        and text.replace("-", "").replace("_", "").isalnum()
        and not text.startswith("-")
        and not text.endswith("-")
    )
