"""Rules put together by what they look at, so that one look-up decides for thousands of them.

Rules of one shape (the same fields given, the same prefix lengths) match the same packets or none in common: among
them the first of equal ones counts and the order of the rest does not. So they become elements of sets, as far as
the rules of other shapes between them allow: a rule is moved to the earlier ones of its shape only past rules that
judge alike or match none of the same packets. Where several judge a packet alike, any of them may be the one to count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from plexd.mesh.address import Prefix
from plexd.mesh.policy import Action

REACH = 64  # groups that a rule is tried to be moved past


class Match(NamedTuple):
    """The packets a rule is about. `family` is the size of an address, 0 for both; `port` 0 is any."""

    family: int
    src: Prefix | None
    dst: Prefix | None
    l4proto: int | None
    port: int

    @classmethod
    def of(cls, src: Prefix | None, dst: Prefix | None, l4proto: int | None, port: int) -> Match:
        """The sides are of one family. All of a family is no prefix but the family."""
        family = next((len(side.packed) for side in (src, dst) if side is not None), 0)
        src, dst = (side if side is not None and side.length else None for side in (src, dst))
        return cls(family, src, dst, l4proto, port)


class Line(NamedTuple):
    """A rule as it stands in the table: several matches differ in their protocol only."""

    matches: tuple[Match, ...]
    action: Action
    comment: str


class Shape(NamedTuple):
    """Which fields matches look at. `port_of` is the protocol whose ports are meant, None without a port."""

    family: int
    src_length: int | None
    dst_length: int | None
    has_l4proto: bool
    port_of: int | None

    @classmethod
    def of(cls, match: Match) -> Shape:
        return cls(
            match.family,
            match.src.length if match.src else None,
            match.dst.length if match.dst else None,
            match.l4proto is not None,
            match.l4proto if match.port else None,
        )

    @property
    def is_empty(self) -> bool:
        return self.src_length is None and self.dst_length is None and not self.has_l4proto


class Group:
    """Lines of one shape, in order."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.lines: list[Line] = []
        self._keys: dict[Action, list[_Key]] = {}
        self._views: dict[tuple[Action, _View], tuple[set[_Key], int]] = {}

    def add(self, line: Line, keys: Iterable[_Key]) -> None:
        self.lines.append(line)
        self._keys.setdefault(line.action, []).extend(keys)

    def opposes(self, action: Action, shape: Shape, keys: Iterable[_Key]) -> bool:
        """Whether one of its lines of this action may match one of the packets of these keys of `shape`."""
        if action not in self._keys:
            return False
        views = _views_of_both(self.shape, shape)
        if views is None:
            return False
        view, theirs = views
        held = self._view(action, view)
        return any(_see(key, theirs) in held for key in keys)

    def _view(self, action: Action, view: _View) -> set[_Key]:
        """Its keys as `view` shows them; kept, and brought up to date when asked for."""
        seen, count = self._views.get((action, view), (set(), 0))
        keys = self._keys[action]
        if count < len(keys):
            seen.update(_see(key, view) for key in keys[count:])
            self._views[action, view] = seen, len(keys)
        return seen


def group(lines: Iterable[Line]) -> list[Group]:
    """Groups that judge, one after the other, as the lines do; a line that an equal one before it hides is left out."""
    groups: list[Group] = []
    latest: dict[Shape, int] = {}
    newest = dict.fromkeys(Action, -1)  # the last group that has a line of this action
    hidden: set[Match] = set()
    for line in lines:
        matches = tuple(match for match in line.matches if match not in hidden)
        if not matches:
            continue
        hidden.update(matches)
        shape, keys = Shape.of(matches[0]), [_key(match) for match in matches]
        place = latest.get(shape)
        if place is None or not _may_go_back(line.action, shape, keys, groups, place, newest):
            place = latest[shape] = len(groups)
            groups.append(Group(shape))
        newest[line.action] = max(newest[line.action], place)
        groups[place].add(Line(matches, line.action, line.comment), keys)
    return groups


def _may_go_back(
    action: Action,
    shape: Shape,
    keys: Sequence[_Key],
    groups: Sequence[Group],
    place: int,
    newest: Mapping[Action, int],
) -> bool:
    """Whether a line may join the group at `place`, past all later ones."""
    other = Action.DENY if action is Action.ALLOW else Action.ALLOW
    past = range(place + 1, newest[other] + 1)
    return len(past) <= REACH and not any(groups[number].opposes(other, shape, keys) for number in past)


_Key = tuple[int, int, int, int]
"""The fields of a match as numbers: network bits of both sides, protocol, port; 0 for one that is not given."""

_View = tuple[int, int, int, int]
"""How much of a key is looked at: how many bits of either side are dropped, and masks for protocol and port."""


def _key(match: Match) -> _Key:
    return _network_bits(match.src), _network_bits(match.dst), match.l4proto or 0, match.port


def _network_bits(prefix: Prefix | None) -> int:
    return 0 if prefix is None else int.from_bytes(prefix.packed, "big") >> (len(prefix.packed) * 8 - prefix.length)


def _see(key: _Key, view: _View) -> _Key:
    return key[0] >> view[0], key[1] >> view[1], key[2] & view[2], key[3] & view[3]


@lru_cache(maxsize=1 << 12)
def _views_of_both(one: Shape, other: Shape) -> tuple[_View, _View] | None:
    """What both look at, as closely as the less exact of them does, for the keys of either.

    Keys that differ in it match no packet in common. None when no keys of these shapes do.
    """
    if one.family and other.family and one.family != other.family:
        return None
    common = [
        0 if mine is None or theirs is None else min(mine, theirs)
        for mine, theirs in ((one.src_length, other.src_length), (one.dst_length, other.dst_length))
    ]
    protocol = -1 if one.has_l4proto and other.has_l4proto else 0
    port = -1 if one.port_of is not None and other.port_of is not None else 0
    mine, theirs = (
        ((shape.src_length or 0) - common[0], (shape.dst_length or 0) - common[1], protocol, port)
        for shape in (one, other)
    )
    return mine, theirs
