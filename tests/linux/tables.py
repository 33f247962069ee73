"""A scene with the table `inet plexd` in the namespace at hand, and what the real `nft` says of it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable

from plexd.linux.firewall import FirewallTable
from plexd.mesh.firewall import TABLE


def nft(*words: str) -> str:
    return subprocess.run(["nft", *words], check=True, capture_output=True, text=True).stdout


def play(scene: Callable[[FirewallTable], Awaitable[None]]) -> None:
    async def main() -> None:
        table = FirewallTable(TABLE)
        try:
            async with asyncio.timeout(60):
                await scene(table)
        finally:
            await table.close()

    asyncio.run(main())
