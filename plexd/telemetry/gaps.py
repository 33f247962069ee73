"""Holes in a source: whoever reads the stream sees each, without one marker for each (docs/contract/telemetry.md §2.9).

The first hole of a source and reason is marked where it is; what follows within a minute is added up and marked after
it. What is still owed is kept on disk by the pipeline, since the source's position passes it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, NamedTuple

SPACING_SECONDS = 60.0  # between two markers of one source and reason


class Reason(StrEnum):
    OVERFLOW = "overflow"
    KERNEL_OVERRUN = "kernel_overrun"
    CURSOR_LOST = "cursor_lost"
    ROTATED_AWAY = "rotated_away"
    TRUNCATED_FILE = "truncated_file"
    AGENT_DOWN = "agent_down"
    CORRUPT_STATE = "corrupt_state"


class Gap(NamedTuple):
    """`lost` entries, None where nobody knows; between `since` and `until` in Unix seconds, None for unknown."""

    source: str
    reason: Reason
    lost: int | None = None
    since: float | None = None
    until: float | None = None


def parse_gaps(stored: Any) -> list[Gap]:
    """From what became of gaps in a file; what can't be read is left out."""
    gaps = []
    for item in stored if isinstance(stored, list) else []:
        with suppress(TypeError, ValueError):
            source, reason, lost, since, until = item
            gaps.append(Gap(str(source), Reason(reason), lost, since, until))
    return gaps


class Gaps:
    """`owed` are gaps of an earlier process that were never delivered. `now` is monotonic everywhere."""

    def __init__(self, owed: Iterable[Gap] = ()) -> None:
        self._marked: dict[tuple[str, Reason], float] = {}
        self._deferred: dict[tuple[str, Reason], Gap] = {}
        self._on_their_way: list[Gap] = []
        for gap in owed:
            self._defer(gap)

    def note(self, gap: Gap, now: float) -> Gap | None:
        """The gap to mark at this place, None when a marker is owed for later."""
        key = gap.source, gap.reason
        if key in self._deferred or now - self._marked.get(key, float("-inf")) < SPACING_SECONDS:
            self._defer(gap)
            return None
        self._marked[key] = now
        return gap

    def due_at(self) -> float | None:
        """When the next owed marker may go."""
        return min((self._marked.get(key, float("-inf")) + SPACING_SECONDS for key in self._deferred), default=None)

    def due(self, now: float) -> list[Gap]:
        """Owed ones whose time has come; they are owed until `delivered`."""
        keys = [key for key in self._deferred if now - self._marked.get(key, float("-inf")) >= SPACING_SECONDS]
        gaps = [self._deferred.pop(key) for key in keys]
        self._marked |= dict.fromkeys(keys, now)
        self._on_their_way += gaps
        return gaps

    def delivered(self, gap: Gap) -> None:
        self._on_their_way.remove(gap)

    @property
    def owed(self) -> Sequence[Gap]:
        """What must not be forgotten."""
        return [*self._on_their_way, *self._deferred.values()]

    def _defer(self, gap: Gap) -> None:
        key = gap.source, gap.reason
        known = self._deferred.get(key)
        self._deferred[key] = gap if known is None else _sum(known, gap)


def _sum(one: Gap, other: Gap) -> Gap:
    lost = None if one.lost is None or other.lost is None else one.lost + other.lost
    since = [moment for moment in (one.since, other.since) if moment is not None]
    until = [moment for moment in (one.until, other.until) if moment is not None]
    return Gap(one.source, one.reason, lost, min(since, default=None), max(until, default=None))
