"""Log records on stderr, one a line: for people, for programs, for the journal (docs/contract/operations.md §6).

A logger is made once in each module with `get_logger(component)` and used as `log.info("peer added", peer=...)`: a
constant lower-case message in the past tense, everything variable as a key. Until `set_up` ran, records go wherever
structlog sends them by default; tests capture them with `structlog.testing.capture_logs`.

Secrets are kept out twice: values of secret types print masked, raw bytes print as their number only, and
whatever `register_secret` was told is masked in the finished line, wherever it came from.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

from plexd.masking import mask, one_line, quoted

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
NAMES = {"warning": "warn", "critical": "fatal"}  # structlog's word: ours
PRIORITIES = {"debug": 7, "info": 6, "warn": 4, "error": 3, "fatal": 2}
COLOURS = {"debug": "2", "info": "32", "warn": "33", "error": "31", "fatal": "1;31"}
QUIET_SECONDS = 60.0  # identical warnings are said once in this time
REMEMBERED_WARNINGS = 1024


def get_logger(component: str) -> FilteringBoundLogger:
    """`component` is one word for the part of the program: mesh, events, registration."""
    return cast("FilteringBoundLogger", structlog.get_logger(component=component))


def set_up(
    level: str,
    log_format: str,
    *,
    environ: Mapping[str, str] = os.environ,
    stream: TextIO | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Send records of `level` (a key of LEVELS) and above to `stream`, by default stderr; may be called again."""
    out = stream or sys.stderr
    if log_format == "auto":
        log_format = detect_format(out, environ)
    colours = out.isatty() and "NO_COLOR" not in environ
    renderer = {"json": _as_json, "journal": _as_journal, "console": _in_colour if colours else _as_console}[log_format]
    structlog.configure(
        processors=[_level, _values, RateLimit(monotonic), _overhear, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: Sink(out),
        cache_logger_on_first_use=False,  # module loggers follow when this is called again
    )
    # What asyncio and the libraries say through the standard library would otherwise bypass format and masking.
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


def detect_format(stream: TextIO, environ: Mapping[str, str]) -> str:
    """What `auto` means: `journal` under systemd, `console` on a terminal, else `json`."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:  # no file behind it
        return "json"
    if environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
        return "journal"
    return "console" if stream.isatty() else "json"


# from the call to the line: each takes what the one before it returned


def _level(_: Any, method: str, record: EventDict) -> EventDict:
    record["level"] = NAMES.get(method, method)
    return record


def _values(_: Any, __: str, record: EventDict) -> EventDict:
    error = record.pop("exc_info", None)
    if error is True:
        error = sys.exception()
    plain = {key: _plain(value) for key, value in record.items()}
    if isinstance(error, BaseException):
        plain["exception"] = "".join(traceback.format_exception(error)).rstrip()
    elif isinstance(error, tuple) and error[0] is not None:
        plain["exception"] = "".join(traceback.format_exception(*error)).rstrip()
    return plain


def _plain(value: Any) -> Any:
    """The value in JSON's types. Secret types print masked; of raw bytes only the number is shown."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # JSON knows neither infinity nor NaN
    if type(value) in {bytes, bytearray, memoryview}:
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and type(value).__str__ is object.__str__:
        return [_plain(item) for item in value]
    return str(value)


class RateLimit:
    """Lets one of identical warnings through a minute; the next one after that says how many were held back."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._said: dict[str, tuple[float, int]] = {}  # oldest first

    def __call__(self, _: Any, __: str, record: EventDict) -> EventDict:
        if record["level"] != "warn":
            return record
        now = self._monotonic()
        text = json.dumps(record, sort_keys=True)
        since, held_back = self._said.get(text, (None, 0))
        if since is not None and now - since < QUIET_SECONDS:
            self._said[text] = (since, held_back + 1)
            raise structlog.DropEvent
        self._said.pop(text, None)
        if len(self._said) >= REMEMBERED_WARNINGS:
            del self._said[next(iter(self._said))]
        self._said[text] = (now, 0)
        return {**record, "suppressed": held_back} if held_back else record


Listener = Callable[[str, str, str], None]
_listeners: list[Listener] = []


def add_listener(listener: Listener) -> None:
    """Have `listener(level, component, text)` called for every record that is written."""
    _listeners.append(listener)


def _overhear(_: Any, __: str, record: EventDict) -> EventDict:
    if _listeners:
        level, component, message, rest = _parts(record)
        text = " ".join([f"{one_line(component)}: {one_line(message)}", *_pairs(rest)])
        for listener in _listeners:
            listener(level, component, text)
    return record


def _parts(record: EventDict) -> tuple[str, str, str, MutableMapping[str, Any]]:
    rest = dict(record)
    return rest.pop("level"), rest.pop("component", "-"), rest.pop("event"), rest


def _as_json(_: Any, __: str, record: EventDict) -> str:
    level, component, message, rest = _parts(record)
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    head = {"time": now, "level": level, "component": component, "message": message}
    keys = {f"{key}_" if key in head else key: value for key, value in rest.items()}
    return quoted({**head, **keys})


def _as_journal(_: Any, __: str, record: EventDict) -> str:
    level, component, message, rest = _parts(record)
    return f"<{PRIORITIES[level]}>" + " ".join([f"{one_line(component)}: {one_line(message)}", *_pairs(rest)])


def _as_console(_: Any, __: str, record: EventDict, paint: Callable[[str, str], str] = lambda _, text: text) -> str:
    level, component, message, rest = _parts(record)
    trace = rest.pop("exception", None)
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")[11:23]
    columns = [f"{now} {paint(level, f'{level.upper():<5}')} {one_line(component)}", one_line(message)]
    if rest:
        columns.append(" ".join(_pairs(rest)))
    return "  ".join(columns) + (f"\n{trace}" if trace else "")


def _in_colour(_: Any, __: str, record: EventDict) -> str:
    return _as_console(_, __, record, lambda level, text: f"\033[{COLOURS[level]}m{text}\033[0m")


def _pairs(rest: Mapping[str, Any]) -> list[str]:
    return [f"{one_line(key)}={_value(value)}" for key, value in rest.items()]


def _value(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and value and not set(value) & set(' "=')
    return value if plain else quoted(value)


class Sink:
    """Where lines end, masked. A reader that went away must not take the daemon with it; nobody is left to tell."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(mask(line) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # broken pipe, full disk; closed
            pass

    debug = info = warning = error = critical = msg


class _Forward(logging.Handler):
    """Records of the standard library's logging as records of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        write = get_logger("python").error if record.levelno >= logging.ERROR else get_logger("python").warning
        write("library message", logger=record.name, text=record.getMessage(), exc_info=record.exc_info)
