"""Snapshots share what they have in common: a mapping is copied with some entries changed, and remembers which.

With ten thousand peers every event pays for each walk over all of them. What one event changed is therefore asked of
the copy; where more lies between two mappings they are compared in bulk, which C does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any, NoReturn, Self, TypeVar
from weakref import ref

K = TypeVar("K")
T = TypeVar("T")

AT_ONCE = 256
_ABSENT: Any = object()


class Shared(dict[K, T]):
    """A mapping for many to hold, which nobody changes."""

    __slots__ = ("__weakref__", "_before", "_touched")

    def __init__(
        self,
        entries: Mapping[K, T] | Iterable[tuple[K, T]] = (),
        before: Shared[K, T] | None = None,
        touched: Collection[K] = (),
    ) -> None:
        super().__init__(entries)
        self._before = ref(before) if before is not None else None  # weak: nobody else keeps what was
        self._touched = touched

    def __setitem__(self, key: K, value: T) -> NoReturn:
        raise TypeError("shared with others: make a changed copy")

    def __delitem__(self, key: K) -> NoReturn:
        raise TypeError("shared with others: make a changed copy")

    def changed(self, put: Mapping[K, T], gone: Collection[K] = ()) -> Self:
        """A copy with the entries of `put`, each in its old place or at the end, and without those `gone`."""
        copied = type(self)(self, self, tuple(dict.fromkeys((*put, *gone))))
        copied.update(put)
        for key in gone:
            copied.pop(key, None)
        return copied

    def touched_since(self, before: Mapping[K, T]) -> Collection[K] | None:
        """The keys that may differ, should this be a changed copy of `before`; None where it is not."""
        return self._touched if self._before is not None and self._before() is before else None


def with_changes(mapping: Mapping[K, T], put: Mapping[K, T], gone: Collection[K] = ()) -> Shared[K, T]:
    return (mapping if isinstance(mapping, Shared) else Shared(mapping)).changed(put, gone)


def differing(before: Mapping[K, T], after: Mapping[K, T]) -> list[K]:
    """The keys of all that is not equal in both: new ones in the order of `after`, the rest in no certain one."""
    if before is after:
        return []
    touched = after.touched_since(before) if isinstance(after, Shared) else None
    if touched is not None:
        return [key for key in touched if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    start, end = _trimmed(before, after)
    was = dict(islice(before.items(), start, len(before) - end))
    now = dict(islice(after.items(), start, len(after) - end))
    changed = [key for key, value in now.items() if key not in was or was[key] != value]
    return changed + [key for key in was if key not in now]


def is_in_order(before: Mapping[K, T], after: Mapping[K, T]) -> bool:
    """Whether what `after` still has of `before` comes first and in the same order."""
    if before is after or (isinstance(after, Shared) and after.touched_since(before) is not None):
        return True
    kept = [key for key in before if key in after]
    return kept == list(islice(after, len(kept)))


def _trimmed(before: Mapping[K, T], after: Mapping[K, T]) -> tuple[int, int]:
    """How many entries are the same at the beginning, and how many of the others at the end."""
    old_keys, new_keys, old, new = list(before), list(after), list(before.values()), list(after.values())
    start = min(_alike(old_keys, new_keys), _alike(old, new))
    shorter = min(len(old), len(new)) - start
    if not shorter:
        return start, 0
    return start, min(shorter, _alike(old_keys[::-1], new_keys[::-1]), _alike(old[::-1], new[::-1]))


def _alike(one: list[Any], other: list[Any]) -> int:
    """How many are the same at the beginning of both. Of what is the very same C compares the pointers."""
    at, length = 0, min(len(one), len(other))
    while at < length and one[at : at + AT_ONCE] == other[at : at + AT_ONCE]:
        at += AT_ONCE
    while at < length and one[at] == other[at]:
        at += 1
    return min(at, length)
