"""What a rule means here, and what bad input costs: in an allow rule the rule, in a deny rule everything."""

from __future__ import annotations

import pytest
from hypothesis import given

from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Policy, PolicyRule
from plexd.mesh.policy import Action, Local, Protocol, Resolved, Side, deciding, resolve
from tests.mesh import policies as mesh
from tests.mesh.policies import LOCAL, LOCAL_IPV6, PEERS, world_of


def one(src: str, dst: str, port: int = 0, protocol: str = "", action: str = "allow", local: Local = LOCAL) -> Resolved:
    return resolve([Policy("pol", (PolicyRule(src, dst, port, protocol, action),))], local, PEERS)


def told(side: Side) -> str:
    return "any" if side.prefix is None else str(side.prefix)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("*", "any"),
        ("n_a", "10.100.1.1/32"),
        ("n_c", "10.100.1.3/32"),
        ("10.100.1.9", "10.100.1.9/32"),
        ("10.100.1.9/24", "10.100.1.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_side_is_anything_a_prefix_or_the_address_of_a_node(text: str, meant: str) -> None:
    resolved = one(text, "n_a")
    assert [told(rule.src) for rule in resolved.rules] == [meant]
    assert (resolved.faults, resolved.idle) == ((), ())


def test_ipv6_sides() -> None:
    (rule,) = one("n_e", "FD00:100::1:0/96", local=LOCAL_IPV6).rules
    assert (told(rule.src), told(rule.dst)) == ("fd00:100::5/128", "fd00:100::/96")


@pytest.mark.parametrize("text", ["n_unknown", "n_f", "10.100.1.300", "1.2.3", "fe80::1%eth0", "N_B", " n_b"])
@pytest.mark.parametrize("action", ["allow", "deny"])
def test_node_without_a_known_address_matches_nothing(text: str, action: str) -> None:
    for src, dst in ((text, "n_a"), ("n_a", text)):
        resolved = one(src, dst, action=action)
        assert (resolved.rules, resolved.faults) == ((), ())
        assert [remark.number for remark in resolved.idle] == [0]


def test_sides_of_different_families_match_nothing() -> None:
    assert one("n_a", "fd00::/8").rules == one("fd00::/8", "n_a", action="deny").rules == ()


@pytest.mark.parametrize(
    ("text", "protocol"),
    [
        ("", Protocol.ANY), ("any", Protocol.ANY), ("All", Protocol.ANY), ("*", Protocol.ANY),
        ("tcp", Protocol.TCP), ("UDP", Protocol.UDP), ("Icmp", Protocol.ICMP),
    ],
)  # fmt: skip
def test_protocol_by_any_of_its_names(text: str, protocol: Protocol) -> None:
    assert [rule.protocol for rule in one("*", "n_a", protocol=text).rules] == [protocol]


@pytest.mark.parametrize("text", ["allow", "ALLOW", "Allow"])
def test_action_in_any_case(text: str) -> None:
    assert [rule.action for rule in one("*", "n_a", action=text).rules] == [Action.ALLOW]


@pytest.mark.parametrize(
    ("src", "dst", "port", "protocol", "reason", "widened"),
    [
        ("", "n_a", 22, "tcp", "bad src", ("any", "10.100.1.1/32", 22, "tcp")),
        ("10.0.0.0/33", "n_a", 22, "tcp", "bad src", ("any", "10.100.1.1/32", 22, "tcp")),
        ("n_b/32", "n_a", 22, "tcp", "bad src", ("any", "10.100.1.1/32", 22, "tcp")),
        ("n_a", "", 22, "tcp", "bad dst", ("10.100.1.1/32", "any", 22, "tcp")),
        ("n_a", "fd00::/129", 22, "tcp", "bad dst", ("10.100.1.1/32", "any", 22, "tcp")),
        ("n_b", "n_a", -1, "tcp", "bad port", ("10.100.1.2/32", "10.100.1.1/32", 0, "tcp")),
        ("n_b", "n_a", 65536, "", "bad port", ("10.100.1.2/32", "10.100.1.1/32", 0, "any")),
        ("n_b", "n_a", 22, "icmp", "bad port", ("10.100.1.2/32", "10.100.1.1/32", 0, "icmp")),
        ("n_b", "n_a", 0, "sctp", "bad protocol", ("10.100.1.2/32", "10.100.1.1/32", 0, "any")),
        ("n_b", "n_a", 22, "tcp ", "bad protocol", ("10.100.1.2/32", "10.100.1.1/32", 22, "any")),
        ("", "x/y", 70000, "?", "bad src, bad dst, bad protocol, bad port", ("any", "any", 0, "any")),
    ],
)
def test_fault_costs_an_allow_rule_and_widens_a_deny_rule(
    src: str, dst: str, port: int, protocol: str, reason: str, widened: tuple[str, str, int, str]
) -> None:
    allowed = one(src, dst, port, protocol, "allow")
    assert allowed.rules == ()
    assert [str(fault) for fault in allowed.faults] == [f"policy pol rule 0: {reason}"]
    denied = one(src, dst, port, protocol, "deny")
    assert [(told(r.src), told(r.dst), r.port, str(r.protocol), r.action) for r in denied.rules] == [
        (*widened, Action.DENY)
    ]
    assert [str(fault) for fault in denied.faults] == [f"policy pol rule 0: {reason}"]


@pytest.mark.parametrize("action", ["", "permit", "allow ", "\uff41llow"])
def test_unknown_action_denies(action: str) -> None:
    resolved = one("n_b", "n_a", action=action)
    assert [rule.action for rule in resolved.rules] == [Action.DENY]
    assert [fault.reason for fault in resolved.faults] == ["bad action"]


def test_rule_between_others_is_left_out_and_order_and_number_stay() -> None:
    policies = [
        Policy("p", (PolicyRule("n_b", "n_c", 0, "", "allow"), PolicyRule("*", "10.100.1.0/24", 0, "", "deny"))),
        Policy("q", (PolicyRule("n_a", "n_b", 0, "", "allow"),)),
    ]
    assert [(rule.policy_id, rule.number) for rule in resolve(policies, LOCAL, PEERS).rules] == [("p", 1), ("q", 0)]


def test_rule_about_a_network_behind_us_is_ours() -> None:
    bridge = Local("n_a", LOCAL.mesh_ip, (Prefix.parse("192.0.2.0/24"),))
    assert one("n_b", "192.0.2.7").rules == ()
    assert len(one("n_b", "192.0.2.7", local=bridge).rules) == 1


@given(mesh.all_policies, mesh.locals_)
def test_rules_mean_what_the_reference_says(policies: tuple[Policy, ...], local: Local) -> None:
    meanings = [
        meaning
        for meaning in world_of(policies, local).rules
        if not meaning.matches_nothing()
        and (meaning.touches(meaning.src, meaning.world.own) or meaning.touches(meaning.dst, meaning.world.own))
    ]
    expected = [
        (
            str(meaning.network(meaning.src) or "any"),
            str(meaning.network(meaning.dst) or "any"),
            meaning.protocol or "any",
            meaning.port,
            meaning.action,
        )
        for meaning in meanings
    ]
    resolved = resolve(policies, local, PEERS).rules
    assert [(told(r.src), told(r.dst), str(r.protocol), r.port, str(r.action)) for r in resolved] == expected


HERE, B, E = ("n_a", parse_ip("10.100.1.1")), ("n_b", parse_ip("10.100.1.2")), ("n_e", parse_ip("fd00:100::5"))


@pytest.mark.parametrize(
    ("src", "dst", "numbers"),
    [(B, HERE, [0, 2, 4]), (HERE, B, [3]), (E, HERE, [4]), (HERE, E, [])],
    ids=["in by name and prefix", "out", "another family", "out to another family"],
)
def test_rules_that_decide_about_a_pair_end_with_the_first_about_everything(
    src: tuple[str, bytes], dst: tuple[str, bytes], numbers: list[int]
) -> None:
    rules = (
        PolicyRule("n_b", "n_a", 443, "tcp", "allow"),
        PolicyRule("n_c", "n_a", 0, "", "allow"),
        PolicyRule("10.100.0.0/16", "n_a", 0, "icmp", "allow"),
        PolicyRule("10.100.1.1", "10.100.1.2", 0, "", "deny"),
        PolicyRule("*", "n_a", 0, "", "deny"),
        PolicyRule("*", "n_a", 0, "", "allow"),
        PolicyRule("n_a", "n_b", 0, "", "allow"),
    )
    resolved = resolve((Policy("p", rules),), LOCAL, PEERS)
    assert [rule.number for rule in deciding(resolved.rules, src, dst)] == numbers
