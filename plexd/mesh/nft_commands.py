"""Commands and expressions of nftables in JSON, as `nft -j` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plexd.mesh.address import Prefix, format_ip
from plexd.mesh.elements import Elements

Json = dict[str, Any]

FAMILY = "inet"
PRIORITY = -10

COUNTER: Json = {"counter": None}
ACCEPT: Json = {"accept": None}
DROP: Json = {"drop": None}
IP = {4: "ip", 16: "ip6"}
ADDRESS_TYPE = {4: "ipv4_addr", 16: "ipv6_addr"}


class Commands:
    """Collects the commands in the order the kernel wants them: what is referred to comes first."""

    def __init__(self, table: str) -> None:
        self._table = table
        self.sets: dict[str, Elements] = {}
        self._chains: list[Json] = []
        self._sets: list[Json] = []
        self._rules: list[Json] = []

    def chain(self, name: str, hook: str = "") -> None:
        base = {"type": "filter", "hook": hook, "prio": PRIORITY, "policy": "accept"} if hook else {}
        self._chains.append(self._add("chain", name=name, **base))

    def set(self, name: str, elements: Elements) -> None:
        types = elements.types
        # nft takes a list for a concatenation, even of one
        type_ = types[0] if len(types) == 1 else list(types)
        counting = {"stmt": [COUNTER]} if elements.counted else {}
        self._sets.append(self._add("set", name=name, type=type_, **counting))
        self.sets[name] = elements

    def rule(self, chain: str, *expressions: Json, comment: str = "") -> None:
        mark = {"comment": comment} if comment else {}
        self._rules.append(self._add("rule", chain=chain, expr=expressions, **mark))

    def commands(self) -> list[Json]:
        return [*self._chains, *self._sets, *self._rules]

    def _add(self, kind: str, **members: Any) -> Json:
        return {"add": {kind: {"family": FAMILY, "table": self._table, **members}}}


def match(operator: str, left: Json, right: Any) -> Json:
    return {"match": {"op": operator, "left": left, "right": right}}


def equal(left: Json, right: Any) -> Json:
    return match("==", left, right)


def in_state(state: str) -> Json:
    return match("in", {"ct": {"key": "state"}}, state)


def in_status(status: str) -> Json:
    return match("in", {"ct": {"key": "status"}}, status)


def in_direction(direction: str) -> Json:
    return equal({"ct": {"key": "direction"}}, direction)


def meta(key: str) -> Json:
    return {"meta": {"key": key}}


def ct(key: str) -> Json:
    """A field of the original tuple of the packet's connection."""
    return {"ct": {"key": key, "dir": "original"}}


def joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else {"concat": parts}


def masked(address: Json, size: int, length: int) -> Json:
    """The network address of an address, for prefixes of this length; `size` in bytes."""
    if length == size * 8:
        return address
    return {"&": [address, format_ip(Prefix.of(b"\xff" * size, length).packed)]}
