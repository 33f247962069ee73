"""Snapshots share what they have in common: mappings copied with one entry changed, and told apart by identity.

With ten thousand peers every event pays for this, so each walk over all of them is one that C does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import compress, islice
from operator import eq, is_not
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")


def with_entry(mapping: Mapping[str, T], key: str, value: T) -> Mapping[str, T]:
    """A copy with this entry, in its old place or at the end."""
    copied = _copy(mapping)
    copied[key] = value
    return MappingProxyType(copied)


def without_entry(mapping: Mapping[str, T], key: str) -> Mapping[str, T]:
    copied = _copy(mapping)
    copied.pop(key, None)
    return MappingProxyType(copied)


def _copy(mapping: Mapping[str, T]) -> dict[str, T]:
    # a view has its own: asked for its items one by one it takes 15 times as long
    return mapping.copy() if isinstance(mapping, MappingProxyType) else dict(mapping)


def differing(before: Mapping[str, T], after: Mapping[str, T]) -> list[str]:
    """The keys of all that is not the very same in both: those of `after` in its order, then those that are gone."""
    if before is after:
        return []
    if is_continued(before, after):
        changed = compress(after, map(is_not, after.values(), before.values()))
        return [*changed, *islice(after, len(before), None)]
    gone = before.keys() - after.keys()
    return [*compress(after, map(is_not, after.values(), map(before.get, after))), *sorted(gone)]


def is_continued(before: Collection[str], after: Collection[str]) -> bool:
    """Whether `after` has all keys of `before` in the same order, and new ones at most behind them."""
    return len(before) <= len(after) and all(map(eq, before, after))
