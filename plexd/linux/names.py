"""Host names to addresses, without holding the event loop up."""

from __future__ import annotations

import asyncio
import socket

from plexd.errors import Unresolved
from plexd.mesh.address import parse_ip

LIMIT_SECONDS = 5.0


async def look_up(name: str) -> list[bytes]:
    """IPv4 first, of the families this host has addresses in. Raises Unresolved, also when it takes more than 5 s."""
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            infos = await asyncio.get_running_loop().getaddrinfo(
                name, 0, type=socket.SOCK_DGRAM, flags=socket.AI_ADDRCONFIG
            )
    except (OSError, TimeoutError, UnicodeError) as exc:
        reason = str(exc) or f"no answer in {LIMIT_SECONDS:.0f} s"
        raise Unresolved(f"{name} does not resolve: {reason}") from exc
    texts = [str(info[4][0]) for info in sorted(infos, key=lambda info: info[0] != socket.AF_INET)]
    return [parse_ip(text) for text in texts if "%" not in text]  # nobody we look for is on our own link
