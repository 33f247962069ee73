"""What a read-back of a table tells: whether it is the one that was put there, and what its rules have matched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from plexd.mesh.elements import Elements
from plexd.mesh.firewall import rule_comment
from plexd.mesh.nft_commands import COUNTER, Json
from plexd.mesh.policy import Rule


class Hits(NamedTuple):
    packets: int
    bytes: int


def fingerprint(table: Json, sets: Mapping[str, Elements] | None = None) -> str | None:
    """Of a read-back: equal for tables that filter alike and carry the same marks, whatever they have counted.

    With `sets` the elements of these are left out of it, and it is None unless the table has exactly them.
    """
    told: list[Any] = []
    found = 0
    for item in table["nftables"]:
        for kind, content in item.items():
            expected = (sets or {}).get(content.get("name", "")) if kind == "set" else None
            if expected is not None:
                if not expected.are_in(content.get("elem", ())):
                    return None
                found += 1
                told.append(_told(kind, {**content, "elem": ()}))
            elif kind != "metainfo":
                told.append(_told(kind, content))
    if found < len(sets or {}):
        return None
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def hits(table: Json, rules: Iterable[Rule]) -> dict[tuple[str, int], Hits]:
    """What each of `rules` (policy id, rule number) has matched, by the counters in a read-back.

    A packet counts at one of the rules that judge it alike. Ids that differ only in what a comment cannot hold count
    together.
    """
    counted: dict[str, Hits] = {}
    for comment, counter in _counters(table):
        before = counted.get(comment, Hits(0, 0))
        counted[comment] = Hits(before.packets + counter["packets"], before.bytes + counter["bytes"])
    return {
        (rule.policy_id, rule.number): counted.get(rule_comment(rule.policy_id, rule.number), Hits(0, 0))
        for rule in rules
    }


def _told(kind: str, content: Json) -> list[Any]:
    """Without handles and counts, and with the elements of sets in one order."""
    plain = {name: value for name, value in content.items() if name not in {"handle", "expr", "elem"}}
    expressions = [COUNTER if "counter" in part else part for part in content.get("expr", ())]
    return [kind, plain, expressions, sorted(map(_told_element, content.get("elem", ())))]


def _told_element(element: Any) -> str:
    if isinstance(element, dict) and "elem" in element:
        element = {name: None if name == "counter" else value for name, value in element["elem"].items()}
    return json.dumps(element)


def _counters(table: Json) -> Iterator[tuple[str, Json]]:
    """Of everything that has a counter and a comment, which includes what others may have put there."""
    for item in table["nftables"]:
        if (rule := item.get("rule")) and "comment" in rule:
            yield from ((rule["comment"], part["counter"]) for part in rule["expr"] if "counter" in part)
        for element in item.get("set", {}).get("elem", ()):
            marked = element["elem"] if isinstance(element, dict) and "elem" in element else {}
            if "comment" in marked and "counter" in marked:
                yield marked["comment"], marked["counter"]
