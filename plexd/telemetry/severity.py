"""Severities of log entries, and which entries an operator wants (docs/contract/telemetry.md §4.3 and §4.6). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

NAMES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")  # by syslog priority
INFO = 6
ALIASES = {
    "emergency": "emerg", "panic": "emerg", "critical": "crit", "error": "err", "warn": "warning",
    "informational": "info",
}  # fmt: skip
OF_LEVELS = {"debug": 7, "info": 6, "warn": 4, "error": 3, "fatal": 2}  # of our own log records
REMEMBERED = 2000  # decisions


def parse_severity(text: str) -> int:
    """The priority of a name or alias. ValueError when it is none."""
    name = ALIASES.get(text.lower(), text.lower())
    if name not in NAMES:
        raise ValueError(f"{text} is no severity")
    return NAMES.index(name)


class Filter:
    """`min_severity` is the priority that is still wanted, None for all. Patterns: `*` is a wildcard, a name without
    a dot is a service, one that starts with `/` is about files. `own_unit` is never filtered.
    """

    def __init__(self, min_severity: int | None, include: Sequence[str], exclude: Sequence[str], own_unit: str) -> None:
        self._min_severity = min_severity
        self._units, self._files = _split(include)
        self._not_units, self._not_files = _split(exclude)
        self._own_unit = own_unit
        self._known: dict[str, bool] = {}

    def wants_unit(self, unit: str, priority: int) -> bool:
        """An entry that is of no file."""
        if unit == self._own_unit:
            return True
        if self._min_severity is not None and priority > self._min_severity:
            return False
        known = self._known.get(unit)
        if known is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            included = not (self._units or self._files) or _matches(unit, self._units)
            known = self._known[unit] = included and not _matches(unit, self._not_units)
        return known

    def wants_file(self, path: str, priority: int) -> bool:
        if self._min_severity is not None and priority > self._min_severity:
            return False
        included = not self._files or _matches(path, self._files)
        return included and not _matches(path, self._not_files)


def _split(patterns: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those about units, and those about files."""
    units = [pattern for pattern in patterns if not pattern.startswith("/")]
    units += [f"{pattern}.service" for pattern in units if "." not in pattern]
    return tuple(units), tuple(pattern for pattern in patterns if pattern.startswith("/"))


def _matches(text: str, patterns: Sequence[str]) -> bool:
    # only * is special: the other signs of fnmatch are ordinary in names of units and files
    return any(fnmatchcase(text, pattern.replace("[", "[[]").replace("?", "[?]")) for pattern in patterns)
