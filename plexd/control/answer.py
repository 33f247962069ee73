"""What the status and headers of an answer mean for the caller (docs/contract/wire.md §4). No I/O."""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from plexd.errors import (
    Conflict,
    ControlError,
    Forbidden,
    Misconfigured,
    NotFound,
    RateLimited,
    Rejected,
    TooLarge,
    Transient,
    Unauthenticated,
)

SHORTEST_RETRY_AFTER_SECONDS = 1.0
LONGEST_RETRY_AFTER_SECONDS = 3600.0

_SECONDS = re.compile(r"[0-9]+", re.ASCII)
_CLASSES: dict[int, type[ControlError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: NotFound,
    408: Transient,
    409: Conflict,
    413: TooLarge,
    425: Transient,
    429: RateLimited,
    501: NotFound,
}


def error_class(status: int) -> type[ControlError] | None:
    """None for success."""
    if 200 <= status < 300:
        return None
    if status in _CLASSES:
        return _CLASSES[status]
    if 300 <= status < 400:
        return Misconfigured
    return Rejected if 400 <= status < 500 else Transient


def describe_status(status: int) -> str:
    """The number, with its name where it has one."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def parse_http_date(text: str) -> float | None:
    """Unix seconds of a Date or Retry-After header, None when it is none."""
    try:
        moment = parsedate_to_datetime(text)
        # "-0000" and the form without zone (asctime) mean UTC
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def parse_retry_after(text: str, now: float, longest: float = LONGEST_RETRY_AFTER_SECONDS) -> float | None:
    """Seconds to wait, between 1 and `longest`; None for what is neither whole seconds nor a date.

    `now` is the control plane's time where known, because its dates are measured by its own clock.
    """
    text = text.strip()
    if _SECONDS.fullmatch(text):
        # Python refuses to convert thousands of digits; nine are more than any clamp
        seconds = float(text) if len(text) <= 9 else longest
    elif (moment := parse_http_date(text)) is not None:
        seconds = moment - now
    else:
        return None
    return min(max(seconds, SHORTEST_RETRY_AFTER_SECONDS), longest)
