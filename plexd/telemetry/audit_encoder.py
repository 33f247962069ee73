"""Audit entries as they travel."""

from __future__ import annotations

import time
from collections.abc import Callable

from plexd.audit.entry import Entry
from plexd.telemetry.gaps import Gap
from plexd.telemetry.records import audit_marker, clean, shortened, to_json, truncate


class AuditEncoder:
    """Writes entries of this host; `max_raw` is the most that stays of the text of a record, in bytes."""

    def __init__(self, hostname: str, max_raw: int, now: Callable[[], float] = time.time) -> None:
        self.hostname = hostname
        self._max_raw = max_raw
        self._now = now

    def write(self, entry: Entry) -> tuple[bytes, bool]:
        """The entry as JSON, and whether its text had to be cut."""
        raw, cut = truncate(clean(entry.raw), self._max_raw)
        return to_json(entry._replace(raw=raw)._asdict()), cut

    def marker(self, gap: Gap) -> bytes:
        return audit_marker(gap, self._now(), self.hostname)

    def shorten(self, body: bytes) -> bytes | None:
        return shortened(body, "raw")
