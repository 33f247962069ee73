"""Policies laid over a target: who is left, what the firewall is, and that saved work changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plexd.mesh import admission, firewall
from plexd.mesh.address import parse_ip
from plexd.mesh.admission import Admitted, amend, judge
from plexd.mesh.amend import rebuild
from plexd.mesh.desired import Desired, EndpointSource, Peer, Policy, PolicyRule
from plexd.mesh.events import EndpointOffered
from plexd.mesh.fold import fold
from plexd.mesh.policy import Action, Protocol
from plexd.mesh.target import Settings, Sources, Target, build_target
from plexd.mesh.temporary_allows import TemporaryAllow, TemporaryAllows
from tests.mesh.worlds import OWN_IP, RESOLVED, desired_of, peer, settings_for

ENFORCED = firewall.Settings(OWN_IP, ("plexd0",))


def rule(src: str, dst: str, action: str = "allow", port: int = 0, protocol: str = "") -> PolicyRule:
    return PolicyRule(src, dst, port, protocol, action)


def policies(*rules: PolicyRule) -> tuple[Policy, ...]:
    return (Policy("p", rules),)


def world(*rules: PolicyRule, settings: firewall.Settings | None = ENFORCED) -> tuple[Desired, Settings]:
    desired = desired_of(peer(2), peer(3, "172.16.0.0/24"), peer(4))
    return replace(desired, policies=policies(*rules)), replace(settings_for(), policy=settings)


def everybody(desired: Desired, settings: Settings) -> Target:
    return build_target(desired, settings, RESOLVED)


def admit(before: Admitted | None, everybody: Target, desired: Desired, temporary_allows: TemporaryAllows) -> Admitted:
    amended = amend(before, everybody, desired, temporary_allows)
    return amended if amended is not None else judge(everybody, desired, temporary_allows)


def laid_over(desired: Desired, settings: Settings, before: Admitted | None = None) -> Admitted:
    return admit(before, everybody(desired, settings), desired, TemporaryAllows())


def test_without_policies_nobody_is_visible_and_the_baseline_is_wanted() -> None:
    desired, settings = world()
    admitted = laid_over(desired, settings)
    assert not admitted.target.peers
    assert not admitted.target.routes
    assert admitted.target.firewall == firewall.ruleset(ENFORCED)


def test_peer_that_a_rule_names_comes_with_its_routes_and_the_others_stay_out() -> None:
    desired, settings = world(rule("n_self", "n_3"))
    target = laid_over(desired, settings).target
    assert set(target.peers) == {"n_3"}
    assert {str(route.prefix) for route in target.routes} == {"10.100.0.3/32", "172.16.0.0/24"}


def test_policy_that_is_not_enforced_admits_everybody_and_wants_no_firewall() -> None:
    desired, settings = world(settings=None)
    admitted = laid_over(desired, settings)
    assert admitted.target is admitted.everybody
    assert admitted.target.firewall is None


def test_rules_that_are_too_many_are_the_fault_of_the_ruleset() -> None:
    many = [rule("n_self", "n_3", port=1 + number % 60000, protocol="tcp") for number in range(40000)]
    desired, settings = world(*many)
    ruleset = laid_over(desired, settings).target.firewall
    assert ruleset is not None
    assert "more than 32768" in ruleset.fault
    assert not ruleset.frame
    assert not ruleset.sets


def test_opening_is_part_of_the_firewall_and_makes_nobody_visible() -> None:
    desired, settings = world()
    temporary_allows = TemporaryAllows().open(TemporaryAllow("session", Protocol.TCP, 42000, OWN_IP))
    before = laid_over(desired, settings)
    after = admit(before, before.everybody, desired, temporary_allows)
    assert before.target.firewall is not None
    assert after.target.firewall is not None
    assert after.target.firewall.digest != before.target.firewall.digest
    assert "42000" in str(after.target.firewall.document())
    assert not after.target.peers


def test_route_of_an_untouched_peer_goes_and_comes_with_an_endpoint_in_its_prefix() -> None:
    """While somebody is hidden, whose routes must not come along."""
    rules = policies(rule("n_self", "n_2"), rule("n_self", "n_3"))
    first = desired_of(peer(2, "192.0.2.0/24"), peer(3, endpoint="198.51.100.1:51820"), peer(4))
    desired = replace(first, policies=rules)
    own = replace(settings_for(), policy=ENFORCED)
    admitted = laid_over(desired, own)
    built = rebuild(None, Sources(desired, own, RESOLVED, {}))
    for endpoint, is_routed in (("192.0.2.77:51820", False), ("198.51.100.1:51820", True)):
        desired = fold(desired, EndpointOffered("n_3", endpoint, EndpointSource.EVENT))
        built = rebuild(built, Sources(desired, own, RESOLVED, {}))
        admitted = admit(admitted, built.target, desired, admitted.temporary_allows)
        assert ("192.0.2.0/24" in {str(route.prefix) for route in admitted.target.routes}) is is_routed
        assert set(admitted.target.peers) == {"n_2", "n_3"}


def test_what_did_not_change_is_the_very_same() -> None:
    desired, settings = world(rule("*", "*"))
    first = laid_over(desired, settings)
    assert admit(first, first.everybody, desired, first.temporary_allows) is first


sides = st.sampled_from(("*", "n_self", "n_2", "n_3", "n_9", "10.100.0.0/16", "172.16.0.0/16", "10.100.0.4", "bad/"))
rules = st.builds(
    PolicyRule,
    sides,
    sides,
    st.sampled_from((0, 443)),
    st.sampled_from(("", "tcp", "icmp")),
    st.sampled_from(("allow", "deny")),
)
peers = st.builds(
    lambda number, prefixes, endpoint: peer(number, *prefixes, endpoint=endpoint),
    st.integers(2, 4),
    st.lists(st.sampled_from(("172.16.0.0/24", "10.100.0.4", "192.0.2.0/24")), max_size=2, unique=True),
    st.sampled_from(("", "192.0.2.1:51820", "198.51.100.1:1")),
)
snapshots = st.builds(
    lambda several, written: replace(desired_of(*{p.id: p for p in several}.values()), policies=policies(*written)),
    st.lists(peers, max_size=3),
    st.lists(rules, max_size=3),
)
enforcement = st.sampled_from((None, ENFORCED, replace(ENFORCED, default=Action.ALLOW)))


@given(st.lists(st.tuples(snapshots, enforcement), min_size=1, max_size=4))
def test_one_after_the_other_is_the_same_as_each_from_scratch(steps: list[tuple[Desired, firewall.Settings]]) -> None:
    before: Admitted | None = None
    for desired, enforced in steps:
        settings = replace(settings_for(), policy=enforced)
        before = laid_over(desired, settings, before)
        assert before == laid_over(desired, settings)


unruly = st.builds(
    lambda number, address, prefixes, endpoint: peer(number, *prefixes, endpoint=endpoint)._replace(
        mesh_ip=parse_ip(address) if address else b""
    ),
    st.integers(2, 6),
    st.sampled_from(("10.100.0.2", "10.100.0.3", "10.100.0.3", "fd00::3", "")),
    st.lists(st.sampled_from(("172.16.0.0/24", "10.100.0.4", "192.0.2.0/24")), max_size=2, unique=True),
    st.sampled_from(("", "192.0.2.1:51820", "198.51.100.1:1")),
)


@settings(max_examples=300)
@given(
    st.lists(rules, max_size=5),
    enforcement,
    st.booleans(),
    st.lists(st.lists(unruly, max_size=4), min_size=2, max_size=5),
)
def test_peers_that_come_and_go_under_the_same_policies_are_judged_as_if_all_were_judged_again(
    written: list[PolicyRule], enforced: firewall.Settings | None, ping: bool, steps: list[list[Peer]]
) -> None:
    asked = policies(*written)
    settings_ = replace(settings_for(), policy=enforced and replace(enforced, allow_ping=ping))
    before: Admitted | None = None
    for several in steps:
        desired = replace(desired_of(*{p.id: p for p in several}.values()), policies=asked)
        before = laid_over(desired, settings_, before)
        assert before == laid_over(desired, settings_)


def test_peer_that_comes_costs_no_judgement_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    desired, settings_ = world(rule("*", "*"))
    before = laid_over(desired, settings_)
    monkeypatch.setattr(admission, "judge", None)
    joined = replace(desired, peers={**desired.peers, "n_5": peer(5)})
    after = laid_over(joined, settings_, before)
    assert set(after.target.peers) == {"n_2", "n_3", "n_4", "n_5"}
    assert laid_over(desired, settings_, after) == before
