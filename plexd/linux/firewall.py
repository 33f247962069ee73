"""The table `inet plexd` in the kernel: replaced or amended, and known to be untouched without being read each time.

After it was put there it is read back once. What it looked like then, with the elements that its sets were given, is
what it must look like ever after. The kernel numbers the states of all its tables together: as long as that number is
the one of the last reading, or of amendments since that no other change came between, ours is the one that is wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from plexd.errors import FirewallUnavailable, KernelError, PolicyRejected
from plexd.linux import nftables
from plexd.linux.nftables import Nftables
from plexd.mesh.changes import Outcome, ReplaceTable, TableChange
from plexd.mesh.firewall import Ruleset, SetChange, amendment
from plexd.mesh.nft_commands import FAMILY, Json
from plexd.mesh.table_reading import fingerprint
from plexd.runtime.threads import in_mesh_thread


class FirewallTable:
    """`writes` counts the transactions that changed something, `reads` how often the table was read."""

    def __init__(self, table: str) -> None:
        self.name = f"{FAMILY} {table}"
        self.writes = 0
        self.reads = 0
        self._table = table
        self._nft = Nftables(table)
        self._put: Ruleset | None = None  # what was last put there
        self._is_intact = False  # as far as is known
        self._fingerprint: str | None = None  # of how that was read back, None until it was
        self._generation: int | None = None  # in which it is known what the table is
        self._known = range(0)  # the generations that tell nobody anything: the last reading and what we made of it
        self._found: str | None = None  # in that generation

    async def observe(self) -> str | None:
        """The digest of the ruleset that is in force untouched; "" for an unknown table of that name, None for none.

        A kernel without nf_tables has no table. Raises KernelError.

        A table that there is no program to list is one that is not known: it is left in force, and nothing is built on
        its being untouched.
        """
        try:
            generation = self._nft.generation()
        except FirewallUnavailable:  # who wants to put one there is told why not
            return None
        if generation != self._generation:
            try:
                table = await self.read()
            except FirewallUnavailable:
                self._is_intact = False
                return ""
            self._found = await in_mesh_thread(self._judge, table)  # 50 ms for ten thousand rules
            self._is_intact = self._put is not None and self._found == self._put.digest
            self._generation = generation
            self._known = range(generation, generation + 1)
        return self._found

    def _judge(self, table: Json | None) -> str | None:
        if table is None:
            return None
        if self._put is None:
            return ""
        seen = fingerprint(table, self._put.sets)
        if self._fingerprint is None:
            self._fingerprint = seen
        return self._put.digest if seen is not None and seen == self._fingerprint else ""

    async def watch(self, noticed: asyncio.Event) -> None:
        """Set `noticed` when a look at the table may show something else than the last one. Raises OSError."""
        await nftables.watch(self._table, lambda generation: generation in self._known, noticed)

    async def replace(self, ruleset: Ruleset) -> None:
        """By an amendment where that will do, which keeps the counters. Raises KernelError; the table that was there is
        then still there."""
        if ruleset.fault:
            raise PolicyRejected(ruleset.fault)
        if self._put is not None and self._is_intact:
            changes = amendment(self._put, ruleset)
            if changes and await self._amend(changes):
                self._put = ruleset
                self._found = ruleset.digest
                return
        self._forget_generation()  # whatever happens now, it is looked at again
        self.writes += 1
        await self._nft.apply(await in_mesh_thread(ruleset.document))
        self._put, self._fingerprint, self._is_intact = ruleset, None, True

    async def _amend(self, changes: tuple[SetChange, ...]) -> bool:
        """Whether it could be done. The generation stays known if no other change came in between.

        Where it could not be done the table is not what it was thought to be.
        """
        generation, known = self._generation, self._known
        self._generation = None
        self.writes += 1
        try:
            if generation is not None:
                # the watch may hear of it sooner than we do
                self._known = range(known.start, generation + 2)
                if await self._nft.amend(changes, generation):
                    self._generation = generation + 1
                    return True
                self._known = range(0)
            return await self._nft.amend(changes)
        except KernelError:
            return False

    def _forget_generation(self) -> None:
        self._generation, self._known = None, range(0)

    async def apply(self, changes: Sequence[TableChange]) -> list[Outcome]:
        """Try each change; the outcome of one that failed says why."""
        return [await self._attempt(change) for change in changes]

    async def _attempt(self, change: TableChange) -> Outcome:
        try:
            if isinstance(change, ReplaceTable):
                await self.replace(change.ruleset)
            else:
                await self.remove()
        except KernelError as exc:
            return Outcome(change, str(exc), exc)
        except OSError as exc:
            doing = "replace" if isinstance(change, ReplaceTable) else "delete"
            cause = KernelError(f"could not {doing} table {self.name}: {exc.strerror or exc}")
            return Outcome(change, str(cause), cause)
        return Outcome(change)

    async def remove(self) -> bool:
        """Whether there was one to remove; absent is done. Raises KernelError."""
        self._forget_generation()
        self._put, self._fingerprint, self._is_intact = None, None, False
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
