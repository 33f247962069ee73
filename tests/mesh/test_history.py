"""Whatever came before, one event after another: what is taken over from the last target is what making it anew gives,
and the steps between two targets lead from the one to the other.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh import firewall
from plexd.mesh.admission import amend, judge
from plexd.mesh.amend import rebuild
from plexd.mesh.desired import Desired, EndpointSource, Peer
from plexd.mesh.events import EndpointOffered, Foldable, PeerAdded, PeerRemoved
from plexd.mesh.fold import Unfoldable, fold
from plexd.mesh.plan import plan_event
from plexd.mesh.target import Sources, Target, build
from plexd.mesh.temporary_allows import TemporaryAllows
from tests.mesh.test_admission import policies, rule
from tests.mesh.worlds import OWN_IP, desired_of, peer, settings_for

OWN = replace(settings_for(), policy=firewall.Settings(OWN_IP, ("plexd0",)))
OPENINGS = TemporaryAllows()
ids = st.integers(2, 6).map("n_{}".format)
endpoints = st.sampled_from(("", "192.0.2.1:51820", "198.51.100.1:1", "172.16.0.9:1"))
peers = st.builds(
    lambda number, prefixes, endpoint: peer(number, *prefixes, endpoint=endpoint),
    st.integers(2, 6),
    st.lists(st.sampled_from(("172.16.0.0/24", "192.0.2.0/24", "192.0.2.1")), unique=True, max_size=1),
    endpoints,
)
events = st.one_of(
    st.builds(PeerAdded, peers),
    st.builds(PeerRemoved, ids),
    st.builds(EndpointOffered, ids, endpoints, st.sampled_from(EndpointSource)),
)
shown_sides = st.sets(st.sampled_from(("n_2", "n_3", "n_4", "n_5", "172.16.0.0/16")), min_size=1)
histories = st.lists(st.tuples(st.lists(events, min_size=1, max_size=3), st.booleans()), min_size=1, max_size=6)


@given(st.lists(peers, min_size=2, max_size=5, unique_by=lambda p: p.id), shown_sides, histories)
def test_target_after_any_history_is_the_one_made_from_nothing(
    first: list[Peer], shown: set[str], history: list[tuple[list[Foldable], bool]]
) -> None:
    rules = policies(*(rule("n_self", side) for side in sorted(shown)))
    desired = replace(desired_of(*first), policies=rules)
    built = rebuild(None, Sources(desired, OWN, {}, {}))
    admitted = judge(built.target, desired, OPENINGS)
    applied = admitted.target
    for several, is_applied in history:
        for event in several:
            desired = _folded(desired, event)
        built = rebuild(built, Sources(desired, OWN, {}, {}))
        admitted = amend(admitted, built.target, desired, OPENINGS) or judge(built.target, desired, OPENINGS)
        anew = judge(build(built.sources).target, desired, OPENINGS)
        assert admitted == anew
        assert list(built.target.peers) == list(desired.peers)
        assert _steps(applied, admitted.target) == _steps(_forgetful(applied), anew.target)
        if is_applied:
            applied = admitted.target


def _folded(desired: Desired, event: Foldable) -> Desired:
    try:
        return fold(desired, event)
    except Unfoldable:
        return desired


def _steps(before: Target, after: Target) -> list[str]:
    return sorted(map(repr, plan_event(before, after)))


def _forgetful(target: Target) -> Target:
    """The same, of which no copy remembers that it was made from it."""
    return replace(target, peers=dict(target.peers))
