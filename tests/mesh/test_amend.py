"""A target worked out from the one before is the target made anew, whatever happened in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh import amend
from plexd.mesh.address import Endpoint
from plexd.mesh.amend import rebuild
from plexd.mesh.desired import Desired, EndpointSource, FullState, Peer
from plexd.mesh.events import EndpointOffered, Foldable, PeerAdded, PeerKeyRotated, PeerRemoved
from plexd.mesh.fold import Unfoldable, fold, replace_state
from plexd.mesh.target import Built, Settings, Sources, build
from tests.mesh.worlds import (
    ENDPOINTS,
    KEYS,
    OWN_IP,
    PREFIXES,
    PSKS,
    RESOLVED,
    all_settings,
    desired_of,
    desireds,
    peer,
    settings_for,
)

IDS = st.sampled_from([f"n_{number}" for number in range(1, 7)])
TEXTS = st.sampled_from((*ENDPOINTS, "other.example:1", "172.16.0.9:1", "no endpoint"))
PEERS = st.builds(
    Peer,
    IDS,
    st.sampled_from(KEYS),
    st.just(OWN_IP),
    TEXTS,
    st.lists(st.sampled_from(PREFIXES), unique=True, max_size=3).map(tuple),
    st.sampled_from(PSKS),
)
EVENTS: st.SearchStrategy[Foldable] = st.one_of(
    st.builds(PeerAdded, PEERS),
    st.builds(PeerRemoved, IDS),
    st.builds(PeerKeyRotated, IDS, st.sampled_from(KEYS)),
    st.builds(EndpointOffered, IDS, TEXTS, st.sampled_from(EndpointSource)),
)


def pulled(desired: Desired, peers: list[Peer]) -> Desired:
    return replace_state(desired, FullState(tuple(peers), (), None, None, {}, {}, {}, {}))


@st.composite
def steps(draw: st.DrawFn, sources: Sources) -> Sources:
    """What may happen between two targets, several things at once included."""
    desired, settings, resolved, turned = sources
    match draw(st.integers(0, 9)):
        case 0:
            desired = pulled(desired, list(draw(desireds()).peers.values()))
        case 1:
            desired = pulled(desired, draw(st.permutations(list(desired.peers.values()))))
        case 2:
            settings = draw(all_settings)
        case 3:
            resolved = draw(st.sampled_from(({}, RESOLVED, RESOLVED | {"other.example:1": Endpoint(OWN_IP, 1)})))
        case 4:
            turned = draw(st.dictionaries(IDS, TEXTS, max_size=2))
        case _:
            for event in draw(st.lists(EVENTS, min_size=1, max_size=3)):
                try:
                    desired = fold(desired, event)
                except Unfoldable:
                    continue
    return Sources(desired, settings, resolved, turned)


@given(st.data(), desireds(), all_settings)
def test_any_history_leads_to_the_target_made_anew(data: st.DataObject, desired: Desired, settings: Settings) -> None:
    sources = Sources(desired, settings, RESOLVED, {})
    built = rebuild(None, sources)
    for _ in range(data.draw(st.integers(1, 6))):
        sources = data.draw(steps(sources))
        built = rebuild(built, sources)
        assert built == build(sources)
        assert list(built.target.peers) == list(sources.desired.peers)


def ordinary_mesh() -> Built:
    """Of a few peers, one of them in front of the network that others are in."""
    peers = (
        peer(2, endpoint="192.0.2.2:1"),
        peer(3, "192.0.2.0/24", endpoint="192.0.2.3:1"),
        peer(4, endpoint="peer.example:51820"),
    )
    return build(Sources(desired_of(*peers), settings_for(), RESOLVED, {}))


@pytest.mark.parametrize(
    "event",
    [
        PeerAdded(peer(5, "172.16.0.0/24", "2001:db8::/32", endpoint="198.51.100.9:51820")),
        PeerAdded(peer(5, "198.51.0.0/16")),
        PeerAdded(peer(2, "172.16.0.0/24", endpoint="192.0.2.2:1")),
        PeerRemoved("n_3"),
        PeerRemoved("n_4"),
        PeerKeyRotated("n_2", KEYS[5]),
        EndpointOffered("n_2", "203.0.113.7:51820", EndpointSource.EVENT),
        EndpointOffered("n_4", "", EndpointSource.PEER),
        EndpointOffered("n_4", "192.0.2.9:51820", EndpointSource.EVENT),
    ],
    ids=repr,
)
def test_ordinary_event_is_worked_in_without_making_the_target_anew(
    event: Foldable, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = ordinary_mesh()
    before, sources = repr(built), built.sources._replace(desired=fold(built.sources.desired, event))
    expected = build(sources)
    monkeypatch.setattr(amend, "build", lambda _: pytest.fail("made anew"))
    assert rebuild(built, sources) == expected
    assert repr(built) == before  # a value: what was there is not touched


@pytest.mark.parametrize(
    "event",
    [
        PeerAdded(peer(2, "192.0.2.0/24", endpoint="192.0.2.2:1")),
        PeerRemoved("n_6"),
        EndpointOffered("n_4", "172.16.0.1:1", EndpointSource.EVENT),
        EndpointOffered("n_5", "", EndpointSource.PEER),
    ],
    ids=["prefix claimed by two", "holder of a claimed prefix gone", "route swallows", "route comes back"],
)
def test_event_that_bears_on_other_peers_does(event: Foldable) -> None:
    others = (
        peer(5, "203.0.113.0/24", endpoint="203.0.113.1:1"),
        peer(6, "172.16.0.0/24"),
        peer(7, "172.16.0.0/24"),
    )
    desired = desired_of(*ordinary_mesh().sources.desired.peers.values(), *others)
    built = build(Sources(desired, settings_for(), RESOLVED, {}))
    sources = built.sources._replace(desired=fold(desired, event))
    assert rebuild(built, sources) == build(sources)


def test_news_that_concerns_no_peer_leaves_the_very_same_target() -> None:
    built = ordinary_mesh()
    assert rebuild(built, Sources(*built.sources)) is built
    elsewhere = replace(built.sources.desired, metadata={"zone": "a"})
    assert rebuild(built, built.sources._replace(desired=elsewhere)).target is built.target


def test_untouched_peer_is_the_very_same_in_the_next_target() -> None:
    """Of what is the very same ten thousand are soon compared."""
    built = ordinary_mesh()
    again = FullState((peer(2, endpoint="192.0.2.2:1"), peer(3)), (), None, None, {}, {}, {}, {})
    target = rebuild(built, built.sources._replace(desired=replace_state(built.sources.desired, again))).target
    assert target.peers["n_2"] is built.target.peers["n_2"]
