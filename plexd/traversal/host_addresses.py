"""Watches the addresses of this host: after a change peers may reach it elsewhere, or through another NAT."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from plexd.errors import KernelError
from plexd.log import get_logger

log = get_logger("nat")

DEBOUNCE_SECONDS = 2.0  # a host that changes its network loses addresses one by one, and waits for new ones


class Kernel(Protocol):
    """`readdressed` is set at every notification about an address, also when the address stays."""

    @property
    def readdressed(self) -> asyncio.Event: ...

    async def host_addresses(self) -> frozenset[bytes]:
        """The addresses by which other hosts may reach this one. Raises KernelError."""


class HostAddresses:
    name = "addresses"

    def __init__(self, kernel: Kernel, request: Callable[[str], None]) -> None:
        self._kernel = kernel
        self._request = request

    async def run(self) -> None:
        known = await self._look()
        while True:
            await self._kernel.readdressed.wait()
            await asyncio.sleep(DEBOUNCE_SECONDS)
            self._kernel.readdressed.clear()
            found = await self._look()
            # a router advertisement renews addresses every few minutes, and the kernel notifies each time
            if found is not None and found != known:
                log.info("host addresses changed", addresses=len(found))
                self._request("host addresses changed")
                known = found

    async def _look(self) -> frozenset[bytes] | None:
        try:
            return await self._kernel.host_addresses()
        except KernelError as exc:
            log.debug("host addresses not listed", error=str(exc))
            return None
