"""What a pipeline says of itself (docs/contract/telemetry.md §6). Every entry ends under exactly one of these. Pure."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Any


class Dropped(StrEnum):
    """Why an entry was lost."""

    OVERFLOW = "overflow"
    OVERSIZE = "oversize"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"
    MALFORMED = "malformed"
    UNPROVISIONED = "unprovisioned"
    SHUTDOWN = "shutdown"
    SELF = "self"


class Counters:
    """All count from the start of the process. `bytes_sent` is what went over the wire."""

    def __init__(self) -> None:
        self.collected = 0
        self.filtered = 0
        self.empty = 0
        self.truncated = 0
        self.sent = 0
        self.batches_sent = 0
        self.batches_failed = 0
        self.bytes_sent = 0
        self.source_errors = 0
        self.kernel_lost = 0
        self.dropped: Counter[Dropped] = Counter()

    def imbalance(self, buffered: int, spooled: int) -> int:
        """What was collected and is nowhere; always 0."""
        return self.collected - self.filtered - self.empty - self.sent - self.dropped.total() - buffered - spooled

    def as_json(self) -> dict[str, Any]:
        return {
            "collected": self.collected,
            "filtered": self.filtered,
            "empty": self.empty,
            "truncated": self.truncated,
            "sent": self.sent,
            "batches_sent": self.batches_sent,
            "batches_failed": self.batches_failed,
            "bytes_sent": self.bytes_sent,
            "dropped": {reason.value: count for reason, count in sorted(self.dropped.items()) if count},
            "source_errors": self.source_errors,
        }
