"""Prefixes by what they overlap: thousands of rules against thousands of peers without comparing each with each."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence

from plexd.mesh.address import Prefix

NONE = sys.maxsize
"""Greater than any number: no prefix answers the question."""


class PrefixIndex:
    """Prefixes with a number each; a question is answered by the least number among those it holds for.

    Put all in first, then ask. A question costs a look-up for every prefix length that occurs, and a walk over what
    lies inside the prefix asked about.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, dict[int, dict[int, int]]] = {32: {}, 128: {}}  # by family, length, network bits
        self._starts: dict[int, list[tuple[int, int]]] = {32: [], 128: []}  # first address, number
        self._sorted = True

    def put(self, prefix: Prefix, number: int) -> None:
        bits, first = _numeric(prefix)
        of_length = self._numbers[bits].setdefault(prefix.length, {})
        network = first >> (bits - prefix.length)
        of_length[network] = min(number, of_length.get(network, NONE))
        self._starts[bits].append((first, number))
        self._sorted = False

    def containing(self, prefix: Prefix) -> int:
        """The least number of a prefix that holds all of this one."""
        bits, first = _numeric(prefix)
        least = NONE
        for length, of_length in self._numbers[bits].items():
            if length <= prefix.length:
                least = min(least, of_length.get(first >> (bits - length), NONE))
        return least

    def overlapping(self, prefix: Prefix) -> int:
        """The least number of a prefix that has an address in common with this one."""
        least = self.containing(prefix)
        if prefix.is_host:
            return least
        if not self._sorted:
            for starts in self._starts.values():
                starts.sort()
            self._sorted = True
        bits, first = _numeric(prefix)
        starts = self._starts[bits]
        low = bisect_left(starts, (first, -1))
        high = bisect_left(starts, (first + (1 << (bits - prefix.length)), -1))
        return min(least, min((number for _, number in starts[low:high]), default=NONE))


def supernet(prefixes: Sequence[Prefix]) -> Prefix | None:
    """The longest prefix that holds all of these; None when none can, because families differ, or there are none."""
    if len({len(prefix.packed) for prefix in prefixes}) != 1:
        return None
    lowest, highest = min(prefixes), max(prefixes)
    bits, low = _numeric(lowest)
    _, high = _numeric(highest)
    common = bits - (low ^ high).bit_length()
    return Prefix.of(lowest.packed, min(common, *(prefix.length for prefix in prefixes)))


def _numeric(prefix: Prefix) -> tuple[int, int]:
    """Bits of an address of the family, and the first address as a number."""
    return len(prefix.packed) * 8, int.from_bytes(prefix.packed, "big")
