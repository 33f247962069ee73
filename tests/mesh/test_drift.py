"""Corrections say what was repaired, by name and number, and never a secret."""

from __future__ import annotations

import asyncio
import base64

import pytest
from hypothesis import given

from plexd.mesh.address import Prefix
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
    SetAlias,
    SetDevice,
    SetMtu,
    SetUp,
    Subject,
)
from plexd.mesh.desired import DataEntry, Desired, Policy, PolicyRule, Rejection, SigningKeys
from plexd.mesh.drift import pass_corrections, snapshot_corrections
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PublicKey
from plexd.mesh.observed import Route
from plexd.mesh.plan import plan
from plexd.mesh.target import Target
from tests.fakes import FakeKernel
from tests.mesh.worlds import KEYS, NOW, OWN_KEY, PSKS, bring_up, kernels, peer, target_of, targets

NET = Prefix.parse("10.100.3.0/24")


def put(*fields: str, is_new: bool = False) -> PutPeer:
    return PutPeer("n_42", KEYS[0], is_new, None, None, None, None, fields)


SUBJECT = Subject("plexd0", "inet plexd")


def corrections(*changes: Change) -> list[tuple[str, str]]:
    return [(c.type, c.detail) for c in pass_corrections(SUBJECT, [Outcome(change) for change in changes], {})]


@pytest.mark.parametrize(
    ("change", "correction"),
    [
        (put("added", is_new=True), ("peer_added", "peer n_42")),
        (put("endpoint"), ("peer_updated", "peer n_42: endpoint")),
        (put("allowed_ips", "psk"), ("peer_updated", "peer n_42: allowed_ips, psk")),
        (RemovePeer("n_42", KEYS[0]), ("peer_removed", "peer n_42")),
        (RemovePeer(None, KEYS[0]), ("peer_removed", "peer key AQEBAQEB")),
        (AddRoute(Route(NET, None, 2048)), ("route_added", "10.100.3.0/24")),
        (RemoveRoute(Route(NET, None, 2048)), ("route_removed", "10.100.3.0/24")),
        (SetAlias(), ("interface_repaired", "plexd0: alias")),
        (SetDevice(OWN_KEY, 51820, ("key", "port")), ("interface_repaired", "plexd0: key, port")),
        (AddAddress(NET), ("interface_repaired", "plexd0: address")),
        (RemoveAddress(NET), ("interface_repaired", "plexd0: address")),
        (SetMtu(1420), ("interface_repaired", "plexd0: mtu")),
        (SetUp(), ("interface_repaired", "plexd0: up")),
        (DeleteLink("test"), ("interface_repaired", "plexd0: link")),
    ],
)
def test_each_change_has_its_name(change: Change, correction: tuple[str, str]) -> None:
    assert corrections(change) == [correction]


def test_repairs_of_the_interface_are_one_correction() -> None:
    assert corrections(SetUp(), AddAddress(NET), RemoveAddress(NET), put("psk")) == [
        ("interface_repaired", "plexd0: up, address"),
        ("peer_updated", "peer n_42: psk"),
    ]


def test_recreated_link_is_one_correction_with_counts() -> None:
    target = target_of(peer(2, "172.16.0.0/24"), peer(3))
    kernel = bring_up(target)
    kernel.delete_link()
    outcomes = asyncio.run(kernel.apply(plan(target, kernel.state, NOW)))
    assert pass_corrections(SUBJECT, outcomes, {}) == (("interface_repaired", "plexd0: link, 2 peers, 3 routes"),)


def test_failed_changes_are_not_listed() -> None:
    assert pass_corrections(SUBJECT, [Outcome(put("psk"), "refused"), Outcome(SetUp(), "refused")], {}) == ()


def test_link_that_could_not_be_made_is_no_repair() -> None:
    kernel = FakeKernel()
    kernel.refuse = lambda change: "not permitted" if isinstance(change, CreateLink) else None
    outcomes = asyncio.run(kernel.apply(plan(target_of(peer(2)), kernel.state, NOW)))
    assert pass_corrections(SUBJECT, outcomes, {}) == ()


