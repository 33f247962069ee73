"""Which peers get onto the interface."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plexd.mesh.address import Prefix
from plexd.mesh.desired import Policy, PolicyRule
from plexd.mesh.policy import Action, Local, resolve
from plexd.mesh.prefixes import NONE, PrefixIndex, supernet
from plexd.mesh.visibility import Visibility
from tests.mesh import policies as mesh
from tests.mesh.policies import LOCAL, PEERS, world_of


def seen(*lines: str, default: Action = Action.DENY) -> set[str]:
    """`lines` are rules as text: action, source, destination, and then port and protocol if any."""
    rules = []
    for line in lines:
        action, src, dst, *rest = line.split()
        port, protocol = rest or ("0", "")
        rules.append(PolicyRule(src, dst, int(port), protocol, action))
    resolved = resolve([Policy("pol", tuple(rules))], LOCAL, PEERS)
    return set(Visibility(resolved.rules, LOCAL, default).among({p.id: p.allowed_ips for p in PEERS.values()}))


@pytest.mark.parametrize(
    ("lines", "peers"),
    [
        ([], set()),
        (["allow * *"], set(PEERS)),
        (["allow n_a n_b"], {"n_b"}),
        (["allow n_b n_a 443 tcp"], {"n_b"}),
        (["allow n_b n_c"], set()),
        (["allow 10.100.1.0/24 n_a"], {"n_b", "n_c"}),
        (["allow n_a 172.16.7.0/24"], {"n_c", "n_f"}),
        (["allow n_a 172.16.8.1"], {"n_c"}),
        (["allow n_a fd00:200::1"], set()),  # families differ
        (["allow * fd00:200::1"], {"n_d"}),
        (["allow n_unknown n_a"], set()),
        (["allow n_a 10.0.0.0/8x"], set()),
        (["deny n_a n_b", "allow n_a n_b"], set()),
        (["deny n_a n_b", "allow n_b n_a"], {"n_b"}),  # the other way is open
        (["deny n_b n_a", "deny n_a n_b", "allow * *"], set(PEERS) - {"n_b"}),
        (["deny * n_b 22 tcp", "deny n_b * 22 tcp", "allow * *"], set(PEERS)),  # a port closes no peer
        (["deny * n_b 0 tcp", "deny n_b * 0 tcp", "allow * *"], set(PEERS)),
        (["deny * 172.16.0.0/16", "deny 172.16.0.0/16 *", "allow * *"], set(PEERS) - {"n_f"}),  # n_c has more
        (["deny * 10.100.1.3", "deny 10.100.1.3 *", "allow n_a n_c"], {"n_c"}),  # not all of it is covered
        (["allow n_a n_b", "deny * *"], {"n_b"}),
        (["deny * *", "allow * *"], set()),
    ],
)
def test_first_rule_that_decides_a_direction_counts(lines: list[str], peers: set[str]) -> None:
    assert seen(*lines) == peers


def test_where_nothing_decides_the_default_does() -> None:
    assert seen("deny * n_b", "deny n_b *", default=Action.ALLOW) == set(PEERS) - {"n_b"}


def test_deny_of_a_part_of_what_is_behind_us_closes_nobody() -> None:
    bridge = Local("n_a", LOCAL.mesh_ip, (Prefix.parse("10.100.2.0/24"),))
    allowed_ips = {"n_b": PEERS["n_b"].allowed_ips}
    for part, peers in (("10.100.0.0/23", {"n_b"}), ("10.100.1.1", {"n_b"}), ("10.100.0.0/22", set())):
        lines = (("deny", part, "n_b"), ("deny", "n_b", part), ("allow", "*", "*"))
        rules = tuple(PolicyRule(src, dst, 0, "", action) for action, src, dst in lines)
        resolved = resolve([Policy("pol", rules)], bridge, PEERS)
        assert Visibility(resolved.rules, bridge, Action.DENY).among(allowed_ips) == peers


@settings(max_examples=300)
@given(mesh.all_policies, mesh.locals_, mesh.defaults)
def test_reference_sees_the_same_peers(policies: tuple[Policy, ...], local: Local, default: str) -> None:
    rules = resolve(policies, local, PEERS).rules
    allowed_ips = {peer.id: peer.allowed_ips for peer in PEERS.values()}
    visible = Visibility(rules, local, Action(default)).among(allowed_ips)
    assert visible == world_of(policies, local, default).visible


# a few bits at either end, so that prefixes meet and adjoin

prefixes = st.one_of(
    st.builds(lambda n, length: Prefix.of(bytes([10, 0, 0, n]), length), st.integers(0, 15), st.integers(27, 32)),
    st.builds(lambda n, length: Prefix.of(bytes([n, 0, 0, 0]), length), st.integers(0, 15), st.integers(0, 8)),
    st.builds(lambda n, length: Prefix.of(bytes([0xFD, *[n] * 15]), length), st.integers(0, 3), st.integers(0, 128)),
)


@given(st.lists(prefixes, max_size=12), prefixes)
def test_index_answers_like_a_walk_over_all(held: list[Prefix], asked: Prefix) -> None:
    index = PrefixIndex()
    for number, prefix in enumerate(held):
        index.put(prefix, number)
    containing = [n for n, prefix in enumerate(held) if prefix.covers(asked)]
    overlapping = [n for n, prefix in enumerate(held) if prefix.covers(asked) or asked.covers(prefix)]
    assert index.containing(asked) == min(containing, default=NONE)
    assert index.overlapping(asked) == min(overlapping, default=NONE)


@given(st.lists(prefixes, min_size=1, max_size=4))
def test_supernet_is_the_smallest_prefix_around_all(held: list[Prefix]) -> None:
    around = supernet(held)
    if around is None:
        assert len({len(prefix.packed) for prefix in held}) == 2
        return
    assert all(around.covers(prefix) for prefix in held)
    if around.length < min(prefix.length for prefix in held):
        halves = (Prefix.of(prefix.packed, around.length + 1) for prefix in held)
        assert len(set(halves)) == 2
