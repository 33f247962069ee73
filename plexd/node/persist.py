"""Keeps the desired snapshot on disk, within a second of every change and off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from plexd.log import get_logger
from plexd.mesh.desired import Desired, SigningKeys
from plexd.node.state import Node
from plexd.runtime.waiting import to_its_end

log = get_logger("store")

GATHER_SECONDS = 0.3  # events come in bursts; one write takes them together
RETRY_SECONDS = 5.0


class SnapshotStore(Protocol):
    def save(self, node_id: str, desired: Desired, fetched_at: float) -> None:
        """Blocks for some fsyncs. Raises OSError."""

    def save_entries(self, desired: Desired) -> None:
        """Only what programs on this node read. Blocks for some fsyncs. Raises OSError."""


class KeyStore(Protocol):
    def save_signing_keys(self, keys: SigningKeys) -> None:
        """Blocks for some fsyncs. Raises OSError."""


class Persist:
    """`writing` is held while files are written: two writers could let the older content win.

    `on_new_signing_key` is told the key, and the id of the event that brought it, empty for a state pull.
    """

    name = "persist"

    def __init__(self, node: Node, snapshots: SnapshotStore, keys: KeyStore) -> None:
        self._node = node
        self._snapshots = snapshots
        self._keys = keys
        self._saved_keys = node.desired.signing_keys
        self._failed = False
        self.on_new_signing_key: list[Callable[[bytes, str], Awaitable[None]]] = []
        self.writing = asyncio.Lock()

    async def run(self) -> None:
        while True:
            await self._node.unsaved.wait()
            await asyncio.sleep(GATHER_SECONDS)
            if not await self.flush():
                await asyncio.sleep(RETRY_SECONDS)

    async def save_signing_keys(self, keys: SigningKeys, event_id: str = "") -> None:
        """Before a new set counts it is on disk; a disk that refuses delays nothing, `flush` tries again."""
        if self._saved_keys is not None and keys.current != self._saved_keys.current:
            for listener in self.on_new_signing_key:
                await listener(keys.current, event_id)
        try:
            async with self.writing:
                await to_its_end(asyncio.to_thread(self._keys.save_signing_keys, keys))
        except OSError as exc:
            log.error("signing keys not saved", error=str(exc), next_step="they are in force, saving is tried again")
        else:
            self._saved_keys = keys

    async def save_entries(self, desired: Desired) -> None:
        """Before metadata, data and secret index count they are on disk; a disk that refuses delays nothing."""
        async with self.writing:
            try:
                await to_its_end(asyncio.to_thread(self._snapshots.save_entries, desired))
            except OSError as exc:
                log.error("entries not saved", error=str(exc), next_step="they are in force, saving is tried again")

    async def flush(self) -> bool:
        """Write what is unsaved now; whether it worked. What could not be written stays unsaved."""
        async with self.writing:
            return await self._flush()

    async def _flush(self) -> bool:
        if not self._node.unsaved.is_set():
            return True
        self._node.unsaved.clear()
        # a snapshot is a value: what happens on the loop meanwhile makes another one and sets `unsaved` again
        node_id, desired, fetched_at = self._node.identity.node_id, self._node.desired, self._node.fetched_at
        try:
            await asyncio.to_thread(self._save, node_id, desired, fetched_at)
        except OSError as exc:
            self._node.unsaved.set()
            if not self._failed:
                log.error("snapshot not saved", error=str(exc), next_step="tried again every 5 s; check the disk")
            self._failed = True
            return False
        self._failed = False
        return True

    def _save(self, node_id: str, desired: Desired, fetched_at: float) -> None:
        if desired.signing_keys is not None and desired.signing_keys != self._saved_keys:
            self._keys.save_signing_keys(desired.signing_keys)
            self._saved_keys = desired.signing_keys
        self._snapshots.save(node_id, desired, fetched_at)
