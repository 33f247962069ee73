"""The filter table `inet plexd`: rendered as one transaction for `nft -j`, and what a read-back of it tells.

Where two tables differ in elements of sets alone, as when a peer comes or goes, the one is amended to become the other.

docs/contract/mesh.md §6.5 has the chains, their order and what they match. Packets of both directions are judged by
the original tuple of their connection: a withdrawn rule silences both sides at once, and a published port is judged by
the address that was dialled. Nothing here is nftables syntax: text from outside stands in comments only, reduced to
letters that mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from plexd.mesh.address import Prefix, format_ip
from plexd.mesh.elements import Elements, join
from plexd.mesh.nft_commands import (
    ACCEPT,
    ADDRESS_TYPE,
    COUNTER,
    DROP,
    FAMILY,
    IP,
    Commands,
    Json,
    ct,
    equal,
    in_direction,
    in_state,
    in_status,
    joined,
    masked,
    match,
    meta,
)
from plexd.mesh.policy import Action, Protocol, Rule
from plexd.mesh.rulegroups import Group, Line, Match, Shape, group
from plexd.mesh.temporary_allows import NO_TEMPORARY_ALLOWS, TemporaryAllows

TABLE = "plexd"
MAX_RULES = 32768
FEW = 3  # up to so many rules of one shape are left as rules, to be read as such
PEERS = "peers"  # the set of the mesh addresses of visible peers
PREFIXES = "prefixes"  # with a length behind it, the set of their other prefixes of that length
AMENDED_AT_ONCE = 256  # elements; many more are put into the kernel as soon with the whole table

_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58  # numbers, because names need /etc/protocols
_COMMENT_CHARACTERS = 100
_MEANINGLESS = re.compile(r"[^A-Za-z0-9_.:-]")


@dataclass(frozen=True, slots=True)
class Settings:
    """This node and the `policy` block of its configuration. `interfaces` are the managed ones."""

    mesh_ip: bytes
    interfaces: tuple[str, ...]
    default: Action = Action.DENY
    allow_ping: bool = True
    guard_mesh_ip: bool = True
    log_denied: bool = True


@dataclass(frozen=True, slots=True)
class Ruleset:
    """The whole table. Equal rulesets have the same `digest`.

    `frame` are the commands that make it, without the elements of `sets`, by which one ruleset may differ from another
    of the same `frame_digest`. `rules` counts those of policies. `fault` says why the kernel cannot have the
    ruleset; the other fields are empty then. `table` is the name of the table, of family inet.
    """

    digest: str
    frame: Sequence[Json] = field(compare=False, repr=False)
    frame_digest: str = field(compare=False)
    sets: Mapping[str, Elements] = field(compare=False, repr=False)
    rules: int = field(compare=False)
    fault: str = field(default="", compare=False)
    table: str = TABLE

    @classmethod
    def of(cls, frame: Sequence[Json], sets: Mapping[str, Elements], rules: int, table: str) -> Ruleset:
        text = json.dumps(frame, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(_digest(digest, sets), frame, digest, sets, rules, table=table)

    def document(self) -> Json:
        """The transaction that puts the table in the place of the one there. Takes 10 ms for ten thousand elements."""
        table: Json = {"table": {"family": FAMILY, "name": self.table}}
        # adding it first makes deleting it succeed where there is none
        replacement = [{"add": table}, {"delete": table}, {"add": table}]
        meta = {"metainfo": {"json_schema_version": 1}}
        return {"nftables": [meta, *replacement, *(_filled(command, self.sets) for command in self.frame)]}


def _digest(frame: str, sets: Mapping[str, Elements]) -> str:
    parts = [frame, *(f"{name} {elements.checksum:x}" for name, elements in sorted(sets.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _filled(command: Json, sets: Mapping[str, Elements]) -> Json:
    """With its elements, if it makes a set."""
    (kind, item), *_ = command["add"].items()
    if kind != "set":
        return command
    return {"add": {kind: {**item, "elem": sets[item["name"]].to_json()}}}


class SetChange(NamedTuple):
    """Elements to be taken out of a set and, with their comments, put into it."""

    name: str
    removed: Sequence[bytes]
    added: Mapping[bytes, str]


def amendment(before: Ruleset, after: Ruleset) -> tuple[SetChange, ...]:
    """What turns the table of one ruleset into that of the other; empty where it takes, or is better done by, the whole
    of it. An element with a new comment goes and comes."""
    if before.frame_digest != after.frame_digest or before.fault or after.fault:
        return ()
    changes = [
        SetChange(name, *held.difference(after.sets[name]))
        for name, held in before.sets.items()
        if held is not after.sets[name]
    ]
    changes = [change for change in changes if change.removed or change.added]
    count = sum(len(change.removed) + len(change.added) for change in changes)
    return tuple(changes) if count <= AMENDED_AT_ONCE else ()


def ruleset(
    settings: Settings,
    rules: Sequence[Rule] = (),
    *,
    visible: Iterable[bytes] = (),
    prefixes: Iterable[Prefix] = (),
    temporary_allows: TemporaryAllows = NO_TEMPORARY_ALLOWS,
    table: str = TABLE,
) -> Ruleset:
    """The whole table; without rules it is the baseline. Too many rules are a fault of the ruleset.

    `visible` are the mesh addresses of the visible peers, `prefixes` their other prefixes. Equal arguments give equal
    rulesets.
    """
    lines = list(_policy_lines(rules))
    if len(lines) > MAX_RULES:
        fault = f"the policies make {len(lines)} rules for this node, more than {MAX_RULES}"
        return Ruleset(hashlib.sha256(repr(rules).encode()).hexdigest(), (), "", {}, len(rules), fault)
    writer = Commands(table)
    _base_chains(writer, settings)
    writer.rule("mesh", in_state("invalid"), COUNTER, DROP)
    _peer_sets(writer, settings.mesh_ip, visible, prefixes)
    _errors(writer, settings.mesh_ip)
    if settings.allow_ping and PEERS in writer.sets:
        _ping(writer, settings.mesh_ip)
    _judging(writer, "allow", group(_allow_lines(temporary_allows)))
    _judging(writer, "policy", group(lines))
    writer.rule("mesh", COUNTER, _VERDICTS[settings.default])
    return Ruleset.of(writer.commands(), writer.sets, len(rules), table)


class PeerChange(NamedTuple):
    """Mesh addresses, and other prefixes, of visible peers that came or went."""

    addresses: AbstractSet[bytes] = frozenset()
    prefixes: AbstractSet[Prefix] = frozenset()


def with_peers(before: Ruleset, settings: Settings, gone: PeerChange, come: PeerChange) -> Ruleset | None:
    """The ruleset without the peers that are `gone` and with those that `come`; None where it has to be built anew."""
    if before.fault:
        return before
    removed = _peer_keys(settings.mesh_ip, gone.addresses, gone.prefixes)
    added = _peer_keys(settings.mesh_ip, come.addresses, come.prefixes)
    sets = dict(before.sets)
    for name in removed.keys() | added.keys():
        held = before.sets.get(name)
        if held is None:
            if name in added:
                return None
            continue
        sets[name] = held.amended(removed.get(name, {}), added.get(name, {}))
        if not sets[name].held:
            return None
    if all(sets[name] is held for name, held in before.sets.items()):
        return before
    return replace(before, digest=_digest(before.frame_digest, sets), sets=sets)


def rule_comment(policy_id: str, number: int) -> str:
    """What marks the rule in the table (docs/contract/mesh.md §6.5)."""
    return _reduced(policy_id, f"#{number}")


# --- rules to lines ---------------------------------------------------------------------------------------------------


def _policy_lines(rules: Iterable[Rule]) -> Iterator[Line]:
    for rule in rules:
        comment = rule_comment(rule.policy_id, rule.number)
        for protocols in _l4protos(rule.protocol, rule.port):
            matches = tuple(Match.of(rule.src.prefix, rule.dst.prefix, number, rule.port) for number in protocols)
            yield Line(matches, rule.action, comment)


def _l4protos(protocol: Protocol, port: int) -> tuple[tuple[int | None, ...], ...]:
    """The protocol numbers of each line that a rule becomes."""
    if protocol is Protocol.ANY:
        return ((_TCP,), (_UDP,)) if port else ((None,),)
    return {Protocol.TCP: ((_TCP,),), Protocol.UDP: ((_UDP,),), Protocol.ICMP: ((_ICMP, _ICMPV6),)}[protocol]


def _allow_lines(temporary_allows: TemporaryAllows) -> Iterator[Line]:
    for opening in temporary_allows.held:
        (protocols,) = _l4protos(opening.protocol, opening.port)
        dst = Prefix.host(opening.dst)
        # a source of the other family can never come to `dst`
        sources = [Prefix.host(src) for src in opening.src if len(src) == len(opening.dst)] if opening.src else [None]
        for src in sources:
            matches = tuple(Match.of(src, dst, number, opening.port) for number in protocols)
            yield Line(matches, Action.ALLOW, _reduced(opening.name))


def _reduced(name: str, suffix: str = "") -> str:
    return _MEANINGLESS.sub("", name)[: _COMMENT_CHARACTERS - len(suffix)] + suffix


# --- lines to nftables ------------------------------------------------------------------------------------------------

_DENIED: Json = {"goto": {"target": "denied"}}
_VERDICTS = {Action.ALLOW: ACCEPT, Action.DENY: _DENIED}


def _base_chains(writer: Commands, settings: Settings) -> None:
    for hook in ("input", "output", "forward"):
        writer.chain(hook, hook)
    writer.chain("mesh")
    writer.chain("denied")
    managed: Json = {"set": list(settings.interfaces)}
    into, out_of = equal(meta("iifname"), managed), equal(meta("oifname"), managed)
    to_mesh: Json = {"jump": {"target": "mesh"}}
    family, own = IP[len(settings.mesh_ip)], format_ip(settings.mesh_ip)
    if settings.guard_mesh_ip:
        foreign = match("!=", meta("iifname"), {"set": ["lo", *settings.interfaces]})
        writer.rule("input", foreign, equal({"payload": {"protocol": family, "field": "daddr"}}, own), COUNTER, DROP)
        # dialled there, and on its way to where a published port leads
        dialled = equal(ct(f"{family} daddr"), own)
        writer.rule("forward", foreign, in_direction("original"), dialled, COUNTER, DROP)
    writer.rule("input", into, to_mesh)
    writer.rule("output", out_of, to_mesh)
    writer.rule("forward", into, to_mesh)
    writer.rule("forward", out_of, to_mesh)
    if settings.log_denied:
        limit = {"limit": {"rate": 5, "per": "second", "burst": 10}}
        writer.rule("denied", limit, {"log": {"prefix": "plexd-deny: ", "level": "debug"}})
    writer.rule("denied", COUNTER, DROP)


def _peer_keys(mesh_ip: bytes, addresses: Iterable[bytes], prefixes: Iterable[Prefix]) -> dict[str, dict[bytes, str]]:
    """The elements that stand for visible peers, by the name of their set: one set for each length of prefix.

    Only those of the family of `mesh_ip`: a connection of this node's mesh address has no other family.
    """
    size = len(mesh_ip)
    keys: dict[str, dict[bytes, str]] = {}
    if peers := dict.fromkeys((address for address in addresses if len(address) == size), ""):
        keys[PEERS] = peers
    for prefix in prefixes:
        if len(prefix.packed) == size:
            keys.setdefault(f"{PREFIXES}{prefix.length}", {})[prefix.packed] = ""
    return keys


def _peer_sets(writer: Commands, mesh_ip: bytes, visible: Iterable[bytes], prefixes: Iterable[Prefix]) -> None:
    for name, keys in sorted(_peer_keys(mesh_ip, visible, prefixes).items()):
        writer.set(name, Elements.of((ADDRESS_TYPE[len(mesh_ip)],), keys))


def _errors(writer: Commands, mesh_ip: bytes) -> None:
    """ICMP errors about connections between this node and a visible peer. Ports are not judged.

    A confirmed connection leaves out what a conntrack helper expects: helpers open nothing.
    """
    size = len(mesh_ip)
    number, own = (_ICMP if size == 4 else _ICMPV6), format_ip(mesh_ip)
    error = (equal(meta("l4proto"), number), in_state("related"), in_status("confirmed"))
    source, destination = (ct(f"{IP[size]} {side}") for side in ("saddr", "daddr"))
    for name in sorted(writer.sets):
        length = size * 8 if name == PEERS else int(name.removeprefix(PREFIXES))
        from_peer, to_peer = (equal(masked(side, size, length), f"@{name}") for side in (source, destination))
        writer.rule("mesh", *error, equal(source, own), to_peer, COUNTER, ACCEPT)
        writer.rule("mesh", *error, from_peer, equal(destination, own), COUNTER, ACCEPT)


def _ping(writer: Commands, mesh_ip: bytes) -> None:
    """Echo requests between this node and visible peers, and the replies to them."""
    size, own = len(mesh_ip), format_ip(mesh_ip)
    type_: Json = {"payload": {"protocol": "icmp" if size == 4 else "icmpv6", "field": "type"}}
    request = (equal(type_, "echo-request"),)
    reply = (equal(type_, "echo-reply"), in_state("established"), in_direction("reply"))
    source, destination = (ct(f"{IP[size]} {side}") for side in ("saddr", "daddr"))
    to_peer = (equal(source, own), equal(destination, f"@{PEERS}"))
    from_peer = (equal(source, f"@{PEERS}"), equal(destination, own))
    limit = {"limit": {"rate": 50, "per": "second", "burst": 100}}
    writer.rule("mesh", *reply, *to_peer, ACCEPT)
    writer.rule("mesh", *reply, *from_peer, ACCEPT)
    writer.rule("mesh", *request, *from_peer, limit, ACCEPT)
    writer.rule("mesh", *request, *to_peer, ACCEPT)


def _judging(writer: Commands, subject: str, groups: Sequence[Group]) -> None:
    """`groups` in order. The subject names their sets.

    Sets, not a verdict map: the kernel takes the elements of a map away at the instant it switches to the new table,
    and a packet still on its way through the old one would miss the rule that is meant for it.
    """
    for number, each in enumerate(groups):
        for action in Action:
            lines = [line for line in each.lines if line.action is action]
            if len(lines) > FEW:
                _judge_by_set(writer, f"{subject}{number}-{action}", each.shape, lines, _VERDICTS[action])
                continue
            for line in lines:
                writer.rule("mesh", *_conditions(line), COUNTER, _VERDICTS[action], comment=line.comment)


def _judge_by_set(writer: Commands, name: str, shape: Shape, lines: Sequence[Line], verdict: Json) -> None:
    fields = list(_fields(shape))
    held = {join(_values(match)): line.comment for line in lines for match in line.matches}
    writer.set(name, Elements.of(tuple(type_ for type_, _ in fields), held, counted=True))
    port_of = [] if shape.port_of is None else [equal(meta("l4proto"), shape.port_of)]
    key = joined([expression for _, expression in fields])
    writer.rule("mesh", *_family(shape), *port_of, equal(key, f"@{name}"), verdict)


def _conditions(line: Line) -> Iterator[Json]:
    match = line.matches[0]  # they differ in the protocol only
    yield from _family(Shape.of(match))
    if match.l4proto is not None:
        numbers = [each.l4proto for each in line.matches]
        yield equal(meta("l4proto"), {"set": numbers} if len(numbers) > 1 else numbers[0])
    for name, prefix in (("saddr", match.src), ("daddr", match.dst)):
        if prefix is not None:
            address = format_ip(prefix.packed)
            range_: Json = {"prefix": {"addr": address, "len": prefix.length}}
            yield equal(ct(f"{IP[match.family]} {name}"), address if prefix.is_host else range_)
    if match.port:
        yield equal(ct("proto-dst"), match.port)


def _family(shape: Shape) -> Iterator[Json]:
    """A condition where no address tells the family; a prefix of length 0 is not relied on to."""
    if shape.family and shape.src_length is None and shape.dst_length is None:
        yield equal(meta("nfproto"), {4: "ipv4", 16: "ipv6"}[shape.family])


def _fields(shape: Shape) -> Iterator[tuple[str, Json]]:
    """The parts of a set's key: type and expression. The order is that of `_values`."""
    for name, length in (("saddr", shape.src_length), ("daddr", shape.dst_length)):
        if length is not None:
            yield ADDRESS_TYPE[shape.family], masked(ct(f"{IP[shape.family]} {name}"), shape.family, length)
    if shape.port_of is not None:
        yield "inet_service", ct("proto-dst")
    elif shape.has_l4proto:
        yield "inet_proto", meta("l4proto")


def _values(match: Match) -> list[bytes]:
    values = [prefix.packed for prefix in (match.src, match.dst) if prefix is not None]
    if match.port:
        values.append(match.port.to_bytes(2, "big"))
    elif match.l4proto is not None:
        values.append(bytes([match.l4proto]))
    return values
