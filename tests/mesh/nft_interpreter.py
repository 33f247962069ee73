"""Carries out a filter table in nftables JSON as the kernel would, for the part of the language plexd speaks.

What it does not know is an error, and so is a reference to something that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from tests.mesh.packets import ICMP, ICMPV6, TCP, UDP, Packet

_SIZES = {"ip": 4, "ip6": 6}
_TYPES = {"ipv4_addr": IPv4Address, "ipv6_addr": IPv6Address, "inet_service": int, "inet_proto": int}


class _NoMatch(Exception):
    """The packet has no such field, so the rule does not match."""


class Table:
    """From a transaction as it is sent."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.chains: dict[str, dict[str, Any]] = {}
        self.rules: dict[str, list[dict[str, Any]]] = {}
        self.sets: dict[str, dict[Any, str]] = {}
        self.reached: list[str] = []  # comments of what the last packet met a verdict at
        meta, add, delete, again, *rest = document["nftables"]
        assert meta == {"metainfo": {"json_schema_version": 1}}
        assert add == again == {"add": {"table": {"family": "inet", "name": "plexd"}}}
        assert delete == {"delete": {"table": {"family": "inet", "name": "plexd"}}}
        for command in rest:
            ((kind, item),) = command["add"].items()
            assert (item["family"], item["table"]) == ("inet", "plexd")
            getattr(self, f"_add_{kind}")(item)

    def _add_chain(self, item: dict[str, Any]) -> None:
        assert item["name"] not in self.chains
        self.chains[item["name"]] = item
        self.rules[item["name"]] = []

    def _add_set(self, item: dict[str, Any]) -> None:
        """What each element is commented with."""
        held: dict[Any, str] = {}
        types = item["type"]
        for element in item["elem"]:
            marked = element["elem"] if isinstance(element, dict) and "elem" in element else {"val": element}
            value = marked["val"]
            if isinstance(types, str):
                key = _element(types, value)
            else:
                assert len(types) > 1, "nft takes it for a concatenation of one"
                key = tuple(_element(*pair) for pair in zip(types, value["concat"], strict=True))
            held[key] = marked.get("comment", "")
        assert len(held) == len(item["elem"]), "each counts by itself"
        self.sets[f"@{item['name']}"] = held

    def _add_rule(self, item: dict[str, Any]) -> None:
        self.rules[item["chain"]].append(item)

    @property
    def length(self) -> int:
        """Rules that a packet may have to pass in chain `mesh`."""
        return len(self.rules["mesh"])

    def judge(self, packet: Packet) -> str:
        """`accept` or `drop`."""
        base = next(chain for chain in self.chains.values() if chain.get("hook") == packet.hook)
        assert (base["type"], base["prio"], base["policy"]) == ("filter", -10, "accept")
        self.reached = []
        return self._walk(base["name"], packet) or "accept"

    def _walk(self, chain: str, packet: Packet) -> str | None:
        for rule in self.rules[chain]:
            verdict = self._verdict(rule, packet)
            if verdict is None:
                continue
            ((kind, target),) = verdict.items()
            if kind in {"accept", "drop"}:
                return str(kind)
            ended = self._walk(target["target"], packet)
            if ended is not None or kind == "goto":
                return ended
        return None

    def _verdict(self, rule: dict[str, Any], packet: Packet) -> dict[str, Any] | None:
        comment = rule.get("comment", "")
        for expression in rule["expr"]:
            ((kind, content),) = expression.items()
            if kind == "match":
                found = self._matches(content, packet)
                if found is None:
                    return None
                comment = comment or found
            elif kind in {"accept", "drop", "jump", "goto"}:
                self.reached += [comment] if comment else []
                return {kind: content}
            else:
                assert kind in {"counter", "limit", "log"}, kind
        return None

    def _matches(self, match: dict[str, Any], packet: Packet) -> str | None:
        """The comment of the element that does, if it has one; None for no match."""
        try:
            left = _read(match["left"], packet)
        except _NoMatch:
            return None
        right = match["right"]
        if isinstance(right, str) and right.startswith("@"):
            assert match["op"] == "=="
            return self.sets[right].get(left)
        values = right["set"] if isinstance(right, dict) and "set" in right else [right]
        found = any(_holds(value, left) for value in values)
        return "" if found is (match["op"] != "!=") else None


def _element(type_: str, value: Any) -> Any:
    """A value of a set; one that is of another type the kernel would refuse."""
    read = value if isinstance(value, int) else ip_address(value)
    assert isinstance(read, _TYPES[type_])
    return read


def _holds(right: Any, left: Any) -> bool:
    if isinstance(right, dict):
        prefix = right["prefix"]
        return left in ip_network(f"{prefix['addr']}/{prefix['len']}")
    if isinstance(left, IPv4Address | IPv6Address):
        return left == ip_address(right)
    return bool(left == right)


def _read(expression: dict[str, Any], packet: Packet) -> Any:
    ((kind, content),) = expression.items()
    if kind == "concat":
        return tuple(_read(part, packet) for part in content)
    if kind == "&":
        address, mask = _read(content[0], packet), ip_address(content[1])
        return type(mask)(int(address) & int(mask))
    reader = {"meta": _meta, "ct": _ct, "payload": _payload}[kind]
    return reader(content, packet)


def _meta(content: dict[str, Any], packet: Packet) -> Any:
    return {
        "iifname": packet.iifname,
        "oifname": packet.oifname,
        "l4proto": packet.l4proto,
        "nfproto": "ipv4" if packet.src.version == 4 else "ipv6",
    }[content["key"]]


def _ct(content: dict[str, Any], packet: Packet) -> Any:
    key = content["key"]
    if key == "state":
        return packet.state
    if packet.state in {"invalid", "untracked"}:
        raise _NoMatch
    if key == "direction":
        return packet.direction
    if key == "status":
        return "confirmed" if packet.confirmed else "expected"
    assert content["dir"] == "original"
    if key == "proto-dst":
        return packet.port
    family, side = key.split()
    if _SIZES[family] != packet.src.version:
        raise _NoMatch
    return {"saddr": packet.src, "daddr": packet.dst}[side]


def _payload(content: dict[str, Any], packet: Packet) -> Any:
    protocol, field = content["protocol"], content["field"]
    if protocol in _SIZES:
        assert field == "daddr"
        if _SIZES[protocol] != packet.to.version:
            raise _NoMatch
        return packet.to
    assert field == "type"
    version, number = {"icmp": (4, ICMP), "icmpv6": (6, ICMPV6)}[protocol]
    if (packet.src.version, packet.l4proto) != (version, number):
        raise _NoMatch
    return packet.icmp_type


def ports_are_guarded(document: dict[str, Any]) -> Iterator[bool]:
    """For each rule that looks at a port: whether it first makes sure of TCP or UDP, as nft demands."""
    for command in document["nftables"]:
        rule = command.get("add", {}).get("rule")
        if rule and "proto-dst" in repr(rule["expr"]):
            first = rule["expr"][0]["match"] if "l4proto" in repr(rule["expr"][0]) else rule["expr"][1]["match"]
            yield first["left"] == {"meta": {"key": "l4proto"}} and first["right"] in {TCP, UDP}
