"""Names to addresses, looked up in threads of their own.

asyncio looks names up in the executor that everything else shares, and gives up on a lookup without ending it: a dead
resolver would take all threads, and hold up the end of the process. Here a lookup that hangs costs only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

from plexd.errors import Unresolved
from plexd.mesh.address import format_ip, parse_ip

MAX_LOOKUPS = 64  # at once; hung ones end with the resolver's own limit
LIMIT_SECONDS = 5.0
DISCARD_PORT = 9


async def look_up(name: str) -> list[bytes]:
    """Those first that this host has a route to, and of these IPv4 (docs/contract/mesh.md §4.4).

    Raises Unresolved, also when it takes more than 5 s.
    """
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            infos = await asyncio.get_running_loop().getaddrinfo(
                name, 0, type=socket.SOCK_DGRAM, flags=socket.AI_ADDRCONFIG
            )
    except (OSError, TimeoutError, UnicodeError) as exc:
        reason = str(exc) or f"no answer in {LIMIT_SECONDS:.0f} s"
        raise Unresolved(f"{name} does not resolve: {reason}") from exc
    texts = (str(info[4][0]) for info in infos)
    found = [parse_ip(text) for text in texts if "%" not in text]  # nobody we look for is on our own link
    return sorted(found, key=lambda address: (not has_route(address), len(address) != 4))


def has_route(address: bytes) -> bool:
    """Whether a packet to it would leave this host now; none is sent.

    The families that the host has addresses in do not tell: the mesh address makes every host one with IPv4.
    """
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect((format_ip(address), DISCARD_PORT))
    except OSError:
        return False
    return True


def use_own_threads(loop: asyncio.AbstractEventLoop) -> None:
    """From now on `loop.getaddrinfo` does not touch the executor; httpx and asyncio's own connects use it too."""
    free = threading.Semaphore(MAX_LOOKUPS)

    async def getaddrinfo(host: Any, port: Any, **hints: int) -> Any:
        if not free.acquire(blocking=False):
            raise socket.gaierror(socket.EAI_AGAIN, "too many name lookups are waiting for an answer")
        found: asyncio.Future[Any] = loop.create_future()

        def finish(answer: Any, error: OSError | UnicodeError | None) -> None:
            if found.done():
                return
            if error is None:
                found.set_result(answer)
            else:
                found.set_exception(error)

        def look_up() -> None:
            answer, error = None, None
            try:
                answer = socket.getaddrinfo(host, port, **hints)
            except (OSError, UnicodeError) as exc:
                error = exc
            finally:
                free.release()
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(finish, answer, error)

        try:
            threading.Thread(target=look_up, name=f"lookup {host!r}", daemon=True).start()
        except RuntimeError as exc:  # this host, or our part of it, has no thread to spare
            free.release()
            raise socket.gaierror(socket.EAI_AGAIN, f"the name lookup was not started: {exc}") from exc
        return await found

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
