"""Replaces the node's WireGuard key (docs/contract/lifecycle.md §8).

The new key is on disk before it is offered, and offered until it is answered: the control plane may have accepted it
although the answer was lost. The rename of the pending key is the commit; whatever dies after it, the next start uses
the new key, and the pass brings it to the interface.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from plexd.errors import ControlError, NotFound, Unauthenticated, WireError
from plexd.log import get_logger
from plexd.masking import register_secret
from plexd.mesh.desired import Peer
from plexd.mesh.events import PeerAdded, RotationRequested
from plexd.mesh.fold import Unfoldable
from plexd.mesh.keys import PrivateKey, PublicKey
from plexd.node.state import Node
from plexd.runtime.component import Component, Envelope
from plexd.runtime.waiting import to_its_end

log = get_logger("rotation")

REPEAT_SECONDS = 60.0


class ControlPlane(Protocol):
    async def rotate_key(self, new_key: PublicKey) -> Sequence[Peer]:
        """The peers with new records. Retried without end. Raises ControlError, or WireError."""


class KeyStore(Protocol):
    """The pending key on disk; every call blocks for an fsync."""

    def pending_key(self) -> PrivateKey | None: ...

    def make_pending_key(self) -> PrivateKey: ...

    def drop_pending_key(self) -> None: ...

    def commit_pending_key(self) -> None: ...


class Rotation:
    """One rotation at a time; a request during one is absorbed. A pending key found at start continues.

    `on_accepted` is told the key that the control plane took, before it is committed: perhaps twice, never not at all.
    """

    name = "rotation"

    def __init__(
        self,
        control: ControlPlane,
        keys: KeyStore,
        node: Node,
        apply_event: Callable[[], Awaitable[bool]],
        request_pull: Callable[[str], None],
    ) -> None:
        self.on_rotated: list[Callable[[], None]] = []
        self._control = control
        self._keys = keys
        self._node = node
        self._apply_event = apply_event
        self._request_pull = request_pull
        self.on_accepted: list[Callable[[PublicKey], Awaitable[None]]] = []
        self._wanted = asyncio.Event()
        node.on_renewed.append(self._wanted.clear)  # a new node has a new key

    def component(self) -> Component:
        return Component(services=(self,), events={RotationRequested: self._on_event})

    async def _on_event(self, _event: RotationRequested, _envelope: Envelope) -> None:
        self.request("event")

    def request(self, reason: str) -> None:
        log.info("key rotation requested", reason=reason)
        self._wanted.set()

    async def run(self) -> None:
        if self._node.identity.private_key is None or await asyncio.to_thread(self._keys.pending_key) is not None:
            self._wanted.set()
        while True:
            await self._wanted.wait()
            await self._node.accepted.wait()
            if await self._rotate():
                self._wanted.clear()

    async def _rotate(self) -> bool:
        """Whether the rotation is over, one way or the other."""
        try:
            key = await to_its_end(asyncio.to_thread(self._keys.make_pending_key))
        except OSError as exc:
            log.error("new key not stored", error=str(exc), next_step="tried again in a minute; check the disk")
            await asyncio.sleep(REPEAT_SECONDS)
            return False
        register_secret(key.reveal())
        try:
            updated = await self._control.rotate_key(key.public())
        except Unauthenticated:
            # goes on with the same key; a heartbeat finds out meanwhile whether the identity is refused
            await asyncio.sleep(REPEAT_SECONDS)
            return False
        except WireError as exc:
            log.warning("answer to key rotation not usable", error=str(exc))
            await asyncio.sleep(REPEAT_SECONDS)
            return False
        except ControlError as exc:
            reason = "not supported by the control plane" if isinstance(exc, NotFound) else str(exc)
            if self._node.identity.private_key is None:
                log.error("new key refused", reason=reason, next_step="without one there is no mesh; tried again")
                await asyncio.sleep(REPEAT_SECONDS)
                return False
            await to_its_end(asyncio.to_thread(self._keys.drop_pending_key))
            log.error("key rotation refused", reason=reason, next_step="the old key stays")
            return True
        for witness in self.on_accepted:
            await witness(key.public())
        await to_its_end(self._commit(key))
        for peer in updated:
            try:
                self._node.fold(PeerAdded(peer))
            except Unfoldable as exc:
                log.warning("updated peer ignored", peer=peer.id, reason=str(exc))
        await self._apply_event()
        log.info("key rotated", public_key=key.public().short, peers_updated=len(updated))
        self._request_pull("key rotation")
        for listener in self.on_rotated:
            listener()
        return True

    async def _commit(self, key: PrivateKey) -> None:
        """On disk first; from then on there is no other key."""
        await asyncio.to_thread(self._keys.commit_pending_key)
        self._node.rotate(replace(self._node.identity, private_key=key))
