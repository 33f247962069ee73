"""Addresses are read strictly and written the way everybody else writes them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh.address import Endpoint, HostPort, Prefix, format_ip, parse_endpoint, parse_ip


@given(st.ip_addresses())
def test_addresses_survive_the_way_through_text(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert parse_ip(str(address)) == address.packed
    assert format_ip(address.packed) == str(address)


@pytest.mark.parametrize("text", ["", "1.2.3", "01.2.3.4", "1.2.3.4.5", "1.2.3.4 ", "::1%eth0", "1", "0x7f.0.0.1", "é"])
def test_loose_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the standard library's sentence
        parse_ip(text)


@given(st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){2,4}", fullmatch=True) | st.text("0123456789.:a ", max_size=18))
def test_text_is_read_as_strictly_as_by_the_standard_library(text: str) -> None:
    try:
        expected: bytes | None = ipaddress.ip_address(text).packed
    except ValueError:
        expected = None
    try:
        found: bytes | None = parse_ip(text)
    except ValueError:
        found = None
    assert found == expected


@given(st.ip_addresses(), st.integers(0, 128))
def test_prefixes_agree_with_the_standard_library(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, length: int
) -> None:
    length = min(length, address.max_prefixlen)
    network = ipaddress.ip_network((address, length), strict=False)
    prefix = Prefix.parse(f"{address}/{length}")
    assert str(prefix) == str(network)
    assert prefix.is_host is (network.num_addresses == 1)
    assert prefix.contains(address.packed)
    below = int(network.network_address) - 1
    if below >= 0:
        assert not prefix.contains(below.to_bytes(len(address.packed), "big"))


def test_bare_address_is_a_host_prefix() -> None:
    assert str(Prefix.parse("10.0.0.1")) == "10.0.0.1/32"
    assert str(Prefix.parse("fd00::1")) == "fd00::1/128"


def test_prefix_contains_nothing_of_the_other_family() -> None:
    assert not Prefix.parse("::/0").contains(parse_ip("10.0.0.1"))
    assert not Prefix.parse("0.0.0.0/0").contains(parse_ip("::1"))


@pytest.mark.parametrize(
    "text",
    [
        *("10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/08", "10.0.0.0/255.0.0.0", "10.0.0.0/8/8", "::/129"),
        *("/8", "10.0.0.0/²", "10.0.0.0/ 8", f"10.0.0.0/{'1' * 5000}"),
    ],
)
def test_loose_prefixes_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Prefix.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2.3.4:51820", Endpoint(bytes([1, 2, 3, 4]), 51820)),
        ("[2001:db8::7]:1", Endpoint(parse_ip("2001:db8::7"), 1)),
        ("vpn.example.org:65535", HostPort("vpn.example.org", 65535)),
        ("localhost:1", HostPort("localhost", 1)),
        ("my_host-1.example.:1", HostPort("my_host-1.example.", 1)),
    ],
)
def test_endpoints_are_read(text: str, expected: Endpoint | HostPort) -> None:
    assert parse_endpoint(text) == expected
    if isinstance(expected, Endpoint):
        assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "1.2.3.4", ":51820", "1.2.3.4:", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:051820", "1.2.3.4:+1"),
        *("1.2.3:1", "01.2.3.4:1", "1.2.3.4:１", "2001:db8::7:1", "[2001:db8::7]", "[2001:db8::7:1", "[1.2.3.4]:1"),
        *("[fe80::1%eth0]:1", "a..b:1", "-a:1", "a-:1", "a b:1", "a/b:1", "é.example:1"),
        *(f"{'a' * 64}:1", f"{'a.' * 127}:1"),
    ],
)
def test_loose_endpoints_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_endpoint(text)
