"""Telemetry that the control plane took, per node and pipeline, and whether it is complete and in order.

Completeness can be judged where somebody numbered the entries: then every number must have arrived at least once, each
source's numbers in order but for repetitions, and what is missing must be covered by markers of gaps.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT_BYTES = 128 << 20  # of one pipeline of one node
_GAP = re.compile(r"telemetry gap: source=(?P<source>.*) reason=(?P<reason>\w+) lost=(?P<lost>\w+)")

Entry = Mapping[str, Any]


class Telemetry:
    """`take` is called with the body of what was answered with 202."""

    def __init__(self) -> None:
        self._batches: dict[tuple[str, str], deque[bytes]] = defaultdict(deque)
        self._bytes: Counter[tuple[str, str]] = Counter()

    def take(self, node_id: str, pipeline: str, batch: bytes) -> None:
        key = node_id, pipeline
        self._batches[key].append(batch)
        self._bytes[key] += len(batch)
        while self._bytes[key] > KEPT_BYTES:
            self._bytes[key] -= len(self._batches[key].popleft())

    def entries(self, node_id: str, pipeline: str) -> list[Entry]:
        """Those still kept, in the order of their arrival."""
        return [entry for batch in self._batches.get((node_id, pipeline), ()) for entry in json.loads(batch)]


@dataclass(slots=True)
class Sequence:
    """What arrived of one source's numbered entries.

    `missing` are numbers between the first and the last expected that never came, `disordered` those that came for
    the first time after a higher one, `repeated` how many came again.
    """

    arrived: int = 0
    repeated: int = 0
    missing: list[int] = field(default_factory=list)
    disordered: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Gap:
    """A marker. `lost` is None where it says unknown."""

    source: str
    reason: str
    lost: int | None


def follow(entries: Iterable[Entry], pattern: re.Pattern[str], expected: Mapping[str, int]) -> dict[str, Sequence]:
    """Judge numbered log entries. `pattern` finds source and number in a message, as groups of those names;
    `expected` says for each source how many there must be, numbered from 0."""
    seen: dict[str, set[int]] = {source: set() for source in expected}
    highest = dict.fromkeys(expected, -1)
    found = {source: Sequence() for source in expected}
    for entry in entries:
        match = pattern.search(entry["message"])
        if match is None or match["source"] not in expected:
            continue
        source, number = match["source"], int(match["number"])
        sequence = found[source]
        if number in seen[source]:
            sequence.repeated += 1
            continue
        seen[source].add(number)
        sequence.arrived += 1
        if number < highest[source]:
            sequence.disordered.append(number)
        highest[source] = max(highest[source], number)
    for source, count in expected.items():
        found[source].missing = [number for number in range(count) if number not in seen[source]]
    return found


def gaps(entries: Iterable[Entry]) -> list[Gap]:
    """The markers among log entries and audit entries."""
    found = []
    for entry in entries:
        if entry.get("event_type") == "TELEMETRY_GAP":
            lost = entry["object"]["lost"]
            found.append(Gap(entry["object"]["source"], entry["object"]["reason"], None if lost < 0 else lost))
        elif match := _GAP.fullmatch(entry.get("message", "")):
            lost = None if match["lost"] == "unknown" else int(match["lost"])
            found.append(Gap(match["source"], match["reason"], lost))
    return found