@given(targets(), kernels())
def test_no_correction_and_no_change_shows_a_secret(target: Target, kernel: FakeKernel) -> None:
    changes = plan(target, kernel.state, NOW)
    outcomes = asyncio.run(kernel.apply(changes))
    said = f"{pass_corrections(SUBJECT, outcomes, {})} {changes} {outcomes} {target} {kernel}"
    for secret in (target.settings.private_key, *PSKS[1:]):
        assert base64.b64encode(secret).decode() not in said
        assert secret.hex() not in said
        assert repr(bytes(secret))[2:-1] not in said


# what a state pull changed

RULE = PolicyRule("*", "*", 0, "", "allow")


def entry(key: str, version: int) -> DataEntry:
    return DataEntry(key, "text/plain", '"hunter2"', version, "")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Desired(), Desired(), []),
        (
            Desired(),
            Desired(signing_keys=SigningKeys(bytes(32))),
            [("signing_keys_updated", "signing keys rotated")],
        ),
        (
            Desired(policies=(Policy("b", ()), Policy("a", ()), Policy("kept", (RULE,)))),
            Desired(policies=(Policy("kept", (RULE._replace(port=1),)), Policy("new", ()))),
            [
                ("policy_removed", "policy b"),
                ("policy_removed", "policy a"),
                ("policy_updated", "policy kept"),
                ("policy_added", "policy new"),
            ],
        ),
        (
            Desired(metadata={"a": "1", "b": "1"}),
            Desired(metadata={"a": "2", "c": "1"}),
            [("metadata_updated", "metadata updated: 3 entries")],
        ),
        (
            Desired(data={"a": entry("a", 1), "b": entry("b", 1)}),
            Desired(data={"a": entry("a", 2), "b": entry("b", 1)}),
            [("data_updated", "data updated: 1 entries")],
        ),
        (
            Desired(secret_refs={"db": 1}),
            Desired(secret_refs={"db": 2}),
            [("secret_refs_updated", "secret refs updated: 1 entries")],
        ),
        (
            Desired(rejected=(Rejection("n_8", "bad public key"),)),
            Desired(rejected=(Rejection("n_8", "bad public key"), Rejection("n_9", "bad public key"))),
            [("peer_rejected", "peer n_9: bad public key")],
        ),
        (
            Desired(rejected=(Rejection("n_8", "bad public key"),)),
            Desired(rejected=(Rejection("n_8", "bad preshared key"),)),
            [("peer_rejected", "peer n_8: bad preshared key")],
        ),
    ],
    ids=["nothing", "signing keys", "policies", "metadata", "data", "secrets", "rejected", "rejected otherwise"],
)
def test_pull_is_reported_by_category(before: Desired, after: Desired, expected: list[tuple[str, str]]) -> None:
    assert [tuple(correction) for correction in snapshot_corrections(before, after)] == expected
    assert "hunter2" not in str(snapshot_corrections(before, after))


def test_clearing_a_preshared_key_is_reported_as_a_change_of_it() -> None:
    kernel = bring_up(target_of(peer(2, psk=PresharedKey(bytes([0xA1] * 32)))))
    (change,) = plan(target_of(peer(2, psk=NO_PRESHARED_KEY)), kernel.state, NOW)
    assert corrections(change) == [("peer_updated", "peer n_2: psk")]


def test_withdrawn_peer_is_named_by_its_id_and_a_stranger_by_its_key() -> None:
    withdrawn, stranger = RemovePeer(None, PublicKey(bytes([7] * 32))), RemovePeer(None, PublicKey(bytes([8] * 32)))
    outcomes = [Outcome(withdrawn), Outcome(stranger)]
    assert pass_corrections(SUBJECT, outcomes, {withdrawn.public_key: "n_7"}) == (
        ("peer_removed", "peer n_7"),
        ("peer_removed", f"peer key {stranger.public_key.short}"),
    )
