"""What STUN answers mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh.address import Endpoint, parse_endpoint, parse_ip
from plexd.mesh.nat import Finding, NatType, Scope, StunAnswer, classify, is_settled, refusal, scope

PORT = 51820
LOCAL = frozenset(map(parse_ip, ("127.0.0.1", "192.168.1.2", "198.51.100.7", "2001:db8::7")))


def endpoint(text: str) -> Endpoint:
    parsed = parse_endpoint(text)
    assert isinstance(parsed, Endpoint)
    return parsed


def answer(server: str, mapped: str) -> StunAnswer:
    return StunAnswer(endpoint(server), endpoint(mapped))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("203.0.113.1:3478", "198.51.100.7:51820")], NatType.NONE),
        ([("[2001:db8::1]:3478", "[2001:db8::7]:51820")], NatType.NONE),
        ([("203.0.113.1:3478", "198.51.100.7:51821")], NatType.UNKNOWN),  # ours, but another port
        ([("203.0.113.1:3478", "198.51.100.9:51820")], NatType.UNKNOWN),  # the port kept, but not ours
        ([("203.0.113.1:3478", "198.51.100.9:51820"), ("203.0.113.1:3479", "198.51.100.9:51820")], NatType.UNKNOWN),
        ([("203.0.113.1:3478", "198.51.100.9:51820"), ("203.0.113.2:3478", "198.51.100.9:51820")], NatType.FULL_CONE),
        ([("203.0.113.1:3478", "198.51.100.9:40000"), ("203.0.113.2:3478", "198.51.100.9:40000")], NatType.FULL_CONE),
        ([("203.0.113.1:3478", "198.51.100.9:40000"), ("203.0.113.2:3478", "198.51.100.9:40001")], NatType.SYMMETRIC),
        ([("203.0.113.1:3478", "198.51.100.9:40000"), ("203.0.113.2:3478", "198.51.100.8:40000")], NatType.SYMMETRIC),
        ([("203.0.113.1:1", "9.9.9.9:1"), ("203.0.113.1:2", "9.9.9.9:2"), ("203.0.113.2:1", "9.9.9.9:1")],
         NatType.FULL_CONE),
    ],
)  # fmt: skip
def test_type_follows_from_what_two_addresses_saw(answers: list[tuple[str, str]], expected: NatType) -> None:
    told = [answer(*each) for each in answers]
    assert classify(told, LOCAL, PORT) == Finding(told[0].mapped, expected)
    assert is_settled(told, LOCAL, PORT) is (expected is not NatType.UNKNOWN)


def test_nothing_is_settled_without_an_answer() -> None:
    assert not is_settled([], LOCAL, PORT)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.9.9.9", Scope.LOOPBACK), ("::1", Scope.LOOPBACK),
        ("169.254.1.1", Scope.LINK_LOCAL), ("fe80::1", Scope.LINK_LOCAL), ("febf::1", Scope.LINK_LOCAL),
        ("10.1.2.3", Scope.PRIVATE), ("172.31.255.255", Scope.PRIVATE), ("192.168.0.1", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE), ("100.127.255.255", Scope.PRIVATE), ("fd00::1", Scope.PRIVATE),
        ("172.32.0.1", Scope.GLOBAL), ("100.128.0.1", Scope.GLOBAL), ("203.0.113.1", Scope.GLOBAL),
        ("2001:db8::1", Scope.GLOBAL), ("::2", Scope.GLOBAL),
        ("::ffff:10.0.0.1", Scope.PRIVATE), ("::ffff:203.0.113.1", Scope.GLOBAL),
    ],
)  # fmt: skip
def test_scope_of_an_address(text: str, expected: Scope) -> None:
    assert scope(parse_ip(text)) is expected


@pytest.mark.parametrize(
    ("server", "mapped", "refused"),
    [
        ("127.0.0.1:3478", "127.0.0.1:51820", False),  # a lab
        ("10.0.0.1:3478", "10.0.0.2:51820", False),
        ("10.0.0.1:3478", "203.0.113.9:51820", False),
        ("10.0.0.1:3478", "127.0.0.1:51820", True),
        ("203.0.113.1:3478", "198.51.100.7:51820", False),
        ("203.0.113.1:3478", "192.168.1.2:51820", True),
        ("203.0.113.1:3478", "100.64.0.9:51820", True),
        ("203.0.113.1:3478", "169.254.0.9:51820", True),
        ("[2001:db8::1]:3478", "[fd00::9]:51820", True),
        ("[2001:db8::1]:3478", "[::ffff:10.0.0.9]:51820", True),
        ("127.0.0.1:3478", "0.0.0.0:51820", True),
        ("127.0.0.1:3478", "224.0.0.1:51820", True),
        ("127.0.0.1:3478", "255.255.255.255:51820", True),
        ("[::1]:3478", "[::]:51820", True),
        ("[::1]:3478", "[ff02::1]:51820", True),
    ],
)
def test_address_that_the_server_cannot_have_seen_is_refused(server: str, mapped: str, refused: bool) -> None:
    assert (refusal(answer(server, mapped)) is not None) is refused


def test_port_0_is_refused() -> None:
    assert refusal(StunAnswer(endpoint("127.0.0.1:3478"), Endpoint(parse_ip("127.0.0.1"), 0)))


endpoints = st.builds(Endpoint, st.binary(min_size=4, max_size=4), st.integers(1, 65535))


@given(st.lists(st.builds(StunAnswer, endpoints, endpoints), min_size=1, max_size=4), st.lists(endpoints))
def test_settled_finding_is_not_changed_by_more_answers(answers: list[StunAnswer], more: list[Endpoint]) -> None:
    if is_settled(answers, LOCAL, PORT):
        later = [StunAnswer(server, answers[0].mapped) for server in more]
        assert classify([*answers, *later], LOCAL, PORT) == classify(answers, LOCAL, PORT)
