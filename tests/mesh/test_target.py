"""Who gets which prefix, which endpoint is used, and what is routed."""

from __future__ import annotations

import pytest

from plexd.mesh.address import Endpoint, Prefix, format_ip, parse_ip
from plexd.mesh.desired import Candidates, Desired, EndpointSource, Peer
from plexd.mesh.observed import ROUTE_METRIC, Route
from plexd.mesh.target import build_target, names_to_resolve
from tests.mesh.worlds import OWN_IP, OWN_IPV6, RESOLVED, desired_of, peer, settings_for, target_of


def texts(prefixes: tuple[Prefix, ...]) -> list[str]:
    return [str(prefix) for prefix in prefixes]


def test_prefix_belongs_to_the_first_peer_that_claims_it() -> None:
    target = target_of(peer(3, "172.16.0.0/24"), peer(2, "172.16.0.0/24", "192.0.2.0/24"))
    assert texts(target.peers["n_3"].allowed_ips) == ["10.100.0.3/32", "172.16.0.0/24"]
    assert texts(target.peers["n_2"].allowed_ips) == ["10.100.0.2/32", "192.0.2.0/24"]
    (warned,) = target.warnings
    assert (warned.code, warned.subject) == ("prefix_claimed", "n_2 172.16.0.0/24")


def test_overlapping_prefixes_of_different_length_are_both_kept() -> None:
    target = target_of(peer(2, "172.16.0.0/16"), peer(3, "172.16.0.0/24"))
    assert target.warnings == ()
    assert {str(route.prefix) for route in target.routes} >= {"172.16.0.0/16", "172.16.0.0/24"}


def test_no_two_peers_share_a_prefix_even_when_all_claim_the_same() -> None:
    target = target_of(*(peer(n, "172.16.0.0/24") for n in (2, 3, 4)))
    held = [prefix for each in target.peers.values() for prefix in each.allowed_ips]
    assert len(held) == len(set(held))


# endpoints


@pytest.mark.parametrize(
    ("text", "endpoint", "warned"),
    [
        ("", None, False),
        ("192.0.2.1:51820", "192.0.2.1:51820", False),
        ("[2001:db8::7]:51820", "[2001:db8::7]:51820", False),
        ("127.0.0.1:51820", "127.0.0.1:51820", False),
        ("peer.example:51820", "198.51.100.9:51820", False),
        ("unresolved.example:51820", None, False),
        ("192.0.2.1", None, True),
        ("192.0.2.1:0", None, True),
        ("192.0.2.1:65536", None, True),
        ("2001:db8::7:51820", None, True),
        ("0.0.0.0:51820", None, True),
        ("[::]:51820", None, True),
        ("224.0.0.1:51820", None, True),
        ("255.255.255.255:51820", None, True),
        ("[ff02::1]:51820", None, True),
        ("10.100.0.1:51820", None, True),
    ],
)
def test_endpoint_is_used_or_ignored_with_a_warning(text: str, endpoint: str | None, warned: bool) -> None:
    target = target_of(peer(2, endpoint=text))
    used = target.peers["n_2"].endpoint
    assert (str(used) if used else None) == endpoint
    assert [warning.code for warning in target.warnings] == (["endpoint_ignored"] if warned else [])


def test_name_that_resolves_to_our_own_mesh_address_is_ignored() -> None:
    target = build_target(
        desired_of(peer(2, endpoint="loop.example:1")), settings_for(), {"loop.example:1": Endpoint(OWN_IP, 1)}
    )
    assert target.peers["n_2"].endpoint is None


def test_current_candidate_wins_over_the_endpoint_of_the_peer() -> None:
    known = peer(2, endpoint="192.0.2.1:51820")
    candidates = Candidates().offer(EndpointSource.PEER, known.endpoint).offer(EndpointSource.EVENT, "192.0.2.2:1")
    target = build_target(Desired(peers={"n_2": known}, candidates={"n_2": candidates}), settings_for(), {})
    assert str(target.peers["n_2"].endpoint) == "192.0.2.2:1"


