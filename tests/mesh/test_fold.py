"""Events and state pulls change the desired snapshot as the contract says, and repeating them changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import (
    Candidates,
    DataEntry,
    Desired,
    EndpointSource,
    FullState,
    Peer,
    Policy,
    PolicyRule,
    Rejection,
    SigningKeys,
)
from plexd.mesh.events import (
    EndpointOffered,
    Foldable,
    NodeStateUpdated,
    PeerAdded,
    PeerKeyRotated,
    PeerRemoved,
    SecretRefsUpdated,
    SigningKeyReplaced,
    SigningKeysRotated,
)
from plexd.mesh.fold import Unfoldable, expire_signing_key, fold, replace_state
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey
from tests.mesh.worlds import ENDPOINTS, KEYS, PREFIXES, PSKS, desired_of, desireds, peer

S, E, R = EndpointSource.PEER, EndpointSource.EVENT, EndpointSource.REPORT
SECRET = PresharedKey(bytes([0xA1] * 32))
OLD, NEW = bytes([1] * 32), bytes([2] * 32)


def full_state(
    *peers: Peer,
    rejected: tuple[Rejection, ...] = (),
    policies: tuple[Policy, ...] = (),
    signing_keys: SigningKeys | None = None,
    data: tuple[DataEntry, ...] = (),
) -> FullState:
    return FullState(peers, rejected, policies, signing_keys, {}, {entry.key: entry for entry in data}, {}, {})


def entry(key: str, version: int, payload: str = "1") -> DataEntry:
    return DataEntry(key, "application/json", payload, version, "2026-01-01T00:00:00Z")


# any event

ids = st.sampled_from([f"n_{n}" for n in range(1, 7)])
keys = st.sampled_from(KEYS)
psks = st.sampled_from(PSKS)
endpoints = st.sampled_from(ENDPOINTS)
prefixes = st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=3, unique=True).map(tuple)
mesh_ips = st.sampled_from([parse_ip("10.100.0.2"), parse_ip("10.100.0.3"), parse_ip("fd00:100::2")])
peers = st.builds(Peer, ids, keys, mesh_ips, endpoints, prefixes, psks)
data = st.lists(st.builds(entry, st.sampled_from("abc"), st.integers(1, 3), st.sampled_from(["1", "2"]))).map(
    lambda entries: {entry.key: entry for entry in entries}
)


@st.composite
def rotations(draw: st.DrawFn) -> PeerKeyRotated:
    """Any choice of members; with a mesh address they describe a whole peer."""
    peer_id, key, psk = draw(ids), draw(keys), draw(st.none() | psks)
    endpoint, allowed_ips, mesh_ip = draw(st.none() | endpoints), draw(st.none() | prefixes), draw(st.none() | mesh_ips)
    complete = None
    if mesh_ip is not None:
        host = Prefix.host(mesh_ip)
        allowed_ips = (host, *(prefix for prefix in allowed_ips if prefix != host)) if allowed_ips else None
        complete = Peer(peer_id, key, mesh_ip, endpoint or "", allowed_ips or (host,), psk or NO_PRESHARED_KEY)
    return PeerKeyRotated(peer_id, key, psk, mesh_ip, endpoint, allowed_ips, complete)


signing_keys = st.builds(SigningKeys, st.sampled_from((OLD, NEW)))
foldables: st.SearchStrategy[Foldable] = st.one_of(
    st.builds(PeerAdded, peers),
    st.builds(PeerRemoved, ids),
    rotations(),
    st.builds(EndpointOffered, ids, endpoints, st.sampled_from((E, R))),
    st.builds(SigningKeysRotated, signing_keys),
    st.builds(SigningKeyReplaced, st.sampled_from((OLD, NEW)), st.just(100.0)),
    st.builds(NodeStateUpdated, st.none() | st.just({"zone": "a"}), st.none() | data),
    st.builds(SecretRefsUpdated, st.dictionaries(st.sampled_from("xyz"), st.integers(1, 3))),
)


@given(desireds(), st.lists(foldables, max_size=5), foldables)
def test_repeated_event_changes_nothing(start: Desired, past: list[Foldable], event: Foldable) -> None:
    desired = start
    for earlier in past:
        desired = _fold_or_keep(desired, earlier)
    once = _fold_or_keep(desired, event)
    assert _fold_or_keep(once, event) is once


@given(desireds(), st.lists(foldables, max_size=8))
def test_no_sequence_of_events_makes_two_peers_of_one_key(start: Desired, events: list[Foldable]) -> None:
    desired = start
    for event in events:
        desired = _fold_or_keep(desired, event)
        owners = [peer.public_key for peer in desired.peers.values()]
        assert len(owners) == len(set(owners))
        assert desired.candidates.keys() == desired.peers.keys()


@given(desireds(), st.lists(peers, unique_by=(lambda peer: peer.id, lambda peer: peer.public_key)))
def test_repeated_state_pull_changes_nothing(start: Desired, pulled: list[Peer]) -> None:
    once = replace_state(start, full_state(*pulled))
    assert list(once.peers.values()) == pulled
    assert replace_state(once, full_state(*pulled)) is once


def _fold_or_keep(desired: Desired, event: Foldable) -> Desired:
    try:
        return fold(desired, event)
    except Unfoldable:
        return desired


# peers


def test_added_peer_joins_at_the_end() -> None:
    desired = fold(desired_of(peer(3)), PeerAdded(peer(2)))
    assert list(desired.peers) == ["n_3", "n_2"]


def test_added_peer_of_a_known_id_replaces_it_in_its_place() -> None:
    desired = fold(desired_of(peer(3), peer(2)), PeerAdded(peer(3, "172.16.0.0/24")))
    assert list(desired.peers.values()) == [peer(3, "172.16.0.0/24"), peer(2)]


def test_added_peer_is_rejected_no_more() -> None:
    desired = replace_state(Desired(), full_state(rejected=(Rejection("n_2", "bad"), Rejection("n_3", "bad"))))
    assert fold(desired, PeerAdded(peer(2))).rejected == (Rejection("n_3", "bad"),)


def test_added_peer_with_the_key_of_another_waits_for_a_pull() -> None:
    with pytest.raises(Unfoldable, match="n_3"):
        fold(desired_of(peer(3)), PeerAdded(peer(2, key=KEYS[2])))


def test_removed_peer_goes_with_its_candidates() -> None:
    desired = fold(desired_of(peer(2, endpoint="192.0.2.1:51820"), peer(3)), PeerRemoved("n_2"))
    assert list(desired.peers) == list(desired.candidates) == ["n_3"]


def test_removing_an_unknown_peer_changes_nothing() -> None:
    desired = desired_of(peer(2))
    assert fold(desired, PeerRemoved("n_9")) is desired


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (PeerKeyRotated("n_2", KEYS[5]), {}),
        (PeerKeyRotated("n_2", KEYS[5], psk=NO_PRESHARED_KEY), {"psk": NO_PRESHARED_KEY}),
        (PeerKeyRotated("n_2", KEYS[5], endpoint="192.0.2.9:1"), {"endpoint": "192.0.2.9:1"}),
        (
            PeerKeyRotated("n_2", KEYS[5], allowed_ips=(Prefix.parse("10.100.0.2"), Prefix.parse("192.0.2.0/24"))),
            {"allowed_ips": (Prefix.parse("10.100.0.2"), Prefix.parse("192.0.2.0/24"))},
        ),
        (
            PeerKeyRotated("n_2", KEYS[5], allowed_ips=(Prefix.parse("192.0.2.0/24"),)),
            {"allowed_ips": (Prefix.parse("10.100.0.2"), Prefix.parse("192.0.2.0/24"))},
        ),
        (
            PeerKeyRotated("n_2", KEYS[5], mesh_ip=parse_ip("10.100.0.77")),
            {
                "mesh_ip": parse_ip("10.100.0.77"),
                "allowed_ips": (Prefix.parse("10.100.0.77"), Prefix.parse("172.16.0.0/24")),
            },
        ),
        (
            PeerKeyRotated("n_2", KEYS[5], mesh_ip=parse_ip("10.100.0.77"), allowed_ips=(Prefix.parse("10.100.0.77"),)),
            {"mesh_ip": parse_ip("10.100.0.77"), "allowed_ips": (Prefix.parse("10.100.0.77"),)},
        ),
    ],
    ids=["key only", "secret withdrawn", "endpoint", "prefixes", "prefixes without mesh address", "address", "both"],
)
def test_rotation_keeps_what_it_does_not_name(event: PeerKeyRotated, expected: dict[str, object]) -> None:
    known = peer(2, "172.16.0.0/24", endpoint="192.0.2.1:51820", psk=SECRET)
    desired = fold(desired_of(known, peer(3)), event)
    assert desired.peers["n_2"] == Peer(**{**known._asdict(), "public_key": KEYS[5], **expected})
    assert list(desired.peers) == ["n_2", "n_3"]


def test_rotation_of_an_unknown_peer_adds_it_when_it_is_described() -> None:
    assert fold(Desired(), PeerKeyRotated("n_2", KEYS[1], complete=peer(2))).peers == {"n_2": peer(2)}
    with pytest.raises(Unfoldable):
        fold(Desired(), PeerKeyRotated("n_2", KEYS[1]))


# endpoint candidates


@pytest.mark.parametrize(
    ("offers", "current"),
    [
        ([], ""),
        ([(S, "a:1")], "a:1"),
        ([(S, "a:1"), (E, "b:1")], "b:1"),
        ([(S, "a:1"), (E, "b:1"), (S, "a:1")], "b:1"),
        ([(S, "a:1"), (E, "b:1"), (S, "c:1")], "c:1"),
        ([(S, "a:1"), (E, "b:1"), (R, "c:1"), (E, "b:1")], "c:1"),
        ([(S, "a:1"), (E, "b:1"), (R, "c:1"), (R, "")], "b:1"),
        ([(S, "a:1"), (S, "")], ""),
        ([(S, ""), (E, "")], ""),
        ([(S, "a:1"), (E, "b:1"), (E, ""), (E, "b:1")], "b:1"),
        ([(S, "a:1"), (E, "b:1"), (S, ""), (S, "a:1")], "a:1"),
    ],
)
def test_last_change_of_any_source_is_the_current_candidate(
    offers: list[tuple[EndpointSource, str]], current: str
) -> None:
    candidates = Candidates()
    for source, value in offers:
        candidates = candidates.offer(source, value)
    assert candidates.current == current


@pytest.mark.parametrize(
    ("before", "since", "is_news"),
    [
        ([], [(S, "a:1")], True),
        ([(S, "a:1")], [(E, "b:1")], True),
        ([(S, "a:1")], [], False),
        ([(S, "a:1")], [(E, "a:1")], False),
        ([(S, "a:1")], [(S, "")], False),
        ([(S, "a:1"), (E, "b:1")], [(E, "")], False),
        ([(S, "a:1"), (E, "b:1")], [(E, "c:1"), (E, "")], False),
        ([(E, "b:1"), (S, "c:1")], [(S, "")], False),
        ([(S, "a:1"), (E, "b:1"), (R, "c:1")], [(S, ""), (R, "")], False),
        ([(S, "a:1"), (E, "b:1")], [(E, ""), (S, "c:1")], True),
        ([(S, "a:1"), (E, "b:1")], [(R, "c:1"), (E, "")], True),
        ([(S, "a:1"), (E, "b:1")], [(E, ""), (E, "c:1")], True),
        ([(S, "a:1"), (E, "b:1")], [(S, "c:1"), (S, "a:1")], True),
        ([(S, "a:1"), (E, "b:1")], [(S, "c:1"), (S, "")], False),
        ([(S, "a:1"), (E, "")], [(E, "b:1")], True),
    ],
)
def test_endpoint_that_was_named_since_is_news_and_one_that_is_left_is_none(
    before: list[tuple[EndpointSource, str]], since: list[tuple[EndpointSource, str]], is_news: bool
) -> None:
    was = Candidates()
    for source, value in before:
        was = was.offer(source, value)
    candidates = was
    for source, value in since:
        candidates = candidates.offer(source, value)
    assert candidates.is_news_since(was) is is_news


def test_state_pull_with_an_old_endpoint_does_not_undo_a_newer_one() -> None:
    pulled = full_state(peer(2, endpoint="192.0.2.1:51820"))
    desired = fold(replace_state(Desired(), pulled), EndpointOffered("n_2", "192.0.2.2:51820", E))
    assert replace_state(desired, pulled) is desired
    assert desired.candidates["n_2"].current == "192.0.2.2:51820"


def test_endpoint_event_leaves_everything_else_of_the_peer() -> None:
    before = desired_of(peer(2, "172.16.0.0/24", psk=SECRET))
    after = fold(before, EndpointOffered("n_2", "192.0.2.2:51820", E))
    assert after.peers == before.peers


def test_endpoint_of_an_unknown_peer_is_skipped_in_a_report_and_needs_a_pull_in_an_event() -> None:
    desired = desired_of(peer(2))
    assert fold(desired, EndpointOffered("n_9", "192.0.2.2:51820", R)) is desired
    with pytest.raises(Unfoldable):
        fold(desired, EndpointOffered("n_9", "192.0.2.2:51820", E))


def test_empty_endpoint_in_a_report_is_skipped() -> None:
    desired = fold(desired_of(peer(2)), EndpointOffered("n_2", "192.0.2.2:51820", R))
    assert fold(desired, EndpointOffered("n_2", "", R)) is desired


def test_candidates_of_other_sources_survive_a_pull_and_go_with_the_peer() -> None:
    desired = fold(desired_of(peer(2), peer(3)), EndpointOffered("n_2", "192.0.2.2:51820", E))
    desired = replace_state(desired, full_state(peer(2)))
    assert desired.candidates["n_2"].current == "192.0.2.2:51820"
    assert list(desired.candidates) == ["n_2"]


# state pulls


def test_pull_without_a_statement_leaves_the_category() -> None:
    policy = Policy("p", (PolicyRule("*", "*", 0, "", "allow"),))
    desired = replace_state(desired_of(peer(2)), full_state(peer(2), policies=(policy,), signing_keys=SigningKeys(OLD)))
    silent = FullState(None, (), None, None, {}, {}, {}, {})
    assert replace_state(desired, silent) is desired


def test_pull_with_an_empty_list_empties_the_category() -> None:
    desired = replace_state(desired_of(peer(2)), full_state())
    assert not desired.peers
    assert not desired.candidates


def test_order_of_peers_is_a_difference() -> None:
    desired = desired_of(peer(2), peer(3))
    assert list(replace_state(desired, full_state(peer(3), peer(2))).peers) == ["n_3", "n_2"]


def test_rule_content_under_the_same_policy_id_is_a_difference() -> None:
    rule = PolicyRule("*", "*", 0, "", "allow")
    desired = replace_state(Desired(), full_state(policies=(Policy("p", (rule,)),)))
    changed = (Policy("p", (rule._replace(port=443),)),)
    assert replace_state(desired, full_state(policies=changed)).policies == changed


def test_pull_may_take_data_back_to_a_lower_version() -> None:
    desired = replace_state(Desired(), full_state(data=(entry("k", 5),)))
    assert replace_state(desired, full_state(data=(entry("k", 4),))).data["k"].version == 4


# node state and signing keys


def test_event_never_takes_a_data_entry_back() -> None:
    desired = replace_state(Desired(), full_state(data=(entry("k", 5), entry("gone", 1))))
    after = fold(desired, NodeStateUpdated(None, {"k": entry("k", 4), "new": entry("new", 1)}))
    assert {key: value.version for key, value in after.data.items()} == {"k": 5, "new": 1}


def test_category_without_a_statement_stays() -> None:
    desired = fold(Desired(), NodeStateUpdated({"zone": "a"}, {"k": entry("k", 1)}))
    assert fold(desired, NodeStateUpdated(None, None)) is desired
    assert fold(desired, NodeStateUpdated({}, None)).data == desired.data


def test_replaced_signing_key_becomes_the_previous_one_for_its_time() -> None:
    desired = fold(Desired(signing_keys=SigningKeys(OLD)), SigningKeyReplaced(NEW, 100.0))
    assert desired.signing_keys == SigningKeys(NEW, OLD, 100.0)
    assert expire_signing_key(desired, 99.9) is desired
    assert expire_signing_key(desired, 100.0).signing_keys == SigningKeys(NEW)


def test_first_signing_key_has_no_previous_one() -> None:
    assert fold(Desired(), SigningKeyReplaced(NEW, 100.0)).signing_keys == SigningKeys(NEW)


@pytest.mark.parametrize("keys", [None, SigningKeys(OLD)])
def test_nothing_expires_without_a_previous_key(keys: SigningKeys | None) -> None:
    desired = Desired(signing_keys=keys)
    assert expire_signing_key(desired, 1e12) is desired


# values are never changed in place


@pytest.mark.parametrize(
    "change",
    [
        lambda desired: fold(desired, PeerRemoved("n_2")),
        lambda desired: fold(desired, PeerAdded(peer(2, "172.16.0.0/24"))),
        lambda desired: replace_state(desired, full_state()),
    ],
)
def test_older_snapshot_stays_as_it_was(change: Callable[[Desired], Desired]) -> None:
    desired = desired_of(peer(2), peer(3))
    change(desired)
    assert desired == desired_of(peer(2), peer(3))
