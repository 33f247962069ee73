"""Durations in Go's notation (docs/contract/wire.md §6.4); inside plexd they are seconds."""

from __future__ import annotations

import re

_UNITS = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,
    "\u03bcs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_MAX = 2**63 - 1  # nanoseconds, what the other side can hold

_TERM = re.compile(r"(\d*)(?:\.(\d*))?(ns|us|\u00b5s|\u03bcs|ms|s|m|h)", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds, never negative; ValueError when `text` is no such duration."""
    rest = text[1:] if text[:1] in {"+", "-"} else text
    total = 0
    if rest != "0":
        total = _nanoseconds(rest)
    if total > _MAX:
        raise ValueError("is too long a duration")
    if total and text.startswith("-"):
        raise ValueError("is a negative duration")
    return total / 1e9


def _nanoseconds(text: str) -> int:
    total = position = 0
    while position < len(text) or not text:
        match = _TERM.match(text, position)
        if match is None or not (match[1] or match[2]):
            raise ValueError("is not a duration")
        unit = _UNITS[match[3]]
        # digits beyond these mean nothing in 63 bits of nanoseconds, and int() has limits of its own
        whole, fraction = match[1].lstrip("0"), (match[2] or "")[:18]
        if len(whole) > 19:
            raise ValueError("is too long a duration")
        total += int(whole or "0") * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)
        position = match.end()
    return total


def format_duration(seconds: float) -> str:
    """As Go prints it, rounded to milliseconds. `seconds` must not be negative."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, fraction = divmod(milliseconds, 1000)
    text = f"{whole}.{fraction:03d}".rstrip("0") if fraction else str(whole)
    if hours:
        return f"{hours}h{minutes}m{text}s"
    return f"{minutes}m{text}s" if minutes else f"{text}s"
