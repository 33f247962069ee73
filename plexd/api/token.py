"""Who may do what over TCP: whoever shows the token, and calls us by a name that is ours (docs/contract/node-api.md
§2.2).
"""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import stat
import time
from collections.abc import Callable, Collection
from pathlib import Path

from plexd.api.http_server import Request, Response
from plexd.api.routes import Right, refuse
from plexd.errors import ListenerError
from plexd.log import get_logger
from plexd.masking import register_secret

log = get_logger("api")

CHECK_SECONDS = 5.0
MIN_CHARACTERS = 32
MAX_BYTES = 4096
OWN_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_BEARER = re.compile(r"(?i:bearer) (\S+)")
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::[0-9]*)?")

Identity = tuple[int, int, int]


class TokenFile:
    """The token as the file has it; a change is noticed when somebody asks, at most every five seconds."""

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Raises ListenerError when the file holds no usable token, or somebody else may read or change it."""
        self._path = path
        self._monotonic = monotonic
        try:
            self._token, self._seen = _read(path)
        except (OSError, ValueError) as exc:
            raise ListenerError(f"{path} gives no token for node_api.http: {exc}") from exc
        register_secret(self._token.decode())
        self._checked_at = monotonic()

    async def token(self) -> bytes:
        if self._monotonic() - self._checked_at >= CHECK_SECONDS:
            self._checked_at = self._monotonic()
            await asyncio.to_thread(self.read_again)
        return self._token

    def read_again(self) -> None:
        """New content that is no token leaves the old one in force. Blocks for the disk."""
        try:
            if _identity(self._path.stat()) == self._seen:
                return
            self._token, self._seen = _read(self._path)
        except (OSError, ValueError) as exc:
            log.error("token not read again", path=str(self._path), error=str(exc), next_step="the old one stays")
        else:
            register_secret(self._token.decode())
            log.info("token read again", path=str(self._path))


def _read(path: Path) -> tuple[bytes, Identity]:
    """Raises OSError, or ValueError with the reason."""
    # not waiting: it may be a pipe
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_uid not in {0, os.geteuid()}:
            raise ValueError(f"it belongs to user id {status.st_uid}, who may change it: chown {os.geteuid()} {path}")
        if status.st_mode & 0o077:
            raise ValueError(f"it is open to others than its owner: chmod 600 {path}")
        token = file.read(MAX_BYTES + 1).strip()
    if len(token) > MAX_BYTES or not re.fullmatch(rb"[\x21-\x7e]{%d,}" % MIN_CHARACTERS, token):
        raise ValueError(f"it must hold at least {MIN_CHARACTERS} printable characters without spaces")
    return token, _identity(status)


def _identity(status: os.stat_result) -> Identity:
    return status.st_mtime_ns, status.st_ino, status.st_size


class TokenGate:
    """`hosts` are accepted as `Host` besides the names every host has for itself."""

    def __init__(self, file: TokenFile, hosts: Collection[str], *, secrets: bool) -> None:
        self._file = file
        self._hosts = OWN_NAMES | {host.lower() for host in hosts}
        self._secrets = secrets

    async def check(self, request: Request, right: Right) -> Response | None:
        if request.header("origin") or not self._is_ours(request.header("host")):
            # a web page that had its name point here
            return refuse(
                403, "host_not_allowed", "this listener is not known by that name; see node_api.http.allowed_hosts"
            )
        if not await self._shows_token(request.header("authorization")):
            return refuse(401, "unauthorized", "the bearer token is missing or wrong", ("WWW-Authenticate", "Bearer"))
        if right is Right.SECRET and not self._secrets:
            return refuse(403, "secret_access_denied", "secrets are not given over TCP; see node_api.http.secrets")
        if right in {Right.READ, Right.REPORT, Right.SECRET}:
            return None
        return refuse(403, "access_denied", "this is not done over TCP")

    def _is_ours(self, hosts: Collection[str]) -> bool:
        matches = [_HOST.fullmatch(host) for host in hosts]
        return len(matches) == 1 and all(match and match[1].lower() in self._hosts for match in matches)

    async def _shows_token(self, values: Collection[str]) -> bool:
        shown = [match[1] for value in values if (match := _BEARER.fullmatch(value))]
        token = await self._file.token()
        return len(values) == len(shown) == 1 and hmac.compare_digest(shown[0].encode("latin-1"), token)
