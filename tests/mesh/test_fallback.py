"""Which peers try another endpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plexd.mesh.desired import Candidates, Desired, EndpointSource
from plexd.mesh.fallback import next_endpoints
from plexd.mesh.observed import Device, DevicePeer
from plexd.mesh.target import build_target
from tests.mesh.worlds import NOW, OWN_KEY, RESOLVED, desired_of, peer, settings_for

S, E, R = EndpointSource.PEER, EndpointSource.EVENT, EndpointSource.REPORT
OLD, MIDDLE, NEW = "192.0.2.1:51820", "192.0.2.2:51821", "192.0.2.3:51820"
THREE = ((S, OLD), (E, MIDDLE), (R, NEW))


def desired_with(*offers: tuple[EndpointSource, str]) -> Desired:
    candidates = Candidates()
    for source, text in offers:
        candidates = candidates.offer(source, text)
    return replace(desired_of(peer(2)), candidates={"n_2": candidates})


def moves(
    desired: Desired, *, turned: str = "", handshake_age: float | None = None, lately_set: frozenset[str] = frozenset()
) -> dict[str, str]:
    target = build_target(desired, settings_for(), RESOLVED, {"n_2": turned} if turned else {})
    wanted = target.peers["n_2"]
    handshake = 0.0 if handshake_age is None else NOW - handshake_age
    held = DevicePeer(wanted.public_key, wanted.psk, wanted.endpoint, 25, handshake, 0, 0, wanted.allowed_ips)
    device = Device(OWN_KEY, 51820, 0, {wanted.public_key: held})
    return next_endpoints(desired, target, RESOLVED, device, lately_set, NOW)


@pytest.mark.parametrize(("turned", "then"), [("", MIDDLE), (NEW, MIDDLE), (MIDDLE, OLD), (OLD, NEW)])
def test_candidates_are_tried_newest_first_and_round_robin(turned: str, then: str) -> None:
    assert moves(desired_with(*THREE), turned=turned) == {"n_2": then}


@pytest.mark.parametrize(
    ("age", "expected"), [(None, True), (181.0, True), (180.0, False), (0.0, False), (-180.0, False), (-181.0, True)]
)
def test_fresh_peer_is_never_moved(age: float | None, expected: bool) -> None:
    assert bool(moves(desired_with(*THREE), handshake_age=age)) is expected


def test_endpoint_set_lately_gets_its_time() -> None:
    assert not moves(desired_with(*THREE), lately_set=frozenset({"n_2"}))


@pytest.mark.parametrize(
    "offers",
    [
        (),
        ((S, OLD),),
        ((S, OLD), (E, OLD)),
        ((S, OLD), (E, "")),
        ((S, OLD), (E, "name.without.address:1")),
        ((S, OLD), (E, "10.100.0.1:51820")),  # our own mesh address
        ((S, OLD), (E, "no endpoint")),
    ],
)
def test_peer_with_one_usable_candidate_stays_where_it_is(offers: tuple[tuple[EndpointSource, str], ...]) -> None:
    assert not moves(desired_with(*offers))


def test_unusable_newest_candidate_is_left_out_of_the_round() -> None:
    desired = desired_with((S, OLD), (E, MIDDLE), (R, "0.0.0.0:51820"))
    assert moves(desired) == {"n_2": MIDDLE}
    assert moves(desired, turned=MIDDLE) == {"n_2": OLD}
    assert moves(desired, turned=OLD) == {"n_2": MIDDLE}


def test_name_and_its_address_are_one_candidate() -> None:
    name, endpoint = next(iter(RESOLVED.items()))
    assert not moves(desired_with((S, str(endpoint)), (E, name)))


def test_peer_that_is_not_in_the_kernel_is_left_to_the_pass() -> None:
    desired = desired_with(*THREE)
    target = build_target(desired, settings_for(), RESOLVED)
    assert not next_endpoints(desired, target, RESOLVED, Device(OWN_KEY, 51820, 0, {}), frozenset(), NOW)
