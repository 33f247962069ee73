"""Speaks with the daemon over its socket, and says why when that is not possible.

With the standard library's HTTP client, which answers twice as fast as one that has to be imported first.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plexd.errors import FatalError
from plexd.masking import one_line

CONNECT_SECONDS = 2.0
TOTAL_SECONDS = 10.0
GROUP = "plexd"


class NotReachable(FatalError):
    """Nobody listens where the daemon should."""

    exit_code = 3


class NotThere(FatalError):
    """The daemon knows nothing of the name asked for."""

    exit_code = 4


class Denied(FatalError):
    """The daemon, or the mode of its socket, refuses the caller."""


class Failed(FatalError):
    """The daemon answered that it cannot, or did not answer in time."""


def show(text: str) -> None:
    print(text, end="" if text.endswith("\n") else "\n")


def ask(
    path: Path,
    route: str,
    *,
    as_json: bool,
    method: str = "GET",
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> str:
    """The body of a good answer. With `as_json` the body of a bad one goes to stdout before the error is raised."""
    answer, text = exchange(path, method, route, body, headers or {})
    if 200 <= answer < 300:
        return text
    if as_json:
        show(text)
    try:
        sentence = _printable(str(json.loads(text)["error"]))
    except (ValueError, KeyError, TypeError):
        sentence = f"the daemon answered with status {answer}"
    raise (NotThere if answer == 404 else Failed)(sentence)


def decode(body: str) -> Any:
    """The document of an answer, for a person to read: texts in it come from elsewhere, and may hold what a terminal
    would obey. Raises Failed when it is none.
    """
    try:
        return _printable(json.loads(body))
    except ValueError:
        raise Failed("the daemon gave no usable answer; see its log") from None


def _printable(value: Any) -> Any:
    """The same with every control character in its texts spelled out."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, list):
        return [_printable(each) for each in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(each) for name, each in value.items()}
    return value


def exchange(
    path: Path,
    method: str,
    route: str,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    seconds: float = TOTAL_SECONDS,
) -> tuple[int, str]:
    """Status and body of whatever the daemon answers. Raises NotReachable, Denied, or Failed without an answer."""
    with _within(seconds):
        try:
            with contextlib.closing(_connect(path)) as connection:
                connection.request(method, route, None if body is None else body.encode(), headers or {})
                response = connection.getresponse()
                return response.status, response.read().decode()
        except TimeoutError as exc:
            raise Failed(f"the daemon at {path} did not answer in time; see its log") from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise Failed(f"the daemon at {path} gave no usable answer ({exc}); see its log") from exc


def _connect(path: Path) -> http.client.HTTPConnection:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(CONNECT_SECONDS)
    try:
        sock.connect(str(path))
    except PermissionError:
        sock.close()
        raise Denied(f"no permission to ask the daemon at {path}: be root, or a member of the group {GROUP}") from None
    except OSError as exc:
        sock.close()
        if isinstance(exc, TimeoutError):
            raise
        raise NotReachable(f"daemon not reachable at {path}") from exc
    sock.settimeout(None)  # the caller's limit is for the whole
    connection = http.client.HTTPConnection("localhost")
    connection.sock = sock
    return connection


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError after that time, however the work is divided; for the main thread."""

    def interrupt(_number: int, _frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
