"""The tunnel of two nodes with WireGuard of the kernel: narrow underlays, and both families above and below."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.tunnel.harness import Member, Network, members, transfer
from tests.tunnel.underlays import NARROW, Ends, mesh_over, narrow_link

# emulated, 20 MB take half a minute: the other narrow places have a tenth of it
FULL, TENTH = 20_000_000, 2_000_000
PATIENCE_SECONDS = 60
pytestmark = pytest.mark.timeout(400)


def test_20_megabytes_pass_a_narrow_link(network: Network) -> None:
    one, other = mesh_over(narrow_link(network), "plexdt", underlay=4, mesh=4)
    with members(one, other):
        assert transfer(one, other, FULL)


@pytest.mark.parametrize("underlay", [4, 6], ids=lambda version: f"IPv{version}")
@pytest.mark.parametrize(("make", "mtus"), NARROW.values(), ids=NARROW)
def test_a_narrow_place_anywhere_lets_all_bytes_through(
    network: Network, make: Callable[[Network], Ends], mtus: tuple[int, int], underlay: int
) -> None:
    one, other = mesh_over(make(network), "plexdt", underlay=underlay, mesh=4)
    with members(one, other):
        assert (one.mtu, other.mtu) == mtus
        assert transfer(one, other, TENTH)


@pytest.mark.parametrize("underlay", [4, 6], ids=lambda version: f"over IPv{version}")
@pytest.mark.parametrize("mesh", [4, 6], ids=lambda version: f"IPv{version}")
def test_mesh_of_either_family_works_over_either(network: Network, mesh: int, underlay: int) -> None:
    one, other = mesh_over(narrow_link(network), "plexdt", underlay=underlay, mesh=mesh)
    with members(one, other):
        for near, far in ((one, other), (other, one)):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not near.reaches(far):
                assert time.monotonic() < deadline
            assert source_towards(near, far) == near.mesh_ip


def source_towards(near: Member, far: Member) -> str:
    words = near.namespace.run("ip", "route", "get", far.mesh_ip).split()
    return words[words.index("src") + 1]
