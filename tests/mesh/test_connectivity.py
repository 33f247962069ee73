"""For every peer that is not connected there is a reason, and it is the first one that explains it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from plexd.mesh.address import Endpoint, Prefix, parse_endpoint, parse_ip
from plexd.mesh.connectivity import PeerView, Sight, describe_peers
from plexd.mesh.desired import Candidates, Desired, EndpointSource, Peer, Rejection
from plexd.mesh.keys import PresharedKey
from plexd.mesh.observed import Observed, Route
from plexd.mesh.target import Settings, build_target
from plexd.node.health import CONDITION_PROBLEMS, Condition
from tests.fakes import FakeKernel
from tests.mesh.worlds import NOW, RESOLVED, bring_up, desireds, kernels, peer, settings_for

FIRST = "192.0.2.1:51820"
SECOND = "192.0.2.2:51820"


def endpoint(text: str) -> Endpoint:
    parsed = parse_endpoint(text)
    assert isinstance(parsed, Endpoint)
    return parsed


def candidates(*offers: tuple[EndpointSource, str]) -> Candidates:
    found = Candidates()
    for source, text in offers:
        found = found.offer(source, text)
    return found


class Mesh:
    """A node whose kernel is as it should be; what differs is up to the test."""

    def __init__(self, *peers: Peer, settings: Settings | None = None) -> None:
        self.settings = settings or settings_for()
        self.desired = Desired(
            peers={p.id: p for p in peers},
            candidates={p.id: candidates((EndpointSource.PEER, p.endpoint)) for p in peers},
        )
        self.kernel = bring_up(build_target(self.desired, self.settings, RESOLVED))
        self.since = {p.id: NOW - 252 for p in peers}
        self.is_refused = False

    def shake_hands(self, *numbers: int, age: float = 10) -> Mesh:
        for number in numbers or [int(peer_id[2:]) for peer_id in self.desired.peers]:
            self.kernel.shake_hands(self.desired.peers[f"n_{number}"].public_key, NOW - age)
        return self

    def sight(self) -> Sight:
        target = build_target(self.desired, self.settings, RESOLVED)
        return Sight("plexd0", self.desired, target, self.kernel.state, RESOLVED, self.since, self.is_refused, NOW)

    def views(self) -> list[PeerView]:
        return list(describe_peers(self.sight()))


def code_of(view: PeerView) -> str | None:
    return view.obstacle.code if view.obstacle is not None else None


# connected


def test_connected_peer_has_its_facts_and_no_obstacle() -> None:
    psk = PresharedKey(bytes([7] * 32))
    mesh = Mesh(peer(2, "172.16.0.0/24", endpoint=FIRST, psk=psk)).shake_hands(age=12)
    held = mesh.kernel.peers[mesh.desired.peers["n_2"].public_key]
    mesh.kernel.put_peer(held._replace(rx_bytes=1200, tx_bytes=3400))
    assert mesh.views() == [
        PeerView(
            id="n_2",
            mesh_ip=parse_ip("10.100.0.2"),
            public_key=mesh.desired.peers["n_2"].public_key,
            endpoint=endpoint(FIRST),
            endpoint_source="state",
            path="direct",
            allowed_ips=(Prefix.parse("10.100.0.2"), Prefix.parse("172.16.0.0/24")),
            last_handshake=NOW - 12,
            rx_bytes=1200,
            tx_bytes=3400,
            has_psk=True,
            obstacle=None,
        )
    ]


@pytest.mark.parametrize(
    ("age", "expected"),
    [(0, None), (180, None), (180.5, "handshake_old"), (9999, "handshake_old"), (-3600, "handshake_old")],
)
def test_handshake_counts_for_three_minutes(age: float, expected: str | None) -> None:
    (view,) = Mesh(peer(2, endpoint=FIRST)).shake_hands(age=age).views()
    assert code_of(view) == expected


def test_roamed_peer_without_any_candidate_is_connected() -> None:
    mesh = Mesh(peer(2))
    mesh.kernel.roam(mesh.desired.peers["n_2"].public_key, endpoint("198.51.100.4:4711"), NOW - 5)
    (view,) = mesh.views()
    assert (view.endpoint, view.endpoint_source, view.obstacle) == (endpoint("198.51.100.4:4711"), "roamed", None)


def test_peers_come_in_the_control_planes_order() -> None:
    assert [view.id for view in Mesh(peer(4), peer(2), peer(3)).views()] == ["n_4", "n_2", "n_3"]


# endpoint and path


@pytest.mark.parametrize(
    ("offers", "in_kernel", "source"),
    [
        ([(EndpointSource.PEER, FIRST)], FIRST, "state"),
        ([(EndpointSource.PEER, FIRST), (EndpointSource.EVENT, SECOND)], SECOND, "event"),
        ([(EndpointSource.PEER, FIRST), (EndpointSource.REPORT, SECOND)], SECOND, "report"),
        # an older candidate can be the one in use
        ([(EndpointSource.PEER, FIRST), (EndpointSource.EVENT, SECOND)], FIRST, "state"),
        # the source that said so last
        ([(EndpointSource.PEER, FIRST), (EndpointSource.REPORT, FIRST)], FIRST, "report"),
        ([(EndpointSource.PEER, FIRST)], "192.0.2.1:51821", "roamed"),
        ([(EndpointSource.EVENT, "peer.example:51820")], "198.51.100.9:51820", "event"),
        ([(EndpointSource.PEER, "unknown.example:51820")], "198.51.100.9:51820", "roamed"),
        ([(EndpointSource.PEER, "no endpoint")], FIRST, "roamed"),
    ],
)
def test_source_is_whoever_named_the_endpoint_in_use(
    offers: list[tuple[EndpointSource, str]], in_kernel: str, source: str
) -> None:
    mesh = Mesh(peer(2))
    mesh.desired = replace(mesh.desired, candidates={"n_2": candidates(*offers)})
    mesh.kernel.roam(mesh.desired.peers["n_2"].public_key, endpoint(in_kernel), NOW)
    assert [view.endpoint_source for view in mesh.views()] == [source]


@pytest.mark.parametrize(
    ("endpoints", "paths"),
    [
        ([FIRST, SECOND], ["direct", "direct"]),
        ([FIRST, FIRST], ["relay", "relay"]),  # two peers at one place: somebody forwards
        ([FIRST, "192.0.2.1:51821"], ["direct", "relay"]),  # the relay port of a peer that is a bridge
        ([FIRST, "192.0.2.1:40000"], ["direct", "direct"]),  # two peers behind one NAT
        ([FIRST, "192.0.2.9:51821"], ["direct", "direct"]),
        ([FIRST, ""], ["direct", None]),
    ],
)
def test_path_is_guessed_from_the_endpoints(endpoints: list[str], paths: list[str | None]) -> None:
    mesh = Mesh(*(peer(number, endpoint=text) for number, text in enumerate(endpoints, 2)))
    assert [view.path for view in mesh.views()] == paths


# obstacles on this node


def test_lost_private_key_explains_everything() -> None:
    sight = replace(Mesh(peer(2), peer(3)).sight(), target=None)
    assert [code_of(view) for view in describe_peers(sight)] == ["no_private_key"] * 2


@pytest.mark.parametrize("observed", [None, Observed()])
def test_missing_interface_is_named(observed: Observed | None) -> None:
    (view,) = describe_peers(replace(Mesh(peer(2, endpoint=FIRST)).sight(), observed=observed))
    assert code_of(view) == "interface_missing"
    assert view.obstacle is not None
    assert "plexd0" in view.obstacle.text
    assert (view.endpoint, view.last_handshake, view.allowed_ips) == (None, None, ())


def test_interface_without_wireguard_is_missing() -> None:
    mesh = Mesh(peer(2))
    mesh.kernel.stop_answering()
    assert [code_of(view) for view in mesh.views()] == ["interface_missing"]


def test_interface_that_is_down_keeps_even_fresh_peers_away() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST)).shake_hands()
    mesh.kernel.set_link(up=False)
    assert [code_of(view) for view in mesh.views()] == ["interface_down"]


def test_peer_that_is_not_on_the_interface_yet() -> None:
    mesh = Mesh(peer(2))
    mesh.kernel.remove_peer(mesh.desired.peers["n_2"].public_key)
    assert [code_of(view) for view in mesh.views()] == ["not_applied"]


def test_allowed_ip_that_somebody_took_away_by_hand() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST)).shake_hands()
    held = mesh.kernel.peers[mesh.desired.peers["n_2"].public_key]
    mesh.kernel.put_peer(held._replace(allowed_ips=()))
    assert [code_of(view) for view in mesh.views()] == ["not_applied"]


def test_missing_route_is_named() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST), peer(3, endpoint=SECOND)).shake_hands()
    route = next(r for r in mesh.kernel.state.routes if r.prefix == Prefix.parse("10.100.0.2"))
    mesh.kernel.remove_route(Route(*route))
    assert [code_of(view) for view in mesh.views()] == ["no_route", None]


def test_mesh_address_that_is_an_endpoint_gets_no_route() -> None:
    mesh = Mesh(peer(2, endpoint="10.100.0.3:51820"), peer(3, endpoint=SECOND)).shake_hands()
    first, second = mesh.views()
    assert first.obstacle is None
    assert second.obstacle is not None
    assert (second.obstacle.code, "gets no route" in second.obstacle.text) == ("no_route", True)


# obstacles of the peer


def test_rejected_peer_is_listed_with_the_reason() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST)).shake_hands()
    mesh.desired = replace(mesh.desired, rejected=(Rejection("n_9", "bad public key: not standard base64"),))
    _, rejected = mesh.views()
    assert (rejected.id, rejected.mesh_ip, rejected.public_key) == ("n_9", None, None)
    assert rejected.obstacle is not None
    assert rejected.obstacle.code == "rejected"
    assert "bad public key: not standard base64" in rejected.obstacle.text


def test_peer_whose_address_another_one_claims_first() -> None:
    thief = peer(2, "10.100.0.3/32", endpoint=FIRST)
    mesh = Mesh(thief, peer(3, "172.16.0.0/24", endpoint=SECOND)).shake_hands()
    first, second = mesh.views()
    assert first.obstacle is None
    assert second.obstacle is not None
    assert second.obstacle.code == "prefix_lost"
    assert "peer n_2 claims 10.100.0.3/32" in second.obstacle.text


def test_peer_that_lost_another_prefix_only_is_connected() -> None:
    mesh = Mesh(peer(2, "172.16.0.0/24", endpoint=FIRST), peer(3, "172.16.0.0/24", endpoint=SECOND)).shake_hands()
    assert [code_of(view) for view in mesh.views()] == [None, None]


def test_peer_without_mesh_address_is_judged_by_what_lies_behind_it() -> None:
    subnet = peer(2, endpoint=FIRST)._replace(mesh_ip=b"", allowed_ips=(Prefix.parse("172.16.0.0/24"),))
    mesh = Mesh(subnet).shake_hands()
    (view,) = mesh.views()
    assert (view.mesh_ip, view.obstacle) == (None, None)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "no_endpoint"),
        ("unknown.example:51820", "endpoint_unresolved"),
        ("no endpoint", "endpoint_unusable"),
        ("224.0.0.1:51820", "endpoint_unusable"),
    ],
)
def test_peer_nobody_can_send_to(text: str, code: str) -> None:
    assert [code_of(view) for view in Mesh(peer(2, endpoint=text)).views()] == [code]


def test_peer_that_never_answered_says_for_how_long_and_what_was_sent() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST), peer(3, endpoint=SECOND))
    held = mesh.kernel.peers[mesh.desired.peers["n_2"].public_key]
    mesh.kernel.put_peer(held._replace(tx_bytes=14800))
    del mesh.since["n_3"]
    first, second = mesh.views()
    assert first.obstacle is not None
    assert first.obstacle.code == "no_handshake"
    assert first.obstacle.text == ("never a handshake with 192.0.2.1:51820 for 4m12s: 14800 bytes sent, 0 received")
    assert second.obstacle is not None
    assert second.obstacle.text == "never a handshake with 192.0.2.2:51820: 0 bytes sent, 0 received"


def test_old_handshake_says_how_old_and_with_whom() -> None:
    (view,) = Mesh(peer(2, endpoint=FIRST)).shake_hands(age=1000).views()
    assert view.obstacle is not None
    assert view.obstacle.text == "last handshake 16m40s ago: 192.0.2.1:51820 stopped answering"


def test_handshake_of_a_time_to_come_is_told_without_an_age() -> None:
    (view,) = Mesh(peer(2, endpoint=FIRST)).shake_hands(age=-1000).views()
    assert view.obstacle is not None
    assert view.obstacle.text == "last handshake before the clock was set back: 192.0.2.1:51820 stopped answering"


def test_quiet_peer_without_keepalive_is_idle() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST), settings=settings_for(keepalive=0)).shake_hands(age=1000)
    assert [code_of(view) for view in mesh.views()] == ["idle"]


def test_refused_identity_explains_missing_handshakes_only() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST), peer(3, endpoint=SECOND), peer(4)).shake_hands(2)
    mesh.is_refused = True
    assert [code_of(view) for view in mesh.views()] == [None, "identity_refused", "identity_refused"]


def test_refused_identity_has_the_remedy_that_health_names() -> None:
    mesh = Mesh(peer(2, endpoint=FIRST))
    mesh.is_refused = True
    (view,) = mesh.views()
    assert view.obstacle is not None
    assert view.obstacle.remedy == CONDITION_PROBLEMS[Condition.IDENTITY_REFUSED].remedy


@given(desireds(), kernels(), st.booleans())
def test_every_world_can_be_described(desired: Desired, kernel: FakeKernel, is_refused: bool) -> None:
    assume(all(p.allowed_ips for p in desired.peers.values()))  # a peer without any is rejected before
    settings = settings_for()
    observed = kernel.state
    target = build_target(desired, settings, RESOLVED)
    views = describe_peers(Sight("plexd0", desired, target, observed, RESOLVED, {}, is_refused, NOW))
    assert [view.id for view in views] == list(desired.peers)
    for view in views:
        if view.obstacle is None:
            assert observed.link is not None
            assert observed.link.up
            assert view.last_handshake is not None
            assert NOW - view.last_handshake <= 180
            assert view.endpoint is not None or view.endpoint_source is None
        else:
            assert view.obstacle.text
            assert view.obstacle.remedy
