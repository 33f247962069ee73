"""The filter table decides as the contract says, whatever the rules, and however they are put together."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plexd.errors import TooManyTemporaryAllows
from plexd.mesh import firewall
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Policy, PolicyRule
from plexd.mesh.firewall import ruleset
from plexd.mesh.policy import ANYWHERE, Action, Local, Protocol, Rule, Side, resolve
from plexd.mesh.rulegroups import Line, Match, group
from plexd.mesh.table_reading import Hits, fingerprint, hits
from plexd.mesh.temporary_allows import TemporaryAllow, TemporaryAllows
from plexd.mesh.visibility import Visibility
from tests.mesh import policies as mesh
from tests.mesh.nft_interpreter import Table, ports_are_guarded
from tests.mesh.packets import ICMP, ICMPV6, MANAGED, TCP, UDP, Packet, packets
from tests.mesh.policies import LOCAL, PEERS, other_prefixes, world_of
from tests.mesh.policy_reference import Filter
from tests.mesh.rendering import render

SETTINGS = firewall.Settings(LOCAL.mesh_ip, ("plexd0",))


def rule(src: str = "*", dst: str = "*", port: int = 0, protocol: str = "", action: str = "allow") -> PolicyRule:
    return PolicyRule(src, dst, port, protocol, action)


def rules_of(*rules: PolicyRule, policy_id: str = "pol") -> tuple[Rule, ...]:
    return resolve([Policy(policy_id, rules)], LOCAL, PEERS).rules


def mesh_rules(document: dict[str, Any]) -> list[dict[str, Any]]:
    added = (command["add"].get("rule", {}) for command in document["nftables"] if "add" in command)
    return [item for item in added if item.get("chain") == "mesh"]


def sets(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [command["add"]["set"] for command in document["nftables"] if "set" in command.get("add", {})]


# the compiled rules against the reference

openings_of_many_kinds = st.dictionaries(
    st.sampled_from(("ssh", "http")),
    st.tuples(
        st.sampled_from((Protocol.TCP, Protocol.UDP)),
        st.sampled_from((22, 8080)),
        st.lists(st.sampled_from(("10.100.1.2", "198.51.100.1")), max_size=2, unique=True),
    ),
    max_size=2,
)


@settings(max_examples=400)
@given(
    policies=mesh.all_policies,
    local=mesh.locals_,
    default=mesh.defaults,
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    opened=openings_of_many_kinds,
    few=st.sampled_from((1, 3)),
    traffic=st.lists(packets(), min_size=1, max_size=40),
)
def test_table_decides_as_the_reference_does(
    policies: tuple[Policy, ...],
    local: Local,
    default: str,
    switches: tuple[bool, bool, bool],
    opened: dict[str, tuple[Protocol, int, list[str]]],
    few: int,
    traffic: list[Packet],
) -> None:
    ping, guard, log = switches
    resolved = resolve(policies, local, PEERS)
    visible = Visibility(resolved.rules, local, Action(default)).among({p.id: p.allowed_ips for p in PEERS.values()})
    temporary_allows = TemporaryAllows()
    for name, (protocol, port, sources) in opened.items():
        temporary_allows = temporary_allows.open(
            TemporaryAllow(name, protocol, port, local.mesh_ip, tuple(map(parse_ip, sources)))
        )
    settings_ = firewall.Settings(local.mesh_ip, MANAGED, Action(default), ping, guard, log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firewall, "FEW", few)  # 1: whatever can becomes elements
        document = render(
            settings_,
            resolved.rules,
            visible=(PEERS[each].mesh_ip for each in visible),
            prefixes=other_prefixes(visible),
            temporary_allows=temporary_allows,
        )
    assert all(ports_are_guarded(document))
    table = Table(document)
    numbers = {Protocol.TCP: TCP, Protocol.UDP: UDP}
    reference = Filter(
        MANAGED,
        ping,
        guard,
        tuple(
            (numbers[protocol], port, ip_address(local.mesh_ip), frozenset(map(ip_address, sources)) or None)
            for protocol, port, sources in opened.values()
        ),
    )
    world = world_of(policies, local, default)
    for packet in traffic:
        assert table.judge(packet) == reference.decide(world, packet), packet


@given(mesh.all_policies, st.sampled_from((1, 3)), st.lists(packets(), min_size=1, max_size=20))
def test_verdict_is_counted_at_one_rule_that_makes_it(
    policies: tuple[Policy, ...], few: int, traffic: list[Packet]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firewall, "FEW", few)
        document = render(
            firewall.Settings(LOCAL.mesh_ip, MANAGED, allow_ping=False), resolve(policies, LOCAL, PEERS).rules
        )
    world, table = world_of(policies), Table(document)
    meanings = {f"{policy_id}#{number}": rule for rule in world.rules for policy_id, number in (rule.origin,)}
    for packet in traffic:
        table.judge(packet)
        first = Filter(MANAGED, allow_ping=False).judge(world, packet)[1]
        if first is None:
            assert table.reached == []
            continue
        (counted,) = table.reached  # not always the first: one that judges alike may have been put before it
        assert meanings[counted].matches(packet)
        assert meanings[counted].action == first.action


# lines to groups

LENGTHS = (None, 8, 24, 32)
matches = st.builds(
    lambda src, dst, l4proto, port: Match.of(src, dst, l4proto, port if l4proto in {TCP, UDP} else 0),
    *(
        st.builds(
            lambda length, number: None if length is None else Prefix.of(bytes([10, number >> 1, 0, number]), length),
            st.sampled_from(LENGTHS),
            st.integers(0, 3),
        )
        for _ in range(2)
    ),
    st.sampled_from((None, TCP, UDP, 1)),
    st.sampled_from((0, 22, 80)),
)


def judge_lines(lines: list[Line], probe: Match) -> str | None:
    """By the first line that matches a packet, here a match of host prefixes."""
    for line in lines:
        for match in line.matches:
            sides = ((match.src, probe.src), (match.dst, probe.dst))
            if (
                all(held is None or (asked is not None and held.covers(asked)) for held, asked in sides)
                and match.l4proto in {None, probe.l4proto}
                and match.port in {0, probe.port}
            ):
                return line.comment
    return None


probes = st.builds(
    lambda src, dst, l4proto, port: Match.of(
        Prefix.host(bytes([10, src >> 1, 0, src])), Prefix.host(bytes([10, dst >> 1, 0, dst])), l4proto, port
    ),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from((TCP, UDP)),
    st.sampled_from((22, 80)),
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(matches, st.sampled_from(Action)), min_size=8, max_size=30),
    st.lists(probes, min_size=10, max_size=10),
)
def test_groups_one_after_the_other_judge_as_the_lines_do(
    drawn: list[tuple[Match, Action]], asked: list[Match]
) -> None:
    lines = [Line((match,), action, str(number)) for number, (match, action) in enumerate(drawn)]
    actions = {line.comment: line.action for line in lines} | {None: None}
    grouped = group(lines)
    moved = [line for each in grouped for line in each.lines]
    for probe in asked:
        assert actions[judge_lines(moved, probe)] == actions[judge_lines(lines, probe)]
    for each in grouped:
        held = [match for line in each.lines for match in line.matches]
        assert len(held) == len(set(held))
        for probe in asked:  # no two of a group match the same packet
            assert len([line for line in each.lines if judge_lines([line], probe) is not None]) <= 1


def test_rules_of_one_shape_become_one_lookup_past_others_that_judge_alike() -> None:
    each = [
        rule
        for number in range(100)
        for rule in (
            PolicyRule(f"10.1.0.{number}", "n_a", 443, "tcp", "allow"),
            PolicyRule(f"10.2.{number}.0/24", "n_a", 0, "", "allow"),
        )
    ]
    document = render(SETTINGS, rules_of(*each))
    assert [len(each["elem"]) for each in sets(document)] == [100, 100]


def test_rules_move_past_others_that_judge_otherwise_but_match_none_of_their_packets() -> None:
    each = [
        rule
        for number in range(2, 102)
        for rule in (
            PolicyRule(f"10.1.0.{number}", "n_a", 22, "tcp", "deny"),
            PolicyRule(f"10.1.0.{number}", "n_a", 0, "", "allow"),
        )
    ]
    document = render(SETTINGS, rules_of(*each))
    assert [len(each["elem"]) for each in sets(document)] == [100, 100]


def test_rule_stays_behind_one_that_judges_some_of_its_packets_otherwise() -> None:
    each = [
        *(PolicyRule(f"10.1.0.{number}", "n_a", 22, "tcp", "allow") for number in range(5)),
        PolicyRule("10.1.0.0/24", "n_a", 0, "", "deny"),
        *(PolicyRule(f"10.1.0.{number}", "n_a", 22, "tcp", "allow") for number in range(5, 10)),
    ]
    document = render(SETTINGS, rules_of(*each))
    assert [len(each["elem"]) for each in sets(document)] == [5, 5]
    judged = [mesh_rule["expr"][-1] for mesh_rule in mesh_rules(document)][1:-1]
    assert [next(iter(expression)) for expression in judged] == ["accept", "goto", "accept"]


def test_rule_that_was_moved_holds_up_others_where_it_went() -> None:
    each = [
        PolicyRule("10.1.0.1", "n_a", 0, "", "allow"),
        PolicyRule("10.1.0.2", "n_a", 22, "tcp", "deny"),
        PolicyRule("10.1.0.3", "n_a", 0, "", "allow"),  # goes past the one above
        PolicyRule("10.1.0.4", "n_a", 22, "tcp", "deny"),  # to the other one
        PolicyRule("10.1.0.4", "n_a", 0, "", "allow"),  # has to stay behind
    ]
    order = [mesh_rule["comment"] for mesh_rule in mesh_rules(render(SETTINGS, rules_of(*each)))[1:-1]]
    assert order == ["pol#0", "pol#2", "pol#1", "pol#3", "pol#4"]


@pytest.mark.parametrize("count", [1, 4])
def test_whole_of_a_family_is_that_family_alone(count: int) -> None:
    each = (PolicyRule("0.0.0.0/0", "*", port, "tcp", "allow") for port in range(1, count + 1))
    document = render(SETTINGS, rules_of(*each))
    judging = mesh_rules(document)[1]["expr"]
    assert judging[0] == {"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv4"}}
    assert "addr" not in repr(judging)
    assert len(sets(document)) == (count > 1)
    packet = Packet("input", "plexd0", "", ip_address("10.1.2.3"), ip_address("10.100.1.1"), TCP, 1)
    assert Table(document).judge(packet) == "accept"
    ipv6 = replace(packet, src=ip_address("fd00::1"), dst=ip_address("fd00::2"))
    assert Table(document).judge(ipv6) == "drop"


def test_few_rules_of_a_shape_are_left_to_be_read() -> None:
    document = render(SETTINGS, rules_of(*(rule(f"10.1.0.{number}", "n_a", 22, "tcp") for number in range(3))))
    assert sets(document) == []
    assert [each["comment"] for each in mesh_rules(document) if "comment" in each] == ["pol#0", "pol#1", "pol#2"]


# the table as the contract has it


def test_table_of_the_contract() -> None:
    policies = [Policy("web", (rule("10.100.1.0/24", "n_a", 443, "tcp"), rule("n_a", "n_b")))]
    rules = resolve(policies, LOCAL, PEERS).rules
    table = Table(render(SETTINGS, rules, visible=[PEERS["n_b"].mesh_ip]))
    assert list(table.chains) == ["input", "output", "forward", "mesh", "denied"]
    assert [len(rules) for rules in table.rules.values()] == [2, 1, 3, 10, 2]
    original = {"dir": "original"}
    web, back = table.rules["mesh"][7:9]
    assert web == {
        "family": "inet",
        "table": "plexd",
        "chain": "mesh",
        "comment": "web#0",
        "expr": (
            {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": 6}},
            {
                "match": {
                    "op": "==",
                    "left": {"ct": {"key": "ip saddr", **original}},
                    "right": {"prefix": {"addr": "10.100.1.0", "len": 24}},
                }
            },
            {"match": {"op": "==", "left": {"ct": {"key": "ip daddr", **original}}, "right": "10.100.1.1"}},
            {"match": {"op": "==", "left": {"ct": {"key": "proto-dst", **original}}, "right": 443}},
            {"counter": None},
            {"accept": None},
        ),
    }
    assert back["comment"] == "web#1"
    assert table.rules["denied"] == [
        {
            "family": "inet",
            "table": "plexd",
            "chain": "denied",
            "expr": (
                {"limit": {"rate": 5, "per": "second", "burst": 10}},
                {"log": {"prefix": "plexd-deny: ", "level": "debug"}},
            ),
        },
        {"family": "inet", "table": "plexd", "chain": "denied", "expr": ({"counter": None}, {"drop": None})},
    ]


def test_baseline_lets_nothing_pass() -> None:
    table = Table(render(SETTINGS))
    assert table.length == 2
    assert table.sets == {}


OWN, PEER_B, THIRD = (ip_address(text) for text in ("10.100.1.1", "10.100.1.2", "172.16.9.9"))
FROM_B = Packet("input", "plexd0", "", PEER_B, OWN, TCP, 443)
REPLY_TO_B = Packet("output", "", "plexd0", PEER_B, OWN, TCP, 443, "established", "reply")
ERROR = Packet("input", "plexd0", "", OWN, PEER_B, ICMP, 0, "related", icmp_type="destination-unreachable")


@pytest.mark.parametrize("packet", [FROM_B, replace(FROM_B, state="established"), REPLY_TO_B])
def test_both_directions_of_a_connection_end_with_the_rule_that_allowed_them(packet: Packet) -> None:
    visible = [PEERS["n_b"].mesh_ip]
    allowed = Table(render(SETTINGS, rules_of(rule("n_b", "n_a", 443, "tcp")), visible=visible))
    withdrawn = Table(render(SETTINGS, visible=visible))
    assert (allowed.judge(packet), withdrawn.judge(packet)) == ("accept", "drop")


@pytest.mark.parametrize(
    ("packet", "verdict"),
    [
        (ERROR, "accept"),
        (replace(ERROR, src=PEER_B, dst=OWN), "accept"),
        (replace(ERROR, dst=ip_address("172.16.8.1")), "accept"),  # in a prefix of the visible peer n_c
        (replace(ERROR, dst=THIRD), "accept"),
        (replace(ERROR, dst=ip_address("198.51.100.1")), "drop"),  # a connection to somebody else
        (replace(ERROR, src=PEER_B, dst=ip_address("10.100.1.3")), "drop"),  # between two other nodes
        (replace(ERROR, confirmed=False), "drop"),
        (replace(ERROR, l4proto=TCP, port=20, icmp_type=""), "drop"),  # as a conntrack helper expects it
        (replace(ERROR, l4proto=ICMPV6), "drop"),
    ],
)
def test_of_related_packets_only_errors_about_connections_with_visible_peers_pass(packet: Packet, verdict: str) -> None:
    visible = ("n_b", "n_c")
    document = render(SETTINGS, visible=[PEERS[each].mesh_ip for each in visible], prefixes=other_prefixes(visible))
    assert Table(document).judge(packet) == verdict


@pytest.mark.parametrize("is_allowed", [True, False])
def test_replies_to_pings_pass_with_the_pings(is_allowed: bool) -> None:
    settings_ = replace(SETTINGS, allow_ping=is_allowed)
    table = Table(render(settings_, visible=[PEERS["n_b"].mesh_ip]))
    request = Packet("output", "", "plexd0", OWN, PEER_B, ICMP, 0, icmp_type="echo-request")
    reply = replace(
        request, hook="input", iifname="plexd0", oifname="", state="established", direction="reply",
        icmp_type="echo-reply",
    )  # fmt: skip
    verdict = "accept" if is_allowed else "drop"
    assert (table.judge(request), table.judge(reply)) == (verdict, verdict)


def test_any_with_a_port_is_tcp_and_udp() -> None:
    document = render(SETTINGS, rules_of(rule("n_b", "n_a", 53)))
    protocols = [each["expr"][0]["match"]["right"] for each in mesh_rules(document) if "comment" in each]
    assert protocols == [TCP, UDP]


def test_equal_arguments_give_equal_documents_whatever_the_order_of_peers() -> None:
    addresses = [PEERS["n_b"].mesh_ip, PEERS["n_c"].mesh_ip]
    rules = rules_of(rule("n_b", "n_a", 22))
    assert render(SETTINGS, rules, visible=addresses) == render(SETTINGS, rules, visible=reversed(addresses))


@pytest.mark.parametrize(
    ("policy_id", "comment"),
    [
        ("web", "web#7"),
        ("", "#7"),
        ('a" b\n{c}; drop', "abcdrop#7"),
        ("é.x_-:", ".x_-:#7"),
        ("x" * 10_000, "x" * 98 + "#7"),
    ],
)
def test_comment_is_the_policy_id_reduced_to_harmless_letters(policy_id: str, comment: str) -> None:
    assert firewall.rule_comment(policy_id, 7) == comment
    assert len(comment) <= 100


def test_too_many_rules_are_refused() -> None:
    side = Side(Prefix.host(LOCAL.mesh_ip), "n_a")
    rules = [Rule("pol", number, ANYWHERE, side, Protocol.TCP, 1, Action.ALLOW) for number in range(32768)]
    render(SETTINGS, rules)
    assert "32769" in ruleset(SETTINGS, [*rules, rules[0]]).fault
    # two of them for a port of any protocol
    assert "32770" in ruleset(SETTINGS, [each._replace(protocol=Protocol.ANY) for each in rules[:16385]]).fault


# temporary_allows


def test_openings_are_kept_by_name() -> None:
    ssh = TemporaryAllow("ssh", Protocol.TCP, 22, LOCAL.mesh_ip)
    temporary_allows = TemporaryAllows().open(ssh).open(ssh._replace(port=2222))
    assert [opening.port for opening in temporary_allows.held] == [2222]
    assert temporary_allows.close("ssh").close("ssh") == TemporaryAllows()


def test_openings_run_out() -> None:
    temporary_allows = TemporaryAllows()
    for number in range(256):
        temporary_allows = temporary_allows.open(
            TemporaryAllow(str(number), Protocol.TCP, 1024 + number, LOCAL.mesh_ip)
        )
    temporary_allows.open(TemporaryAllow("0", Protocol.UDP, 1, LOCAL.mesh_ip))
    with pytest.raises(TooManyTemporaryAllows):
        temporary_allows.open(TemporaryAllow("more", Protocol.TCP, 22, LOCAL.mesh_ip))
    assert len(render(SETTINGS, temporary_allows=temporary_allows)["nftables"]) < 30  # one look-up, not 256 rules


# read-backs: a made-up one here, the kernel's in tests/linux

READ_BACK: dict[str, Any] = {
    "nftables": [
        {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
        {"table": {"family": "inet", "name": "plexd", "handle": 5}},
        {"set": {
            "family": "inet", "table": "plexd", "name": "policy0-allow", "type": ["ipv4_addr", "inet_service"],
            "handle": 3, "stmt": [{"counter": None}], "elem": [
              {"elem": {"val": {"concat": ["10.0.0.1", 22]}, "comment": "p#0", "counter": {"packets": 3, "bytes": 9}}},
              {"elem": {"val": {"concat": ["10.0.0.2", 22]}, "comment": "p#1", "counter": {"packets": 1, "bytes": 3}}},
              "foreign"]}},
        {"rule": {"family": "inet", "table": "plexd", "chain": "mesh", "handle": 9, "comment": "p#2", "expr": [
            {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}},
            {"counter": {"packets": 4, "bytes": 40}}, {"accept": None}]}},
        {"rule": {"family": "inet", "table": "plexd", "chain": "mesh", "handle": 10, "comment": "p#2", "expr": [
            {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "udp"}},
            {"counter": {"packets": 2, "bytes": 20}}, {"accept": None}]}},
    ]
}  # fmt: skip


def test_fingerprint_is_blind_to_handles_counts_and_the_order_of_elements() -> None:
    other = json.loads(
        json.dumps(READ_BACK).replace('"packets": 3', '"packets": 4').replace('"handle": 9', '"handle": 99')
    )
    other["nftables"][2]["set"]["elem"].reverse()
    other["nftables"][0]["metainfo"]["version"] = "1.1.0"
    assert fingerprint(other) == fingerprint(READ_BACK)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"p#0"', '"p#9"'),
        ('"10.0.0.1"', '"10.0.0.9"'),
        ('{"accept": null}', '{"drop": null}'),
        ('{"counter": {"packets": 4, "bytes": 40}}, ', ""),
        ('"chain": "mesh"', '"chain": "input"'),
        ('{"family": "inet", "name": "plexd", "handle": 5}', '{"family": "inet", "name": "plexd", "flags": "dormant"}'),
    ],
)
def test_fingerprint_sees_every_other_change(old: str, new: str) -> None:
    text = json.dumps(READ_BACK)
    assert old in text
    assert fingerprint(json.loads(text.replace(old, new, 1))) != fingerprint(READ_BACK)


def test_fingerprint_sees_the_order_of_rules() -> None:
    other = copy.deepcopy(READ_BACK)
    other["nftables"][3:] = reversed(other["nftables"][3:])
    assert fingerprint(other) != fingerprint(READ_BACK)


def test_hits_add_up_what_a_rule_became() -> None:
    rules = [Rule("p", number, ANYWHERE, ANYWHERE, Protocol.ANY, 0, Action.ALLOW) for number in range(4)]
    assert hits(READ_BACK, rules) == {
        ("p", 0): Hits(3, 9),
        ("p", 1): Hits(1, 3),
        ("p", 2): Hits(6, 60),
        ("p", 3): Hits(0, 0),
    }
