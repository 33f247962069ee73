"""Asks the metadata service of the cloud for a bootstrap token (docs/contract/lifecycle.md §2.2).

It is nobody the control plane knows: no proxy, no redirect, and no header that says who asks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Mapping

import httpx

from plexd.config.models import TokenMetadata
from plexd.control.network import root_cause, tls_context
from plexd.errors import RegistrationRefused
from plexd.log import get_logger

log = get_logger("registration")

SESSION_PATH = "/latest/api/token"
SESSION_SECONDS = 21600
SESSION_HEADER = "X-aws-ec2-metadata-token"
RETRY_SECONDS = 2.0
MAX_SESSION_BYTES = 512
MAX_TOKEN_BYTES = 512
MAX_ENCODED_BYTES = 1024

_SESSION = re.compile(r"[!-~]{1,512}", re.ASCII)


async def fetch_token(config: TokenMetadata) -> str:
    """What the service holds for this node, not yet checked to be a token; empty when nothing is to be had.

    Raises RegistrationRefused when there is something that cannot be a token.
    """
    transport = httpx.AsyncHTTPTransport(verify=tls_context(), trust_env=False)
    try:
        return await _Inquiry(config, transport).token()
    finally:
        await transport.aclose()


class _Inquiry:
    """One look; its retries share one time limit."""

    def __init__(self, config: TokenMetadata, transport: httpx.AsyncBaseTransport) -> None:
        self._config = config
        self._transport = transport
        self._no_retry_after = asyncio.get_running_loop().time() + config.wait.total_seconds()

    async def token(self) -> str:
        headers = dict(self._config.headers)
        if self._config.session:
            ttl = {f"{SESSION_HEADER}-ttl-seconds": str(SESSION_SECONDS)}
            session = (await self._ask("PUT", SESSION_PATH, ttl, MAX_SESSION_BYTES) or b"").decode("ascii", "replace")
            if _SESSION.fullmatch(session.strip()):
                headers[SESSION_HEADER] = session.strip()
        limit = MAX_ENCODED_BYTES if self._config.base64 else MAX_TOKEN_BYTES
        raw = await self._ask("GET", self._config.path, headers, limit)
        if raw is None:
            return ""
        if len(raw) > limit:
            raise RegistrationRefused(f"the metadata service answers more than {limit} bytes: that is not a token")
        return (_decoded(raw) if self._config.base64 else raw).decode("utf-8", "replace").strip()

    async def _ask(self, method: str, path: str, headers: Mapping[str, str], limit: int) -> bytes | None:
        """The body of a 200, cut one byte behind `limit`; None for everything else, and when nobody answers in time."""
        loop = asyncio.get_running_loop()
        url = self._config.base_url + path
        while True:
            try:
                async with asyncio.timeout(self._config.timeout.total_seconds()):
                    status, body = await self._exchange(httpx.Request(method, url, headers=headers), limit)
            except httpx.ConnectError as exc:
                outcome = f"cannot be reached: {root_cause(exc)}"
            except (httpx.HTTPError, OSError, TimeoutError) as exc:
                log.debug("metadata service not usable", method=method, url=url, reason=str(exc) or type(exc).__name__)
                return None
            else:
                if status < 500:
                    log.debug("metadata service answered", method=method, url=url, status=status)
                    return body if status == 200 else None
                outcome = f"answers {status}"
            log.debug("metadata service not ready", method=method, url=url, reason=outcome)
            if loop.time() + RETRY_SECONDS > self._no_retry_after:
                return None
            await asyncio.sleep(RETRY_SECONDS)

    async def _exchange(self, request: httpx.Request, limit: int) -> tuple[int, bytes]:
        response = await self._transport.handle_async_request(request)
        try:
            body = bytearray()
            assert isinstance(response.stream, httpx.AsyncByteStream)  # noqa: S101 - of an asynchronous transport
            async for chunk in response.stream:
                body += chunk
                if len(body) > limit:
                    break
            return response.status_code, bytes(body[: limit + 1])
        finally:
            await response.aclose()


def _decoded(raw: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as exc:
        raise RegistrationRefused("the metadata service answers something that is not base64") from exc
