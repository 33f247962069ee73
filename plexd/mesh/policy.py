"""From the control plane's policies to rules without doubt: sides are addresses, bad input has closed what it touches.

A fault in a rule that allows costs the rule; a fault in one that denies widens what it denies (docs/contract/mesh.md
§6.1). What comes out keeps the order of policies and rules, because the first match wins (docs/contract/mesh.md §6.2),
and holds only rules that can concern this node (docs/contract/mesh.md §6.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Peer, Policy, PolicyRule
from plexd.mesh.prefixes import NONE, PrefixIndex


class Action(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


class Protocol(StrEnum):
    """`ICMP` is ICMP and ICMPv6. `ANY` with a port is TCP and UDP."""

    ANY = "any"
    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"


class Side(NamedTuple):
    """One side of a rule: any address (None), or those of a prefix. `node` is the id that named it, "" for text."""

    prefix: Prefix | None
    node: str = ""


ANYWHERE = Side(None)


class Rule(NamedTuple):
    """What rule `number` (from 0) of a policy means here. `port` is the destination port, 0 for any."""

    policy_id: str
    number: int
    src: Side
    dst: Side
    protocol: Protocol
    port: int
    action: Action

    @property
    def is_about_everything(self) -> bool:
        """Whether neither protocol nor port narrows it."""
        return not self.port and self.protocol is Protocol.ANY


class Remark(NamedTuple):
    """Something about a rule as it came."""

    policy_id: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"policy {self.policy_id} rule {self.number}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Local:
    """This node as policies see it. `behind` are the prefixes that a bridge reaches for the mesh."""

    node_id: str
    mesh_ip: bytes
    behind: tuple[Prefix, ...] = ()

    @property
    def prefixes(self) -> tuple[Prefix, ...]:
        return (Prefix.host(self.mesh_ip), *self.behind)

    def touching(self) -> Callable[[Side], bool]:
        """Whether a rule with this side may concern an address of ours (docs/contract/mesh.md §6.3)."""
        index = PrefixIndex()
        for prefix in self.prefixes:
            index.put(prefix, 0)
        known: dict[Prefix, bool] = {}

        def touches(side: Side) -> bool:
            if side.node:
                return side.node == self.node_id
            if side.prefix is None:
                return True
            if side.prefix not in known:
                known[side.prefix] = index.overlapping(side.prefix) != NONE
            return known[side.prefix]

        return touches


@dataclass(frozen=True, slots=True)
class Resolved:
    """`faults` are the rules that were skipped or widened, `idle` those that match nothing as things stand.

    `named` are the ids of nodes that rules name, known or not: with any other peer it all comes out the same.
    """

    rules: tuple[Rule, ...] = ()
    faults: tuple[Remark, ...] = ()
    idle: tuple[Remark, ...] = ()
    named: frozenset[str] = frozenset()


def resolve(policies: Iterable[Policy], local: Local, peers: Mapping[str, Peer]) -> Resolved:
    """All policies, in order. `peers` are those known, visible or not: a rule that names another matches nothing."""
    rules: list[Rule] = []
    faults: list[Remark] = []
    idle: list[Remark] = []
    named: set[str] = set()
    touches = local.touching()
    for policy in policies:
        for number, raw in enumerate(policy.rules):
            draft = _read(raw)
            if draft.faults:
                faults.append(Remark(policy.id, number, draft.faults))
            if draft.action is None:
                continue
            named |= {draft.src.node, draft.dst.node}
            src, dst = _place(draft.src, local, peers), _place(draft.dst, local, peers)
            if src is None or dst is None:
                nobody = draft.src.node if src is None else draft.dst.node
                idle.append(Remark(policy.id, number, f"node {nobody} is not known or has no mesh address"))
            elif src.prefix and dst.prefix and len(src.prefix.packed) != len(dst.prefix.packed):
                idle.append(Remark(policy.id, number, "sides are of different IP families"))
            elif touches(src) or touches(dst):
                rules.append(Rule(policy.id, number, src, dst, draft.protocol, draft.port, draft.action))
    return Resolved(tuple(rules), tuple(faults), tuple(idle), frozenset(named - {""}))


def faults(policies: Iterable[Policy]) -> tuple[Remark, ...]:
    """The rules that are skipped or widened, whichever node looks at them."""
    return tuple(
        Remark(policy.id, number, draft.faults)
        for policy in policies
        for number, raw in enumerate(policy.rules)
        if (draft := _read(raw)).faults
    )


def deciding(rules: Iterable[Rule], src: tuple[str, bytes], dst: tuple[str, bytes]) -> Iterator[Rule]:
    """The rules that decide about packets from one node to another, in order, up to the first that decides about all.

    A node is its id and its mesh address; what lies behind it may meet other rules.
    """
    for rule in rules:
        if _is_on(rule.src, *src) and _is_on(rule.dst, *dst):
            yield rule
            if rule.is_about_everything:
                return


def _is_on(side: Side, node_id: str, mesh_ip: bytes) -> bool:
    if side.node:
        return side.node == node_id
    return side.prefix is None or (len(side.prefix.packed) == len(mesh_ip) and side.prefix.contains(mesh_ip))


def explain_rules(policies: Iterable[Policy], resolved: Resolved) -> dict[tuple[str, int], str]:
    """Why rules do nothing on this node, or something else than they say, by policy id and rule number."""
    in_force = {(rule.policy_id, rule.number) for rule in resolved.rules}
    notes = {(remark.policy_id, remark.number): remark.reason for remark in resolved.idle}
    for policy in policies:
        for number, raw in enumerate(policy.rules):
            key, draft = (policy.id, number), _read(raw)
            if draft.faults:
                effect = "ignored" if draft.action is None else "denies as much as it can"
                notes[key] = f"{draft.faults}: {effect}"
            elif key not in in_force:
                notes.setdefault(key, "about other nodes")
    return notes


class _Draft(NamedTuple):
    """A rule by itself. `action` None: skipped. A side that names a node has no prefix yet."""

    src: Side
    dst: Side
    protocol: Protocol
    port: int
    action: Action | None
    faults: str


_PROTOCOLS = {"": Protocol.ANY, "any": Protocol.ANY, "all": Protocol.ANY, "*": Protocol.ANY} | {
    protocol.value: protocol for protocol in (Protocol.TCP, Protocol.UDP, Protocol.ICMP)
}


@lru_cache(maxsize=1 << 14)  # the same rules come again with every change of a peer
def _read(raw: PolicyRule) -> _Draft:
    faults: list[str] = []
    action = {"allow": Action.ALLOW, "deny": Action.DENY}.get(raw.action.lower())
    if action is None:
        faults.append("bad action")
        action = Action.DENY
    src, dst = _read_side(raw.src), _read_side(raw.dst)
    if src is None:
        faults.append("bad src")
    if dst is None:
        faults.append("bad dst")
    protocol = _PROTOCOLS.get(raw.protocol.lower())
    if protocol is None:
        faults.append("bad protocol")
    port = raw.port
    if not 0 <= port <= 65535 or (port and protocol is Protocol.ICMP):
        faults.append("bad port")
        port = 0
    return _Draft(
        src or ANYWHERE,
        dst or ANYWHERE,
        protocol or Protocol.ANY,
        port,
        None if faults and action is Action.ALLOW else action,
        ", ".join(faults),
    )


def _read_side(text: str) -> Side | None:
    """None when it is neither any, nor a prefix, nor what could be a node id."""
    if text == "*":
        return ANYWHERE
    if not text:
        return None
    try:
        return Side(Prefix.parse(text) if "/" in text else Prefix.host(parse_ip(text)))
    except ValueError:
        return None if "/" in text else Side(None, text)


def _place(side: Side, local: Local, peers: Mapping[str, Peer]) -> Side | None:
    """The side with the address of the node it names; None when there is none."""
    if not side.node:
        return side
    if side.node == local.node_id:
        return Side(Prefix.host(local.mesh_ip), side.node)
    peer = peers.get(side.node)
    return Side(Prefix.host(peer.mesh_ip), side.node) if peer is not None and peer.mesh_ip else None
