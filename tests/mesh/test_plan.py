"""Plans lead from any kernel to any target, in the right order, and say nothing when nothing differs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.errors import ForeignLink, NotAddressable
from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    SetAlias,
    SetDevice,
    SetMtu,
    SetUp,
)
from plexd.mesh.desired import Desired
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import MESH_ALIAS, ROUTE_METRIC, Backend, DevicePeer, Observed, Route
from plexd.mesh.plan import is_ours, plan, plan_event, plan_network
from plexd.mesh.target import Settings, Target, build_target, derive_mtu
from tests.fakes import FakeKernel
from tests.mesh.worlds import (
    ENDPOINTS,
    KEYS,
    NOW,
    OTHER_KEY,
    OWN_IP,
    OWN_IPV6,
    OWN_KEY,
    RESOLVED,
    all_settings,
    assert_is,
    bring_up,
    converge,
    desireds,
    kernels,
    peer,
    settings_for,
    target_of,
    targets,
)

HERE = Endpoint(parse_ip("192.0.2.1"), 51820)
THERE = Endpoint(parse_ip("192.0.2.2"), 51820)
ROAMED = Endpoint(parse_ip("203.0.113.5"), 4711)
SECRET = PresharedKey(bytes([0xA1] * 32))

# any world


@given(targets(), kernels(), st.booleans())
def test_any_kernel_becomes_the_target_in_one_pass(target: Target, kernel: FakeKernel, moved: bool) -> None:
    converge(target, kernel, frozenset(target.peers) if moved else frozenset())
    assert_is(kernel, target)
    assert plan(target, kernel.state, NOW) == ()


@given(targets(), kernels())
def test_peers_are_removed_then_updated_then_added_and_routes_come_last(target: Target, kernel: FakeKernel) -> None:
    stages = [_stage(change) for change in plan(target, kernel.state, NOW)]
    assert stages == sorted(stages)


@given(desireds(), desireds(), all_settings, st.sampled_from((None, OTHER_KEY)))
def test_event_plan_has_the_effect_of_a_full_plan(
    before: Desired, after: Desired, settings: Settings, rotated: PrivateKey | None
) -> None:
    old = build_target(before, settings, RESOLVED)
    new_settings = settings_for(
        private_key=rotated or settings.private_key,
        mesh_ip=settings.mesh_ip,
        listen_port=settings.listen_port,
        mtu=settings.mtu,
        keepalive=settings.keepalive,
        control_plane=settings.control_plane,
    )
    new = build_target(after, new_settings, RESOLVED)
    kernel = bring_up(old)
    changes = plan_event(old, new)
    for _ in range(2):  # an event may be repeated
        outcomes = asyncio.run(kernel.apply(changes))
        assert [outcome.error for outcome in outcomes if outcome.error] == []
        assert_is(kernel, new)
        assert plan(new, kernel.state, NOW) == ()
    stages = [_stage(change) for change in changes if not isinstance(change, SetDevice)]
    assert stages == sorted(stages)


@given(targets())
def test_event_that_changes_nothing_plans_nothing(target: Target) -> None:
    assert plan_event(target, target) == ()


def _stage(change: Change) -> int:
    match change:
        case RemovePeer():
            return 1
        case PutPeer(is_new=is_new):
            return 3 if is_new else 2
        case AddRoute() | RemoveRoute():
            return 4
        case RenewSessions():
            return 5
    return 0


# the interface


def test_interface_is_built_in_order() -> None:
    target = target_of(peer(2, "172.16.0.0/24", endpoint="192.0.2.1:51820"))
    kinds = [type(change) for change in plan(target, Observed(), NOW)]
    assert kinds == [CreateLink, AddAddress, SetUp, PutPeer, AddRoute, AddRoute]


def test_built_interface_reads_as_wanted() -> None:
    kernel = bring_up(target_of(peer(2, "172.16.0.0/24", endpoint="192.0.2.1:51820", psk=SECRET)))
    assert (
        str(kernel)
        == """\
plexd0: UP kernel mtu 1420
  alias plexd:mesh
  inet 10.100.0.1/32
  listening port: 51820
peer: AgICAgIC
  preshared key: (hidden)
  endpoint: 192.0.2.1:51820
  allowed ips: 10.100.0.2/32, 172.16.0.0/24
  persistent keepalive: every 25 seconds
