"""The table `inet plexd` in the kernel: replaced whole, and known to be untouched without being read each time.

After it was put there it is read back once, and what it looked like then is what it must look like ever after. The
kernel numbers the states of all its tables together: as long as that number is the one of the last reading, ours is
the one that was read.
"""

from __future__ import annotations

import asyncio

from plexd.errors import FirewallUnavailable, PolicyRejected
from plexd.linux import nftables
from plexd.linux.nftables import Nftables
from plexd.mesh.firewall import Json, Ruleset, fingerprint


class FirewallTable:
    """`writes` counts the transactions that changed something, `reads` how often the table was read."""

    def __init__(self) -> None:
        self.writes = 0
        self.reads = 0
        self._nft = Nftables()
        self._digest = ""  # of what was last put there, "" before
        self._fingerprint: str | None = None  # of how that was read back, None until it was
        self._generation: int | None = None  # of the last reading
        self._found: str | None = None  # by the last reading

    async def observe(self) -> str | None:
        """See `Observed.firewall`. Where nftables does not work at all there is none. Raises KernelError."""
        try:
            generation = self._nft.generation()
            if generation != self._generation:
                table = await self.read()
                self._found = await asyncio.to_thread(self._judge, table)  # 50 ms for ten thousand rules
                self._generation = generation
        except FirewallUnavailable:  # who wants to put one there is told why not
            return None
        return self._found

    def _judge(self, table: Json | None) -> str | None:
        if table is None:
            return None
        if not self._digest:
            return ""
        seen = fingerprint(table)
        if self._fingerprint is None:
            self._fingerprint = seen
        return self._digest if seen == self._fingerprint else ""

    async def watch(self, noticed: asyncio.Event) -> None:
        """Set `noticed` when a look at the table may show something else than the last one. Raises OSError."""
        await nftables.watch(lambda generation: generation == self._generation, noticed)

    async def replace(self, ruleset: Ruleset) -> None:
        """Raises KernelError; the table that was there is then still there."""
        if ruleset.fault:
            raise PolicyRejected(ruleset.fault)
        self._generation = None  # whatever happens now, it is looked at again
        self.writes += 1
        await self._nft.apply(ruleset.document)
        self._digest, self._fingerprint = ruleset.digest, None

    async def remove(self) -> bool:
        """Whether there was one to remove; absent is done. Raises KernelError."""
        self._generation = None
        self._digest, self._fingerprint = "", None
        try:
            self._nft.generation()
        except FirewallUnavailable:  # where there is no nftables there is no table
            return False
        was_there = await self._nft.delete_table()
        self.writes += was_there
        return was_there

    async def read(self) -> Json | None:
        """The table as nft tells it, None when there is none. Raises KernelError."""
        self.reads += 1
        return await self._nft.read_table()

    async def close(self) -> None:
        await self._nft.close()
