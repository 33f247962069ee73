"""Secrets: fetched from the control plane for one request, decrypted, answered, forgotten (docs/contract/node-api.md
§7).

Nothing is kept, neither on disk nor in memory, and no two callers share a fetch. What is told of a read, to the log and
to `on_read`, never holds the value.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from plexd.api.cipher import NONCE_BYTES, open_sealed
from plexd.api.http_server import Response
from plexd.api.routes import Call, Right, Route, refuse
from plexd.errors import ControlError, Forbidden, NotFound, RateLimited, WireError
from plexd.log import get_logger
from plexd.wire.mapping import bad_key
from plexd.wire.models import SecretResponse
from plexd.wire.values import decode_base64, path_segment

log = get_logger("api")

FETCHES_AT_ONCE = 4  # 8 are allowed, but all calls of this node share seven connections
QUEUE_SECONDS = 5.0
FETCH_SECONDS = 10.0
KEY_BYTES = 32


class SecretRead(NamedTuple):
    """An attempt to read a secret. `version` is None when there was none to read; `outcome` is "ok" or the code."""

    key: str
    version: int | None
    uid: int | None
    gid: int | None
    pid: int | None
    outcome: str


class Source(Protocol):
    """The registered node, as far as secrets concern it."""

    def node_secret_key(self) -> str:
        """Base64, as it came with the registration."""

    async def fetch(self, key: str) -> SecretResponse:
        """One try. Raises ControlError and WireError."""


class _Failed(Exception):
    """`response` says why."""

    def __init__(self, response: Response, outcome: str) -> None:
        super().__init__(outcome)
        self.response = response
        self.outcome = outcome


class SecretRoutes:
    """`source` is None until the node is registered; `on_read` hears of every attempt of an allowed caller, before
    there is an answer to it."""

    def __init__(self, source: Callable[[], Source | None]) -> None:
        self.on_read: list[Callable[[SecretRead], Awaitable[None]]] = []
        self._source = source
        self._slots = asyncio.Semaphore(FETCHES_AT_ONCE)

    def table(self) -> tuple[Route, ...]:
        return (Route("GET", "/v1/state/secrets/{key}", Right.SECRET, self._read),)

    async def _read(self, call: Call) -> Response:
        version: int | None = None
        outcome = "left"  # the caller, before there was an answer
        try:
            _check_key(call.key)
            answer = await self._fetch(call.key)
            version = answer.version
            response = _reveal(call.key, *answer)
            outcome = "ok"
        except _Failed as exc:
            response, outcome = exc.response, exc.outcome
        finally:
            await self._tell(call, version, outcome)
        return response

    async def _tell(self, call: Call, version: int | None, outcome: str) -> None:
        caller = call.request.caller
        uid, gid, pid = (caller.uid, caller.gid, caller.pid) if caller is not None else (None, None, None)
        key = call.key.encode(errors="replace").decode()
        log.info("secret read", key=key, version=version, uid=uid, pid=pid, outcome=outcome)
        for listener in self.on_read:
            await listener(SecretRead(key, version, uid, gid, pid, outcome))

    async def _fetch(self, key: str) -> _Sealed:
        source = self._source()
        if source is None:
            raise _unavailable("this node is not registered yet")
        try:
            # before the fetch: it belongs to the credential that the fetch is made with
            node_secret_key = decode_base64(source.node_secret_key(), KEY_BYTES)
        except ValueError:
            raise _failed(503, "nsk_unavailable", "this node has no key to decrypt secrets with") from None
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._slots.acquire()
        except TimeoutError:
            raise _unavailable("too many secrets are being read; try again") from None
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                answer = await source.fetch(key)
        except Forbidden:
            raise _failed(403, "secret_forbidden", "the control plane does not give this secret to this node") from None
        except NotFound:
            raise _failed(404, "not_found", "the control plane has no such secret for this node") from None
        except (ControlError, WireError, TimeoutError) as exc:
            seconds = exc.retry_after if isinstance(exc, RateLimited) else None
            raise _unavailable("the control plane gave no secret; plexd status says how it is", seconds) from None
        finally:
            self._slots.release()
        if answer.key != key:
            raise _failed(502, "secret_mismatch", "the control plane answered with another secret")
        return _Sealed(node_secret_key, answer.nonce, answer.ciphertext.get_secret_value(), answer.version)


class _Sealed(NamedTuple):
    node_secret_key: bytes
    nonce: str
    ciphertext: str
    version: int


def _reveal(key: str, node_secret_key: bytes, nonce: str, ciphertext: str, version: int) -> Response:
    try:
        sealed = base64.b64decode(ciphertext.encode("ascii"), validate=True)
        plaintext = open_sealed(node_secret_key, decode_base64(nonce, NONCE_BYTES), sealed)
    except ValueError:  # also of binascii, and of what is not ASCII
        raise _failed(500, "decryption_failed", "the secret could not be decrypted with this node's key") from None
    try:
        document: dict[str, object] = {"key": key, "value": plaintext.decode()}
    except UnicodeDecodeError:
        document = {"key": key, "value": base64.b64encode(plaintext).decode(), "encoding": "base64"}
    return Response(200, json.dumps({**document, "version": version}).encode())


def _check_key(key: str) -> None:
    try:
        key.encode()
        path_segment(key)
        fault = bad_key(key)
    except ValueError:  # of both: also what is no Unicode text
        fault = "cannot be sent"
    if fault:
        raise _failed(400, "invalid_key", "this cannot be the key of a secret")


def _failed(status: int, code: str, sentence: str, *headers: tuple[str, str]) -> _Failed:
    return _Failed(refuse(status, code, sentence, *headers), code)


def _unavailable(sentence: str, seconds: float | None = None) -> _Failed:
    headers = [("Retry-After", str(math.ceil(seconds)))] if seconds is not None else []
    return _failed(503, "control_plane_unavailable", sentence, *headers)
