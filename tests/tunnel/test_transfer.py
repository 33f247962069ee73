"""Twenty megabytes over TCP through the mesh, with default settings, over underlays with a narrow place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.tunnel.harness import Network, members, transfer
from tests.tunnel.underlays import NARROW, Ends, mesh_over

pytestmark = pytest.mark.namespaces

BYTES = 20_000_000


@pytest.mark.parametrize("underlay", [4, 6], ids=lambda version: f"IPv{version}")
@pytest.mark.parametrize(("make", "mtus"), NARROW.values(), ids=NARROW)
def test_20_megabytes_pass_a_narrow_underlay(
    tunable: Network, interface: str, make: Callable[[Network], Ends], mtus: tuple[int, int], underlay: int
) -> None:
    one, other = mesh_over(make(tunable), interface, underlay=underlay, mesh=4)
    with members(one, other):
        assert (one.mtu, other.mtu) == mtus
        assert transfer(one, other, BYTES)
        assert transfer(other, one, BYTES)
