"""The pretend kernel keeps the habits of the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from plexd.errors import KernelError
from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    Outcome,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RemoveTable,
    ReplaceTable,
    SetMtu,
    SetUp,
)
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import ROUTE_METRIC, Observed, Route
from tests.fakes import FakeKernel

OWN = PrivateKey(bytes([8] * 32))
ALICE, BOB = PublicKey(bytes([1] * 32)), PublicKey(bytes([2] * 32))
NET = Prefix.parse("10.100.3.0/24")
OWN_ADDRESS = Prefix.parse("10.100.0.1")
ROUTE = Route(NET, parse_ip("10.100.0.1"), ROUTE_METRIC)


def put(key: PublicKey, *prefixes: str, is_new: bool = True, psk: PresharedKey | None = NO_PRESHARED_KEY) -> PutPeer:
    return PutPeer(key.short, key, is_new, psk, None, 25, tuple(map(Prefix.parse, prefixes)), ())


def apply(kernel: FakeKernel, *changes: Change) -> list[Outcome]:
    async def main() -> list[Outcome]:
        table = [change for change in changes if isinstance(change, ReplaceTable | RemoveTable)]
        rest = [change for change in changes if not isinstance(change, ReplaceTable | RemoveTable)]
        return await kernel.table.apply(table) + await kernel.apply(rest)

    return asyncio.run(main())


def ready_kernel(*more: Change) -> FakeKernel:
    kernel = FakeKernel()
    outcomes = apply(kernel, CreateLink(OWN, 51820, 1420), AddAddress(OWN_ADDRESS), SetUp(), *more)
    assert all(outcome.error is None for outcome in outcomes)
    return kernel


def test_prints_itself_like_ip_and_wg() -> None:
    kernel = ready_kernel(put(ALICE, "10.100.3.0/24", "10.100.0.2", psk=PresharedKey(bytes([9] * 32))), AddRoute(ROUTE))
    kernel.roam(ALICE, Endpoint(parse_ip("192.0.2.1"), 4711), handshake=1.0)

    assert (
        str(kernel)
        == """\
plexd0: UP kernel mtu 1420
  alias plexd:mesh
  inet 10.100.0.1/32
  listening port: 51820
peer: AQEBAQEB
  preshared key: (hidden)
  endpoint: 192.0.2.1:4711
  allowed ips: 10.100.0.2/32, 10.100.3.0/24
  persistent keepalive: every 25 seconds
