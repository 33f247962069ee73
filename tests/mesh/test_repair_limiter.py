"""The repair limiter: which objects are left alone, for how long, and when that is over."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    PutPeer,
    RemovePeer,
    RemoveRoute,
    ReplaceTable,
    SetAlias,
    SetDevice,
    SetMtu,
    SetUp,
    Subject,
)
from plexd.mesh.firewall import Ruleset
from plexd.mesh.keys import PrivateKey, PublicKey
from plexd.mesh.observed import ROUTE_METRIC, Route
from plexd.mesh.repair_limiter import RepairLimiter, flapping_correction

OWN_KEY = PrivateKey(bytes([8] * 32))
OWN_IP, OWN_IPV6 = parse_ip("10.100.0.1"), parse_ip("fd00:100::1")
PREFIX = Prefix.parse("10.100.3.0/24")
ROUTE = AddRoute(Route(PREFIX, OWN_IP, ROUTE_METRIC))
OTHER = AddRoute(Route(Prefix.parse("10.100.4.0/24"), OWN_IP, ROUTE_METRIC))
FIREWALL = ReplaceTable(Ruleset("digest", (), "", {}, 0))
LINK = CreateLink(OWN_KEY, 51820, 1420)
ADDRESS = AddAddress(Prefix.host(OWN_IP))
KEY = PublicKey(bytes([3] * 32))
PEER = PutPeer("n_3", KEY, True, None, None, 25, (), ("added",))

SUBJECT = Subject("plexd0", "inet plexd")


def one_pass(limiter: RepairLimiter, now: float, *damage: Change) -> tuple[RepairLimiter, Sequence[Change]]:
    """A look that finds this damage, and every repair that is admitted succeeds."""
    limiter, admitted = limiter.admit(SUBJECT, damage, now)
    return limiter.record(SUBJECT, admitted, now), admitted


def fight(seconds: float, step: float, *damage: Change) -> tuple[RepairLimiter, list[float]]:
    """The damage is there at every look, and there is one each `step`; when it was repaired."""
    limiter, repairs = RepairLimiter(), []
    for number in range(int(seconds / step)):
        limiter, admitted = one_pass(limiter, number * step, *damage)
        if admitted:
            repairs.append(number * step)
    return limiter, repairs


def test_ten_repairs_in_a_minute_are_nothing_special() -> None:
    limiter, repairs = fight(10, 1.0, ROUTE)
    assert len(repairs) == 10
    assert limiter.flapping == ()
    assert limiter.due is None


def test_eleventh_repair_in_a_minute_is_the_last_for_a_second() -> None:
    limiter, repairs = fight(1.3, 0.1, ROUTE)
    assert len(repairs) == 11
    assert limiter.flapping == ("route 10.100.3.0/24: 11 repairs in 60 s",)
    assert limiter.due == pytest.approx(2.0)


def test_rest_doubles_to_a_minute() -> None:
    limiter, repairs = fight(400, 0.5, ROUTE)
    rests = [later - earlier for earlier, later in itertools.pairwise(repairs[10:])]
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    assert limiter.flapping == ("route 10.100.3.0/24: 11 repairs in 60 s",)


def test_slow_damage_is_repaired_for_ever() -> None:
    limiter, repairs = fight(1200, 6.0, ROUTE)
    assert len(repairs) == 200
    assert limiter.flapping == ()


def test_minute_without_damage_ends_it() -> None:
    limiter, _ = fight(1.1, 0.1, ROUTE)
    at = limiter.histories["route 10.100.3.0/24"].seen
    assert one_pass(limiter, at + 59.9)[0].flapping
    limiter, _ = one_pass(limiter, at + 60)
    assert limiter == RepairLimiter()
    limiter, admitted = one_pass(limiter, at + 61, ROUTE)
    assert admitted == (ROUTE,)
    assert limiter.flapping == ()


def test_damage_after_a_minute_is_the_first_again_though_nobody_looked_between() -> None:
    limiter, _ = fight(1.1, 0.1, ROUTE)
    limiter, _ = one_pass(limiter, 70.0, ROUTE)
    assert limiter.flapping == ()
    assert len(limiter.histories["route 10.100.3.0/24"].repairs) == 1


def test_damage_that_is_left_is_no_peace() -> None:
    """The rest is as long as the minute, and the object is broken all through it."""
    limiter, repairs = fight(200, 0.5, ROUTE)
    assert limiter.due is not None
    limiter, admitted = one_pass(limiter, limiter.due, ROUTE)
    assert admitted
    assert limiter.flapping
    assert len(repairs) > 11


def test_the_others_are_repaired_as_ever() -> None:
    limiter, _ = fight(1.1, 0.1, ROUTE)
    limiter, admitted = limiter.admit(SUBJECT, (OTHER, ROUTE, SetAlias()), 1.2)
    assert admitted == (OTHER, SetAlias())


def test_adding_and_removing_is_one_object() -> None:
    limiter = RepairLimiter()
    for number in range(11):
        change = ROUTE if number % 2 else RemoveRoute(Route(PREFIX, None, ROUTE_METRIC))
        limiter, _ = one_pass(limiter, number, change)
    assert limiter.flapping == ("route 10.100.3.0/24: 11 repairs in 60 s",)


ROUTE_V6 = AddRoute(Route(Prefix.parse("fd00:100::2"), OWN_IPV6, ROUTE_METRIC))
ADDRESS_V6 = AddAddress(Prefix.host(OWN_IPV6))


@pytest.mark.parametrize(
    ("damage", "name", "left"),
    [
        ((LINK, ADDRESS, SetUp(), PEER, ROUTE), "link plexd0", ()),
        ((SetUp(), ROUTE, OTHER), "up state of plexd0", ()),
        ((ADDRESS, ROUTE, OTHER), "address 10.100.0.1/32", ()),
        ((ADDRESS, ROUTE, ROUTE_V6), "address 10.100.0.1/32", (ROUTE_V6,)),
        ((SetMtu(1400), ADDRESS_V6, ROUTE_V6), "mtu of plexd0", ()),
        ((ADDRESS_V6, SetUp(), ROUTE_V6), "up state of plexd0", ()),
        ((FIREWALL, SetUp(), ROUTE, SetAlias()), "table inet plexd", (SetAlias(),)),
    ],
)
def test_what_follows_from_other_damage_is_no_fight_of_its_own(
    damage: tuple[Change, ...], name: str, left: tuple[Change, ...]
) -> None:
    """Nor is it tried while the cause is left alone: it would fail."""
    limiter = RepairLimiter()
    for number in range(11):
        limiter, _ = one_pass(limiter, number * 0.1, *(change for change in damage if change not in left))
    assert limiter.flapping == (f"{name}: 11 repairs in 60 s",)
    assert limiter.admit(SUBJECT, damage, 1.2)[1] == left


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (SetAlias(), "alias of plexd0"),
        (SetDevice(OWN_KEY, 51820, ("key", "port")), "key and port of plexd0"),
        (PEER, "peer n_3"),
        (RemovePeer(None, KEY), f"peer key {KEY.short}"),
        (ADDRESS, "address 10.100.0.1/32"),
    ],
)
def test_objects_are_named(change: Change, name: str) -> None:
    limiter, _ = fight(1.1, 0.1, change)
    assert limiter.flapping == (f"{name}: 11 repairs in 60 s",)


def test_begin_of_a_fight_is_one_correction() -> None:
    limiter, _ = fight(1.0, 0.1, ROUTE, OTHER)
    after, _ = one_pass(limiter, 1.0, ROUTE, OTHER)
    assert flapping_correction(limiter, limiter) == ()
    (correction,) = flapping_correction(limiter, after)
    assert correction == ("repair_contested", "route 10.100.3.0/24: 11 repairs in 60 s, and 1 more")
    later, admitted = one_pass(after, 2.0, ROUTE, OTHER)
    assert admitted
    assert flapping_correction(after, later) == ()


@given(st.lists(st.tuples(st.floats(0.01, 30), st.booleans()), max_size=80))
def test_never_more_than_the_contract_allows(steps: list[tuple[float, bool]]) -> None:
    """Whatever the rhythm: at most 11 repairs in a minute before the first rest, and rests are kept."""
    limiter, now = RepairLimiter(), 0.0
    last: tuple[float, float] | None = None
    for pause, is_damaged in steps:
        now += pause
        limiter, admitted = one_pass(limiter, now, *((ROUTE,) if is_damaged else ()))
        history = limiter.histories.get("route 10.100.3.0/24")
        if admitted:
            assert last is None or now >= last[0] + last[1]
            assert history is not None
            assert sum(now - at < 60 for at in history.repairs) <= 11 or history.rest
            last = now, history.rest