def test_only_names_in_use_are_resolved() -> None:
    desired = desired_of(
        peer(2, endpoint="peer.example:51820"), peer(3, endpoint="192.0.2.1:1"), peer(4, endpoint="not an endpoint")
    )
    assert names_to_resolve(desired) == {"peer.example:51820"}


# routes


def test_every_prefix_of_every_peer_is_routed() -> None:
    target = target_of(peer(2, "172.16.0.0/24"), peer(3, "fd00:200::/64"))
    assert target.routes == {
        Route(Prefix.parse("10.100.0.2"), OWN_IP, ROUTE_METRIC),
        Route(Prefix.parse("172.16.0.0/24"), OWN_IP, ROUTE_METRIC),
        Route(Prefix.parse("10.100.0.3"), OWN_IP, ROUTE_METRIC),
        Route(Prefix.parse("fd00:200::/64"), None, ROUTE_METRIC),
    }


def test_preferred_source_is_the_mesh_address_of_the_same_family() -> None:
    routes = target_of(peer(2, "fd00:200::/64"), settings=settings_for(mesh_ip=OWN_IPV6)).routes
    sources = {str(route.prefix): route.source and format_ip(route.source) for route in routes}
    assert sources == {"10.100.0.2/32": None, "fd00:200::/64": "fd00:100::1"}


def test_endpoints_are_those_in_use() -> None:
    target = target_of(
        peer(2, endpoint="192.0.2.7:1"), peer(3, endpoint="[2001:db8::7]:1"), peer(4), peer(5, endpoint="192.0.2.7:2"),
        peer(6, endpoint="peer.example:51820"), peer(7, endpoint="nowhere.example:1"),
    )  # fmt: skip
    assert {format_ip(packed) for packed in target.endpoints()} == {"192.0.2.7", "2001:db8::7", "198.51.100.9"}


@pytest.mark.parametrize(
    ("prefix", "swallowed"),
    [
        ("192.0.2.7", True),
        ("192.0.2.0/24", True),
        ("192.0.2.7/31", True),
        ("192.0.2.8/31", False),
        ("192.0.2.6/32", False),
        ("192.0.0.0/16", True),
        ("198.51.100.0/24", True),
        ("203.0.113.0/24", True),
        ("203.0.114.0/24", False),
        ("2001:db8::/32", True),
        ("2001:db9::/32", False),
        ("c000:200::/24", False),
    ],
)
def test_prefix_around_an_endpoint_or_the_control_plane_is_not_routed(prefix: str, swallowed: bool) -> None:
    """192.0.2.7 is an endpoint, 198.51.100.9 one by name, 2001:db8::7 one, 203.0.113.80 the control plane."""
    settings = settings_for(control_plane=frozenset({parse_ip("203.0.113.80")}))
    target = target_of(
        peer(2, prefix, endpoint="192.0.2.7:51820"),
        peer(3, endpoint="peer.example:51820"),
        peer(4, endpoint="[2001:db8::7]:51820"),
        settings=settings,
    )
    parsed = Prefix.parse(prefix)
    assert parsed in target.peers["n_2"].allowed_ips
    assert any(route.prefix == parsed for route in target.routes) is not swallowed
    assert [warning.code for warning in target.warnings] == (["prefix_not_routed"] if swallowed else [])


def test_warnings_name_every_prefix_once() -> None:
    target = target_of(peer(2, "192.0.2.0/24", endpoint="192.0.2.1:1"), peer(3, endpoint="192.0.2.2:1"))
    assert [warning.subject for warning in target.warnings] == ["192.0.2.0/24"]


def test_peer_without_mesh_address_is_reached_by_its_prefixes_only() -> None:
    bare = Peer("n_2", peer(2).public_key, b"", "", (Prefix.parse("172.16.0.0/24"),), peer(2).psk)
    target = build_target(desired_of(bare), settings_for(), RESOLVED)
    assert {str(route.prefix) for route in target.routes} == {"172.16.0.0/24"}
