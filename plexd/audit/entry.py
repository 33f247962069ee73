"""What an audit entry is before it travels (docs/contract/telemetry.md §1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

SUCCESS, FAILURE, UNKNOWN = "success", "failure", "unknown"  # there are no other results

Value = str | int | Sequence[str]


class Entry(NamedTuple):
    timestamp: str
    source: str
    event_type: str
    subject: Mapping[str, Value]
    object: Mapping[str, Value]
    action: str
    result: str
    hostname: str
    raw: str
