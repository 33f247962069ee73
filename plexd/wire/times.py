"""Time stamps of the wire: RFC 3339 with up to nine fraction digits (docs/contract/wire.md §6.3).

Inside plexd a moment is Unix seconds as a float. A time stamp that is only passed on stays text, so that no digit is
lost.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))", re.ASCII
)
_EPOCH_DAY = datetime(1970, 1, 1, tzinfo=UTC).toordinal()
_SECOND = 1_000_000_000
# 0001-01-01T00:00:00Z, how the control plane writes "not set"
_ZERO = (1 - _EPOCH_DAY) * 86_400 * _SECOND


def parse_nanoseconds(text: str) -> int | None:
    """Unix nanoseconds, None for "not set" (empty, or the first moment of year 1); ValueError when it is no time."""
    if not text:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError("is not an RFC 3339 time")
    year, month, day, hour, minute, second, fraction, sign, offset_hours, offset_minutes = match.groups()
    try:
        moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=UTC)
    except ValueError:
        raise ValueError("is not a date and time that exists") from None
    seconds = (moment.toordinal() - _EPOCH_DAY) * 86_400 + moment.hour * 3600 + moment.minute * 60 + moment.second
    if sign:
        offset = int(offset_hours) * 3600 + int(offset_minutes) * 60
        seconds += offset if sign == "-" else -offset
    nanoseconds = seconds * _SECOND + (int(fraction[:9].ljust(9, "0")) if fraction else 0)
    return None if nanoseconds == _ZERO else nanoseconds


def parse_time(text: str) -> float | None:
    """Unix seconds, None for "not set"; ValueError when it is no time."""
    nanoseconds = parse_nanoseconds(text)
    return None if nanoseconds is None else nanoseconds / _SECOND


def format_time(unix: float) -> str:
    """UTC with `Z`, to the microsecond, no trailing zeros in the fraction."""
    moment = datetime.fromtimestamp(unix, UTC)
    text = moment.replace(microsecond=0, tzinfo=None).isoformat()
    return f"{text}.{moment.microsecond:06d}".rstrip("0").rstrip(".") + "Z" if moment.microsecond else f"{text}Z"


def to_utc(text: str) -> str:
    """The same moment in the written form of the wire, all digits kept; `""` for "not set". ValueError as above."""
    nanoseconds = parse_nanoseconds(text)
    if nanoseconds is None:
        return ""
    seconds, fraction = divmod(nanoseconds, _SECOND)
    try:
        whole = format_time(seconds)
    except (OverflowError, ValueError):  # an offset can lead out of the years 1 to 9999
        raise ValueError("is not a date and time that exists") from None
    return whole if not fraction else f"{whole[:-1]}.{fraction:09d}".rstrip("0") + "Z"


def signed_form(text: str) -> str:
    """How a time stamp stands in the bytes that are signed: Go's own text of it, offset kept (docs/contract/events.md
    §3.1).

    `text` must be one that `parse_nanoseconds` takes.
    """
    head, offset = (text[:-1], "Z") if text.endswith("Z") else (text[:-6], text[-6:])
    whole, dot, fraction = head.partition(".")
    fraction = fraction[:9].rstrip("0")
    return f"{whole}{dot if fraction else ''}{fraction}{'Z' if offset in {'+00:00', '-00:00'} else offset}"
