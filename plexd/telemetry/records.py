"""Entries as they travel: the JSON of points, log entries and audit entries, written for speed
(docs/contract/telemetry.md §1).

Everything is text of one entry; the pipeline joins entries into arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from plexd.masking import mask
from plexd.telemetry.gaps import Gap
from plexd.wire.times import format_time

OWN_SOURCE = "plexd"
TRUNCATED = "[truncated]"
SHORTENED_BYTES = 1 << 10  # what stays of the text of an entry that was refused as too large

quote = json.JSONEncoder(ensure_ascii=False).encode


def encode(text: str) -> bytes:
    """UTF-8 with U+FFFD for what has no place in it."""
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def truncate(text: str, limit: int) -> tuple[str, bool]:
    """At most `limit` bytes of UTF-8, and whether something had to go; the mark is part of the limit."""
    if len(text) * 4 <= limit:  # no character has more bytes
        return text, False
    raw = encode(text)
    if len(raw) <= limit:
        return text, False
    return raw[: limit - len(TRUNCATED)].decode("utf-8", "ignore") + TRUNCATED, True


def clean(text: str) -> str:
    """Without NULs and without the node's own secrets."""
    return mask(text.replace("\0", "") if "\0" in text else text)


class Stamps:
    """Time stamps of the wire from microseconds; those of one second share their beginning."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, microseconds: int) -> str:
        second, fraction = divmod(microseconds, 1_000_000)
        if second != self._second:
            self._second = second
            try:
                self._text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            except (OverflowError, ValueError, OSError):  # a clock beyond year 9999
                self._text = "9999-12-31T23:59:59"
        if not fraction:
            return f"{self._text}Z"
        return f"{self._text}.{fraction:06d}".rstrip("0") + "Z"


class LogEncoder:
    """Writes log entries of one source and host."""

    def __init__(self, source: str, hostname: str, max_bytes: int) -> None:
        self._stamps = Stamps()
        self._source = f'","source":{quote(source)},"unit":'
        self._tail = f',"hostname":{quote(hostname)}}}'
        self._max_bytes = max_bytes
        self._units: dict[str, str] = {}

    def write(self, microseconds: int, unit: str, message: str, severity: str) -> tuple[bytes, bool]:
        """The entry, and whether its message had to be cut. `microseconds` since 1970."""
        message, cut = truncate(clean(message), self._max_bytes)
        quoted = self._units.get(unit)
        if quoted is None:
            if len(self._units) > 1000:  # units made by template, without end
                self._units.clear()
            quoted = self._units[unit] = quote(unit)
        head = f'{{"timestamp":"{self._stamps.text(microseconds)}{self._source}{quoted}'
        text = f'{head},"message":{quote(message)},"severity":"{severity}"{self._tail}'
        return encode(text), cut


def audit_entry(
    timestamp: float,
    source: str,
    event_type: str,
    subject: Mapping[str, Any],
    target: Mapping[str, Any],
    action: str,
    result: str,
    hostname: str,
    raw: str,
) -> bytes:
    """`raw` is already cleaned and cut. `target` is the member `object`."""
    return to_json(
        {
            "timestamp": format_time(timestamp),
            "source": source,
            "event_type": event_type,
            "subject": subject,
            "object": target,
            "action": action,
            "result": result,
            "hostname": hostname,
            "raw": raw,
        }
    )


def metric_point(timestamp: str, group: str, data: Mapping[str, Any], peer_id: str = "") -> bytes:
    """Values that are no number in JSON are left out. `timestamp` is in the form of the wire."""
    numbers = {key: value for key, value in data.items() if not isinstance(value, float) or math.isfinite(value)}
    peer = {"peer_id": peer_id} if peer_id else {}
    return to_json({"timestamp": timestamp, "group": group, **peer, "data": numbers})


def to_json(value: Mapping[str, Any]) -> bytes:
    return encode(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def log_marker(gap: Gap, now: float, hostname: str, unit: str) -> bytes:
    """`now` is in Unix seconds."""
    lost = "unknown" if gap.lost is None else gap.lost
    message = f"telemetry gap: source={gap.source} reason={gap.reason.value} lost={lost}"
    entry, _ = LogEncoder(OWN_SOURCE, hostname, 1 << 16).write(int(now * 1_000_000), unit, message, "warning")
    return entry


def audit_marker(gap: Gap, now: float, hostname: str) -> bytes:
    target = {
        "source": gap.source,
        "reason": gap.reason.value,
        "lost": -1 if gap.lost is None else gap.lost,
        "since": "" if gap.since is None else format_time(gap.since),
        "until": "" if gap.until is None else format_time(gap.until),
    }
    return audit_entry(now, OWN_SOURCE, "TELEMETRY_GAP", {"agent": "plexd"}, target, "gap", "unknown", hostname, "")


def shortened(body: bytes, member: str) -> bytes | None:
    """The entry with at most 1 KiB of the text in `member`; None when that makes it no smaller."""
    entry = json.loads(body)
    text = entry.get(member, "")
    cut, was_cut = truncate(text, SHORTENED_BYTES)
    if not was_cut:
        return None
    return to_json(entry | {member: cut})
