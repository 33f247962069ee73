"""What answers of STUN servers say about the NAT in front of this node (docs/contract/mesh.md §8.2 and §8.3). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import NamedTuple

from plexd.mesh.address import Endpoint, Prefix, is_unicast


class NatType(StrEnum):
    """How it is reported; FULL_CONE states only that the mapping does not depend on the destination."""

    NONE = "none"
    FULL_CONE = "full_cone"
    SYMMETRIC = "symmetric"
    UNKNOWN = "unknown"


class StunAnswer(NamedTuple):
    """`server` saw our packets come from `mapped`."""

    server: Endpoint
    mapped: Endpoint


class Finding(NamedTuple):
    """Where peers reach this node, as far as is known."""

    public_endpoint: Endpoint
    type: NatType


class Scope(IntEnum):
    """How far an address reaches."""

    LOOPBACK = 0
    LINK_LOCAL = 1
    PRIVATE = 2
    GLOBAL = 3


_SCOPES = tuple(
    (Prefix.parse(text), scope)
    for scope, texts in (
        (Scope.LOOPBACK, ("127.0.0.0/8", "::1")),
        (Scope.LINK_LOCAL, ("169.254.0.0/16", "fe80::/10")),
        (Scope.PRIVATE, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")),
    )
    for text in texts
)
_IPV4_MAPPED = Prefix.parse("::ffff:0:0/96")


def scope(packed: bytes) -> Scope:
    """The documentation networks count as global: a lab stands in for the internet with them."""
    if _IPV4_MAPPED.contains(packed):
        packed = packed[12:]
    return next((found for prefix, found in _SCOPES if prefix.contains(packed)), Scope.GLOBAL)


def refusal(answer: StunAnswer) -> str | None:
    """Why a server cannot have seen this address, or nobody could use it; None when the answer is credible."""
    server, mapped = answer
    if not mapped.port:
        return f"{mapped} has no port"
    if not is_unicast(mapped.packed):
        return f"{mapped} is no address of a host"
    if scope(mapped.packed) < scope(server.packed):
        return f"{mapped} cannot be reached from where the server is"
    return None


def classify(answers: Sequence[StunAnswer], local: frozenset[bytes], listen_port: int) -> Finding:
    """What at least one answer says, in the order they came; `local` are the addresses of this host."""
    first = answers[0]
    second = _second_opinion(answers)
    if _is_own(first, local, listen_port):
        return Finding(first.mapped, NatType.NONE)
    if second is None:
        return Finding(first.mapped, NatType.UNKNOWN)
    return Finding(first.mapped, NatType.FULL_CONE if second.mapped == first.mapped else NatType.SYMMETRIC)


def is_settled(answers: Sequence[StunAnswer], local: frozenset[bytes], listen_port: int) -> bool:
    """Whether further answers could not change the finding."""
    return bool(answers) and (_is_own(answers[0], local, listen_port) or _second_opinion(answers) is not None)


def _second_opinion(answers: Sequence[StunAnswer]) -> StunAnswer | None:
    """The first answer of a server at another address than the first one's."""
    return next((answer for answer in answers if answer.server.packed != answers[0].server.packed), None)


def _is_own(answer: StunAnswer, local: frozenset[bytes], listen_port: int) -> bool:
    return answer.mapped.packed in local and answer.mapped.port == listen_port
