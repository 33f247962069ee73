"""Which peers get onto the interface: those that some rule lets talk to this node, or this node to them.

For each direction the first rule that decides counts (docs/contract/mesh.md §6.3). A rule names its far side by
anything, by a node or by a prefix; each kind is looked up by itself, so that no peer is walked past every rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from plexd.mesh.address import Prefix
from plexd.mesh.policy import Action, Local, Protocol, Rule, Side
from plexd.mesh.prefixes import NONE, PrefixIndex, supernet


class Visibility:
    """`rules` in order, as resolved; made once for any number of peers."""

    def __init__(self, rules: Iterable[Rule], local: Local, default: Action) -> None:
        self._default = default
        self._directions = (_Direction(), _Direction())
        outward, inward = self._directions
        touches = local.touching()
        around = supernet(local.prefixes)
        for number, rule in enumerate(rules):
            for direction, near, far in ((outward, rule.src, rule.dst), (inward, rule.dst, rule.src)):
                if rule.action is Action.ALLOW:
                    if touches(near):
                        direction.opens.put(far, number)
                elif not rule.port and rule.protocol is Protocol.ANY and _covers(near, local.node_id, around):
                    direction.closes.put(far, number)

    def among(self, peers: Mapping[str, Sequence[Prefix]]) -> frozenset[str]:
        """Ids of the visible ones; `peers` has the effective allowed IPs of each."""
        return frozenset(peer_id for peer_id, allowed_ips in peers.items() if self.shows(peer_id, allowed_ips))

    def shows(self, peer_id: str, allowed_ips: Sequence[Prefix]) -> bool:
        return any(self._is_open(direction, peer_id, allowed_ips) for direction in self._directions)

    def _is_open(self, direction: _Direction, peer_id: str, allowed_ips: Sequence[Prefix]) -> bool:
        opens = direction.opens.first_touching(peer_id, allowed_ips)
        closes = direction.closes.first_covering(peer_id, allowed_ips)
        return self._default is Action.ALLOW if opens == closes == NONE else opens < closes


def _covers(side: Side, node_id: str, around: Prefix | None) -> bool:
    """Whether a side holds all of a node; `around` is the smallest prefix around all of its own."""
    if side.node:
        return side.node == node_id
    return side.prefix is None or (around is not None and side.prefix.covers(around))


class _Direction:
    def __init__(self) -> None:
        self.opens = _FarSides()
        self.closes = _FarSides()


class _FarSides:
    """The numbers of rules, by their far side."""

    def __init__(self) -> None:
        self._anywhere = NONE
        self._nodes: dict[str, int] = {}
        self._prefixes = PrefixIndex()

    def put(self, side: Side, number: int) -> None:
        """Numbers come in rising order."""
        if side.node:
            self._nodes.setdefault(side.node, number)
        elif side.prefix is None:
            self._anywhere = min(self._anywhere, number)
        else:
            self._prefixes.put(side.prefix, number)

    def first_touching(self, peer_id: str, prefixes: Sequence[Prefix]) -> int:
        return min(
            self._anywhere, self._nodes.get(peer_id, NONE), *(self._prefixes.overlapping(prefix) for prefix in prefixes)
        )

    def first_covering(self, peer_id: str, prefixes: Sequence[Prefix]) -> int:
        around = supernet(prefixes)
        covering = NONE if around is None else self._prefixes.containing(around)
        return min(self._anywhere, self._nodes.get(peer_id, NONE), covering)
