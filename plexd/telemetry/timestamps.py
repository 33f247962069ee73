"""Time stamps and priorities that lines of log files begin with (docs/contract/telemetry.md §4.2). Pure."""

from __future__ import annotations

import re
import time
from datetime import datetime

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_SYSLOG = re.compile(r"([A-Z][a-z]{2}) +([0-9]{1,2}) ([0-9]{2}):([0-9]{2}):([0-9]{2})(?![0-9])", re.ASCII)
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.([0-9]+))?(?:Z|[+-][0-9]{2}:[0-9]{2})", re.ASCII
)
_PRIORITY = re.compile(r"<([0-9]{1,3})>", re.ASCII)
_DAY = 86_400


def split_priority(line: str) -> tuple[int | None, str]:
    """The syslog severity of a leading `<N>`, and the line without it; None and the line as it is without one."""
    if not line.startswith("<"):
        return None, line
    match = _PRIORITY.match(line)
    if match is None or int(match[1]) > 191:
        return None, line
    return int(match[1]) % 8, line[match.end() :]


def parse_stamp(line: str, now: float) -> int | None:
    """Microseconds since 1970 of the time that the line begins with, None without one. `now` is in Unix seconds."""
    if line[:1].isdigit():
        match = _RFC3339.match(line)
        if match is None:
            return None
        try:
            moment = datetime.fromisoformat(match[0])
        except ValueError:
            return None
        return round(moment.timestamp() * 1_000_000)
    match = _SYSLOG.match(line)
    return _of_this_year(match, now) if match is not None else None


def _of_this_year(match: re.Match[str], now: float) -> int | None:
    """In the local zone; the newest year that does not put it more than a day into the future."""
    month = _MONTHS.index(match[1]) + 1 if match[1] in _MONTHS else None
    day, hour, minute, second = (int(match[group]) for group in range(2, 6))
    if month is None or hour > 23 or minute > 59 or second > 60:
        return None
    year = time.localtime(now + _DAY).tm_year
    for candidate in range(year, year - 9, -1):  # the 29th of February is not in every year
        try:
            datetime(candidate, month, day)  # noqa: DTZ001 - only asks whether there is such a day
            seconds = time.mktime((candidate, month, day, hour, minute, second, 0, 0, -1))
        except (ValueError, OverflowError):
            continue
        if seconds <= now + _DAY:
            return int(seconds) * 1_000_000
    return None
