"""The node's live state: who it is and what is wanted of it. One writer at a time, since all run on one event loop.

The desired snapshot is an immutable value; replacing it wakes whoever keeps it on disk. The generation counts what the
control plane said of the snapshot outside of state pulls, so that a slow pull cannot undo an event
(docs/contract/lifecycle.md §7.3).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from pydantic import SecretStr

from plexd.log import get_logger
from plexd.mesh.desired import Desired, EndpointSource, FullState, SigningKeys
from plexd.mesh.events import EndpointOffered, Foldable
from plexd.mesh.fold import expire_signing_key, fold, replace_state
from plexd.mesh.keys import PublicKey
from plexd.node.connection_status import ConnectionStatus
from plexd.node.health import Condition, Health
from plexd.store.identity import Identity

log = get_logger("node")


class Node:
    """`identity` and `desired` may be read at any time; they change only through the methods.

    `suspected` is set from a 401 until it is known what it meant, and `settled` otherwise; `accepted` is clear while a
    refusal stands. `connection` belongs to the services that speak with the control plane.
    """

    def __init__(
        self,
        identity: Identity,
        desired: Desired,
        fetched_at: float,
        health: Health,
        accepted: asyncio.Event | None = None,
    ) -> None:
        self.identity = identity
        self.desired = desired
        self.fetched_at = fetched_at
        self.connection = ConnectionStatus()
        self.generation = 0
        self.unsaved = asyncio.Event()
        self.suspected = asyncio.Event()
        self.settled = asyncio.Event()
        self.settled.set()
        self.accepted = accepted or asyncio.Event()
        self.accepted.set()
        self.on_signing_keys: list[Callable[[], None]] = []
        self.on_refused: list[Callable[[], None]] = []
        self.on_entries: list[Callable[[], None]] = []
        self.on_renewed: list[Callable[[], None]] = []
        self._health = health

    # desired snapshot

    def fold(self, event: Foldable) -> bool:
        """Fold an event in; whether that changed anything. Raises mesh.fold.Unfoldable."""
        changed = self._take(fold(self.desired, event), "event")
        # what we know already may be news to a state answer on its way; only the answers to endpoint reports, which
        # are no events, say the same again and again
        is_report = isinstance(event, EndpointOffered) and event.source is EndpointSource.REPORT
        self.generation += changed or not is_report
        return changed

    def replace(self, state: FullState, fetched_at: float) -> None:
        """Take over a state pull that was answered at `fetched_at` (Unix seconds)."""
        self.fetched_at = fetched_at
        self._take(replace_state(self.desired, state), "state")

    def adopt_signing_keys(self, keys: SigningKeys | None) -> None:
        """Keys found on disk at start, before anything else happens."""
        self.desired = replace(self.desired, signing_keys=keys)

    def rotate(self, identity: Identity) -> None:
        """A new private key is in force."""
        self.identity = identity
        self.generation += 1

    def expire_signing_key(self, now: float) -> None:
        """Drop the previous signing key if its time is over; `now` in Unix seconds."""
        self._take(expire_signing_key(self.desired, now), "transition over")

    def _take(self, desired: Desired, source: str) -> bool:
        """`source`: whom the change comes from."""
        if desired is self.desired:
            return False
        was = self.desired
        keys_changed = desired.signing_keys != was.signing_keys
        # folding leaves the mappings it does not change
        entries_changed = any(getattr(desired, n) is not getattr(was, n) for n in ("metadata", "data", "secret_refs"))
        self.desired = desired
        self.unsaved.set()
        if keys_changed:
            log.info(
                "signing keys changed",
                **_shown(was.signing_keys, "was_"),
                **_shown(desired.signing_keys),
                source=source,
            )
            for listener in self.on_signing_keys:
                listener()
        if entries_changed:
            for listener in self.on_entries:
                listener()
        return True

    # standing with the control plane

    def credential(self) -> SecretStr:
        return self.identity.node_key

    def suspect(self, credential: SecretStr) -> None:
        """A call made with `credential` was answered with 401. One such answer proves nothing: a heartbeat confirms."""
        if credential == self.identity.node_key and self.accepted.is_set():
            self.suspected.set()
            self.settled.clear()

    def refuse(self) -> None:
        """The refusal is confirmed: deliveries wait. Mesh, caches and process stay as they are."""
        if self.accepted.is_set():
            self.accepted.clear()
            self._health.set(Condition.IDENTITY_REFUSED, True, "heartbeats are refused")
            log.error(
                "identity refused",
                node_id=self.identity.node_id,
                next_step="deliveries wait and the mesh stays; if the node was removed, provide a new bootstrap token",
            )
            for listener in self.on_refused:
                listener()

    def accept(self, credential: SecretStr) -> None:
        """A heartbeat made with `credential` was taken: the control plane knows the node, again or still.

        Of an identity that the node had before, that says nothing any more.
        """
        if credential != self.identity.node_key:
            return
        self._settle()
        if not self.accepted.is_set():
            self._health.set(Condition.IDENTITY_REFUSED, False)
            log.info("identity accepted again", node_id=self.identity.node_id)
            self.accepted.set()

    def renew(self, identity: Identity, desired: Desired, fetched_at: float) -> None:
        """Be another node from now on. What is remembered of the old one is forgotten; nothing of it is under way."""
        log.info("identity replaced", node_id=identity.node_id, was=self.identity.node_id)
        self.identity = identity
        self.generation += 1
        self.fetched_at = fetched_at
        self._take(desired, "new identity")
        for listener in self.on_renewed:
            listener()
        self._settle()
        self._health.set(Condition.IDENTITY_REFUSED, False)
        self.accepted.set()

    def _settle(self) -> None:
        self.suspected.clear()
        self.settled.set()


def _shown(keys: SigningKeys | None, prefix: str = "") -> dict[str, str]:
    """Their beginnings, for the log; empty for none."""
    current, previous = (keys.current, keys.previous) if keys is not None else (None, None)
    return {
        f"{prefix}{name}": PublicKey(key).short if key is not None else ""
        for name, key in (("current", current), ("previous", previous))
    }