10.100.3.0/24 dev plexd0 proto 112 scope link src 10.100.0.1 metric 2048"""
    )


def test_allowed_ip_given_to_a_second_peer_leaves_the_first() -> None:
    kernel = ready_kernel(put(ALICE, "10.100.3.0/24", "10.100.0.2"), put(BOB, "10.100.3.0/24"))
    assert kernel.peers[ALICE].allowed_ips == (Prefix.parse("10.100.0.2"),)
    assert kernel.peers[BOB].allowed_ips == (NET,)


def test_deleted_link_takes_everything_along() -> None:
    kernel = ready_kernel(put(ALICE, "10.100.3.0/24"), AddRoute(ROUTE), DeleteLink("test"))
    assert kernel.state == Observed(underlay_mtu=1500)


@pytest.mark.parametrize("change", [DeleteLink("again"), RemovePeer(None, BOB), RemoveRoute(ROUTE)])
def test_removing_what_is_gone_succeeds(change: Change) -> None:
    assert apply(ready_kernel(), change) == [Outcome(change)]


@pytest.mark.parametrize("change", [AddAddress(OWN_ADDRESS), AddRoute(ROUTE), put(ALICE, "10.100.3.0/24"), SetUp()])
def test_adding_the_identical_succeeds(change: Change) -> None:
    kernel = ready_kernel(change)
    before = str(kernel)
    assert apply(kernel, change) == [Outcome(change)]
    assert str(kernel) == before


def test_creating_what_exists_fails() -> None:
    assert apply(ready_kernel(), CreateLink(OWN, 51820, 1420))[0].error == "file exists"


@pytest.mark.parametrize("change", [AddAddress(OWN_ADDRESS), SetMtu(1400), put(ALICE), RemovePeer(None, ALICE)])
def test_without_a_link_nothing_can_be_configured(change: Change) -> None:
    assert apply(FakeKernel(), change)[0].error == "no such device"


def test_update_of_an_unknown_peer_is_silently_ignored() -> None:
    kernel = ready_kernel(put(ALICE, "10.100.3.0/24", is_new=False))
    assert kernel.peers == {}


def test_peer_with_our_own_key_is_silently_ignored() -> None:
    kernel = ready_kernel(put(OWN.public(), "10.100.3.0/24"))
    assert kernel.peers == {}


def test_update_touches_only_what_it_names() -> None:
    secret = PresharedKey(bytes([9] * 32))
    kernel = ready_kernel(put(ALICE, "10.100.3.0/24", psk=secret))
    endpoint = Endpoint(parse_ip("192.0.2.1"), 4711)
    apply(kernel, PutPeer("a", ALICE, False, None, endpoint, None, None, ("endpoint",)))
    peer = kernel.peers[ALICE]
    assert (peer.psk, peer.allowed_ips, peer.keepalive, peer.endpoint) == (secret, (NET,), 25, endpoint)


@pytest.mark.parametrize(
    ("damage", "error"),
    [(lambda kernel: kernel.set_link(up=False), "down"), (lambda kernel: kernel.addresses.clear(), "source address")],
)
def test_route_wants_a_link_that_is_up_and_its_source_address(damage: Callable[[FakeKernel], None], error: str) -> None:
    kernel = ready_kernel()
    damage(kernel)
    assert error in str(apply(kernel, AddRoute(ROUTE))[0].error)


def test_taking_the_link_down_drops_its_routes() -> None:
    kernel = ready_kernel(AddRoute(ROUTE))
    kernel.set_link(up=False)
    assert kernel.routes == {}


def test_removed_address_takes_the_routes_that_prefer_it() -> None:
    kernel = ready_kernel(AddRoute(ROUTE), RemoveAddress(OWN_ADDRESS))
    assert kernel.routes == {}


def test_route_with_equal_prefix_and_metric_is_replaced() -> None:
    kernel = ready_kernel(AddRoute(ROUTE), AddRoute(ROUTE._replace(source=None)))
    assert list(kernel.routes.values()) == [ROUTE._replace(source=None)]


def test_refused_change_is_not_made_and_the_next_one_is_tried() -> None:
    kernel = ready_kernel()
    kernel.refuse = lambda change: "no room" if isinstance(change, PutPeer) and change.public_key == ALICE else None
    outcomes = apply(kernel, put(ALICE, "10.100.0.2"), put(BOB, "10.100.0.3"))
    assert [outcome.error for outcome in outcomes] == ["no room", None]
    assert list(kernel.peers) == [BOB]


def test_whole_calls_can_fail() -> None:
    kernel = ready_kernel()
    kernel.failure = KernelError("netlink is gone")
    with pytest.raises(KernelError):
        asyncio.run(kernel.observe())
    with pytest.raises(KernelError):
        apply(kernel, SetUp())


def test_death_of_a_userspace_program_takes_the_link_and_is_announced() -> None:
    kernel = ready_kernel(put(ALICE, "10.100.3.0/24"), AddRoute(ROUTE))
    kernel.remove_peer(ALICE)
    kernel.remove_route(ROUTE)
    kernel.set_link(mtu=9000)
    assert not kernel.damaged.is_set()
    kernel.kill_program()
    assert kernel.damaged.is_set()
    assert kernel.state.link is None


@pytest.mark.parametrize("kind", [CreateLink, SetUp])
def test_half_built_interface_is_undone_and_the_rest_fails_with_the_same_error(kind: type) -> None:
    kernel = FakeKernel()
    kernel.refuse = lambda change: "port in use" if isinstance(change, kind) else None
    outcomes = apply(kernel, CreateLink(OWN, 51820, 1420), AddAddress(OWN_ADDRESS), SetUp(), put(ALICE))
    assert kernel.state.link is None
    failed = [type(outcome.change) for outcome in outcomes if outcome.error == "port in use"]
    assert failed == ([CreateLink, AddAddress, SetUp, PutPeer] if kind is CreateLink else [CreateLink, SetUp, PutPeer])
    assert all(isinstance(outcome.cause, KernelError) is (outcome.error is not None) for outcome in outcomes)


def test_counts_looks_and_writes() -> None:
    kernel = ready_kernel()
    writes, looks = kernel.netlink_writes, kernel.looks
    asyncio.run(kernel.observe())
    apply(kernel, SetUp(), SetMtu(1400))
    assert (kernel.netlink_writes - writes, kernel.looks - looks) == (2, 1)


def test_tear_down_removes_only_what_is_ours() -> None:
    kernel = ready_kernel(put(ALICE))
    kernel.set_link(alias="")
    assert asyncio.run(kernel.tear_down(BOB)) == []
    assert asyncio.run(kernel.tear_down(None)) == []
    assert kernel.state.link is not None
    assert asyncio.run(kernel.tear_down(OWN.public())) == ["plexd0"]
    assert asyncio.run(kernel.tear_down(OWN.public())) == []
    assert str(kernel) == "plexd0 does not exist"