10.100.0.2/32 dev plexd0 proto 112 scope link src 10.100.0.1 metric 2048
172.16.0.0/24 dev plexd0 proto 112 scope link src 10.100.0.1 metric 2048"""
    )


@pytest.mark.parametrize(
    ("damage", "repair"),
    [
        (lambda kernel: kernel.set_link(alias=""), [SetAlias()]),
        (lambda kernel: kernel.set_device(listen_port=1), [SetDevice(OWN_KEY, 51820, ("port",))]),
        (lambda kernel: kernel.set_device(private_key=OTHER_KEY), [SetDevice(OWN_KEY, 51820, ("key",))]),
        (lambda kernel: kernel.set_device(fwmark=9), [SetDevice(OWN_KEY, 51820, ("fwmark",))]),
        (
            lambda kernel: kernel.set_device(private_key=OTHER_KEY, listen_port=1, fwmark=9),
            [SetDevice(OWN_KEY, 51820, ("key", "port", "fwmark"))],
        ),
        (lambda kernel: kernel.set_link(mtu=9000), [SetMtu(1420)]),
        (lambda kernel: kernel.set_link(up=False), [SetUp()]),
        (
            lambda kernel: kernel.add_address(Prefix.parse("10.9.9.9")),
            [RemoveAddress(Prefix.parse("10.9.9.9"))],
        ),
        (
            lambda kernel: kernel.add_address(Prefix(OWN_IP, 24)),
            [RemoveAddress(Prefix(OWN_IP, 24))],
        ),
        (lambda kernel: kernel.remove_address(Prefix.host(OWN_IP)), [AddAddress(Prefix.host(OWN_IP))]),
    ],
    ids=["alias", "port", "key", "fwmark", "all of the device", "mtu", "down", "foreign", "wide", "no address"],
)
def test_only_the_differing_property_is_repaired(damage: Callable[[FakeKernel], None], repair: list[Change]) -> None:
    target = target_of()
    kernel = bring_up(target)
    damage(kernel)
    assert list(plan(target, kernel.state, NOW)) == repair


def test_changed_mesh_address_is_in_place_before_the_old_one_goes_and_routes_follow() -> None:
    kernel = bring_up(target_of(peer(2)))
    moved = target_of(peer(2), settings=settings_for(mesh_ip=parse_ip("10.100.0.99")))
    assert [type(change) for change in plan(moved, kernel.state, NOW)] == [AddAddress, RemoveAddress, AddRoute]
    converge(moved, kernel)
    assert_is(kernel, moved)


def test_ipv6_mesh_gets_a_host_address_and_routes_with_its_source() -> None:
    kernel = bring_up(target_of(peer(2, "fd00:200::/64"), settings=settings_for(mesh_ip=OWN_IPV6)))
    assert "inet6 fd00:100::1/128" in str(kernel)
    assert "fd00:200::/64 dev plexd0 proto 112 scope link src fd00:100::1 metric 2048" in str(kernel)
    assert "10.100.0.2/32 dev plexd0 proto 112 scope link metric 2048" in str(kernel)


def test_ipv6_returns_after_the_mtu_was_set_too_low() -> None:
    target = target_of(peer(2, "fd00:200::/64"), settings=settings_for(mesh_ip=OWN_IPV6))
    kernel = bring_up(target)
    kernel.set_link(mtu=1200)
    converge(target, kernel)
    assert_is(kernel, target)


@pytest.mark.parametrize(
    ("configured", "underlay", "mtu"),
    [
        (0, 1500, 1420),
        (0, None, 1420),
        (0, 1492, 1412),
        (0, 1360, 1280),
        (0, 1359, 1280),
        (0, 576, 1280),
        (0, 9000, 8920),
        (0, 65536, 8920),
        (1300, 1500, 1300),
        (1300, None, 1300),
    ],
)
def test_mtu_is_the_configured_one_or_what_the_underlay_leaves(configured: int, underlay: int | None, mtu: int) -> None:
    assert derive_mtu(configured, underlay) == mtu


def test_mtu_follows_the_underlay() -> None:
    target = target_of()
    kernel = bring_up(target)
    kernel.underlay_mtu = 1492
    assert plan(target, kernel.state, NOW) == (SetMtu(1412),)


def test_mesh_address_that_no_interface_here_can_have_is_said() -> None:
    target = target_of(peer(2), settings=settings_for(mesh_ip=OWN_IPV6))
    with pytest.raises(NotAddressable, match=r"^the mesh address fd00:100::1 needs IPv6, which this host has not"):
        plan(target, Observed(ipv6=False), NOW)
    assert plan_network(target, replace(bring_up(target).state, ipv6=False)) is None


@pytest.mark.parametrize("is_there", [True, False])
def test_without_ipv6_its_prefixes_stay_with_the_peers_and_are_not_routed(is_there: bool) -> None:
    before = target_of(peer(3, "172.16.0.0/24"))
    target = target_of(peer(2, "fd00:200::/64", "fd00:100::2"), peer(3, "172.16.0.0/24"))
    kernel = FakeKernel()
    kernel.switch_ipv6(on=False)
    if is_there:
        bring_up(before, kernel)
    converge(target, kernel)
    assert {str(route.prefix) for route in kernel.state.routes} == {"10.100.0.2/32", "10.100.0.3/32", "172.16.0.0/24"}
    assert Prefix.parse("fd00:200::/64") in kernel.peers[peer(2).public_key].allowed_ips
    for look in (plan(target, kernel.state, NOW), plan_network(target, kernel.state)):
        assert look == ()
    routes = [change.route for change in plan_event(before, target, ipv6=False) if isinstance(change, AddRoute)]
    assert [str(route.prefix) for route in routes] == ["10.100.0.2/32"]
    assert sum(isinstance(change, RemoveRoute) for change in plan_event(target, before, ipv6=False)) == 1


# whose link it is


@pytest.mark.parametrize(
    ("backend", "alias", "key", "ours"),
    [
        (Backend.KERNEL, MESH_ALIAS, None, True),
        (Backend.KERNEL, MESH_ALIAS, OTHER_KEY, True),
        (Backend.KERNEL, "", OWN_KEY, True),
        (Backend.KERNEL, "", OTHER_KEY, False),
        (Backend.KERNEL, "", None, True),  # down and without peers: a start died before it could set the alias
        (Backend.KERNEL, "lan", OTHER_KEY, False),
        (Backend.USERSPACE, MESH_ALIAS, None, True),
        (Backend.USERSPACE, "", OWN_KEY, True),
        (Backend.USERSPACE, "", None, True),
        (Backend.USERSPACE, "", OTHER_KEY, False),
        (None, "", None, False),
        (None, MESH_ALIAS, None, False),
    ],
)
def test_link_is_ours_by_alias_or_key(backend: Backend | None, alias: str, key: PrivateKey | None, ours: bool) -> None:
    kernel = FakeKernel()
    kernel.make_link(backend, alias, key)
    state = kernel.state
    assert state.link is not None
    assert is_ours(state.link, state.device, settings_for()) is ours
    if ours:
        converge(target_of(peer(2)), kernel)
        assert_is(kernel, target_of(peer(2)))
    else:
        before = str(kernel)
        with pytest.raises(ForeignLink, match="ip link delete plexd0"):
            plan(target_of(peer(2)), state, NOW)
        assert str(kernel) == before


def test_tun_without_alias_is_foreign_while_nobody_answers_for_it() -> None:
    kernel = FakeKernel()
    kernel.make_link(Backend.USERSPACE)
    kernel.stop_answering()
    with pytest.raises(ForeignLink):
        plan(target_of(), kernel.state, NOW)


def test_interface_of_an_earlier_start_is_adopted_with_its_sessions() -> None:
    target = target_of(peer(2, endpoint="192.0.2.1:51820"), peer(3))
    kernel = bring_up(target)
    kernel.shake_hands(KEYS[1], NOW - 30)
    ifindex = kernel.state.link
    assert plan(target, kernel.state, NOW) == ()
    later = target_of(peer(2, "172.16.0.0/24", endpoint="192.0.2.1:51820"), peer(3))
    converge(later, kernel)
    assert kernel.state.link == ifindex
    assert kernel.peers[KEYS[1]].last_handshake == NOW - 30


@pytest.mark.parametrize(
    ("configured", "present", "replaced"),
    [
        (None, Backend.KERNEL, False),
        (None, Backend.USERSPACE, False),
        (Backend.KERNEL, Backend.KERNEL, False),
        (Backend.KERNEL, Backend.USERSPACE, True),
        (Backend.USERSPACE, Backend.KERNEL, True),
    ],
)
def test_back_end_is_replaced_only_when_another_one_is_asked_for(
    configured: Backend | None, present: Backend, replaced: bool
) -> None:
    kernel = bring_up(target_of(peer(2)), FakeKernel(backend=present))
    changes = plan(target_of(peer(2), settings=settings_for(backend=configured)), kernel.state, NOW)
    assert [type(change) for change in changes[:2]] == ([DeleteLink, CreateLink] if replaced else [])


def test_interface_without_a_program_behind_it_is_built_anew() -> None:
    target = target_of(peer(2))
    kernel = bring_up(target)
    kernel.stop_answering()
    converge(target, kernel)
    assert_is(kernel, target)


# peers


def test_unwanted_peer_is_removed_and_a_missing_one_added() -> None:
    target = target_of(peer(2), peer(3))
    kernel = bring_up(target)
    kernel.remove_peer(KEYS[1])
    kernel.put_peer(DevicePeer(KEYS[5], NO_PRESHARED_KEY, None, 0, 0.0, 0, 0, ()))
    removed, added = plan(target, kernel.state, NOW)
    assert removed == RemovePeer(None, KEYS[5])
    assert isinstance(added, PutPeer)
    assert (added.peer_id, added.is_new, added.fields) == ("n_2", True, ("added",))


def test_new_key_of_a_peer_displaces_the_old_one() -> None:
    kernel = bring_up(target_of(peer(2)))
    rotated = target_of(peer(2, key=KEYS[5]))
    for changes in (plan(rotated, kernel.state, NOW), plan_event(target_of(peer(2)), rotated)):
        assert [
            (type(change), change.public_key) for change in changes if isinstance(change, RemovePeer | PutPeer)
        ] == [
            (RemovePeer, KEYS[1]),
            (PutPeer, KEYS[5]),
        ]


def test_own_new_key_comes_after_new_preshared_keys_and_sessions_are_renewed_at_once() -> None:
    """A handshake may begin with the next packet: what it needs is there by then. A new peer begins one by itself."""
    before = target_of(peer(2), peer(3), peer(4))
    after = target_of(
        peer(2, psk=SECRET), peer(3, psk=SECRET), peer(5), settings=settings_for(private_key=OTHER_KEY, keepalive=25)
    )
    changes = plan_event(before, after)
    assert [_told(change) for change in changes if not isinstance(change, AddRoute | RemoveRoute)] == [
        "remove n_4", "put n_2: psk", "put n_3: psk", "key", "put n_5: added", "renew n_2 n_3"
    ]  # fmt: skip
    assert isinstance(changes[-1], RenewSessions)


def test_own_key_found_wrong_in_the_device_renews_the_sessions() -> None:
    """An agent that died between taking its new key and telling the device."""
    target = target_of(peer(2), peer(3), settings=settings_for(private_key=OTHER_KEY, keepalive=25))
    kernel = bring_up(target_of(peer(2), peer(4)))
    changes = plan(target, kernel.state, NOW)
    assert changes[-1] == RenewSessions((KEYS[1],), 25)


def test_mesh_without_keepalive_renews_no_session_unasked() -> None:
    after = target_of(peer(2), settings=settings_for(private_key=OTHER_KEY, keepalive=0))
    before = target_of(peer(2), settings=settings_for(keepalive=0))
    assert plan_event(before, after) == (SetDevice(OTHER_KEY, 51820, ("key",)),)


def _told(change: Change) -> str:
    match change:
        case RemovePeer(peer_id):
            return f"remove {peer_id}"
        case PutPeer(peer_id, fields=fields):
            return f"put {peer_id}: {', '.join(fields)}"
        case SetDevice(fields=fields):
            return ", ".join(fields)
        case RenewSessions(public_keys):
            return " ".join(("renew", *(f"n_{KEYS.index(key) + 1}" for key in public_keys)))
    return type(change).__name__


def test_peers_that_swap_keys_both_keep_their_place() -> None:
    before, after = target_of(peer(2), peer(3)), target_of(peer(2, key=KEYS[2]), peer(3, key=KEYS[1]))
    kernel = bring_up(before)
    asyncio.run(kernel.apply(plan_event(before, after)))
    assert_is(kernel, after)


def test_withdrawn_preshared_key_is_cleared() -> None:
    kernel = bring_up(target_of(peer(2, psk=SECRET)))
    (change,) = plan(target_of(peer(2)), kernel.state, NOW)
    assert isinstance(change, PutPeer)
    assert (change.psk, change.fields) == (NO_PRESHARED_KEY, ("psk",))


def test_preshared_key_and_prefixes_stay_when_only_the_endpoint_moves() -> None:
    before = target_of(peer(2, endpoint="192.0.2.1:51820", psk=SECRET))
    after = target_of(peer(2, endpoint="192.0.2.2:51820", psk=SECRET))
    kernel = bring_up(before)
    expected = PutPeer("n_2", KEYS[1], False, None, THERE, None, None, ("endpoint",))
    assert plan_event(before, after) == (expected,)
    assert plan(after, kernel.state, NOW) == (expected,)


def test_prefixes_in_another_order_are_no_difference() -> None:
    target = target_of(peer(2, "172.16.0.0/24", "192.0.2.0/24"))
    assert plan(target, bring_up(target).state, NOW) == ()


def test_prefix_that_moves_between_peers_ends_where_it_should() -> None:
    before = target_of(peer(2, "172.16.0.0/24"), peer(3, "192.0.2.0/24"))
    after = target_of(peer(2, "192.0.2.0/24"), peer(3, "172.16.0.0/24"))
    kernel = bring_up(before)
    asyncio.run(kernel.apply(plan_event(before, after)))
    assert_is(kernel, after)


@pytest.mark.parametrize(
    ("age", "held", "moved", "written"),
    [
        (10, ROAMED, False, False),
        (180, ROAMED, False, False),
        (181, ROAMED, False, True),
        (None, ROAMED, False, True),
        (10, ROAMED, True, True),
        (10, None, False, True),
        (10, HERE, True, False),
        (None, HERE, False, False),
        (-5, ROAMED, False, False),
        (-3600, ROAMED, False, True),
    ],
    ids=[
        "roamed and fresh", "just fresh", "not fresh any more", "never heard", "candidate is news", "has none",
        "is there already", "is there and silent", "clock set back", "clock set back by an hour",
    ],
)  # fmt: skip
def test_endpoint_of_a_fresh_peer_is_its_own_business(
    age: float | None, held: Endpoint | None, moved: bool, written: bool
) -> None:
    target = target_of(peer(2, endpoint="192.0.2.1:51820"))
    kernel = bring_up(target)
    kernel.peers[KEYS[1]] = kernel.peers[KEYS[1]]._replace(
        endpoint=held, last_handshake=0.0 if age is None else NOW - age
    )
    changes = plan(target, kernel.state, NOW, frozenset({"n_2"}) if moved else frozenset())
    assert [change.endpoint for change in changes if isinstance(change, PutPeer)] == ([HERE] if written else [])


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_withdrawn_candidate_leaves_the_endpoint_in_the_kernel(endpoint: str) -> None:
    before, after = target_of(peer(2, endpoint=endpoint)), target_of(peer(2))
    kernel = bring_up(before)
    assert plan(after, kernel.state, NOW, frozenset({"n_2"})) == ()
    assert plan_event(before, after) == ()


def test_changed_keepalive_reaches_every_peer() -> None:
    kernel = bring_up(target_of(peer(2), peer(3)))
    changes = plan(target_of(peer(2), peer(3), settings=settings_for(keepalive=0)), kernel.state, NOW)
    assert [(change.keepalive, change.fields) for change in changes if isinstance(change, PutPeer)] == [
        (0, ("keepalive",)),
        (0, ("keepalive",)),
    ]


def test_one_event_among_a_thousand_peers_costs_one_peer() -> None:
    peers = [
        peer(2)._replace(
            id=f"n_{n}",
            public_key=PublicKey(n.to_bytes(32, "big")),
            allowed_ips=(Prefix.host(bytes([10, 101, n >> 8, n & 255])),),
        )
        for n in range(1, 1001)
    ]
    before, after = target_of(*peers[:-1]), target_of(*peers)
    assert [type(change) for change in plan_event(before, after)] == [PutPeer, AddRoute]
    assert [type(change) for change in plan_event(after, before)] == [RemovePeer, RemoveRoute]


# routes


def test_missing_route_is_added_and_surplus_removed() -> None:
    target = target_of(peer(2, "172.16.0.0/24"))
    kernel = bring_up(target)
    kernel.remove_route(Route(Prefix.parse("172.16.0.0/24"), OWN_IP, ROUTE_METRIC))
    kernel.add_route(Route(Prefix.parse("172.31.0.0/24"), OWN_IP, ROUTE_METRIC))
    assert plan(target, kernel.state, NOW) == (
        RemoveRoute(Route(Prefix.parse("172.31.0.0/24"), OWN_IP, ROUTE_METRIC)),
        AddRoute(Route(Prefix.parse("172.16.0.0/24"), OWN_IP, ROUTE_METRIC)),
    )


def test_route_with_another_source_is_replaced_without_a_gap() -> None:
    target = target_of(peer(2))
    kernel = bring_up(target)
    kernel.add_route(Route(Prefix.parse("10.100.0.2"), None, ROUTE_METRIC))
    assert plan(target, kernel.state, NOW) == (AddRoute(Route(Prefix.parse("10.100.0.2"), OWN_IP, ROUTE_METRIC)),)


def test_route_with_another_metric_is_replaced_by_ours() -> None:
    target = target_of(peer(2))
    kernel = bring_up(target)
    kernel.add_route(Route(Prefix.parse("10.100.0.2"), OWN_IP, 50))
    assert plan(target, kernel.state, NOW) == (RemoveRoute(Route(Prefix.parse("10.100.0.2"), OWN_IP, 50)),)
