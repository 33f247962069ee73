"""Events that change the desired snapshot of the node. No handler waits for the control plane."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from plexd.log import get_logger
from plexd.mesh.desired import Desired, SigningKeys
from plexd.mesh.events import (
    EndpointOffered,
    Foldable,
    NodeStateUpdated,
    PeerAdded,
    PeerKeyRotated,
    PeerRemoved,
    ReconcileRequested,
    SecretRefsUpdated,
    SigningKeyReplaced,
    SigningKeysRotated,
)
from plexd.mesh.fold import NotHereYet, Unfoldable, fold
from plexd.node.state import Node
from plexd.runtime.component import Component, Envelope

log = get_logger("events")


class StateEvents:
    """`apply_event` brings folded peers into the kernel. Both `save_*` calls return once the disk has the values."""

    def __init__(
        self,
        node: Node,
        apply_event: Callable[[], Awaitable[bool]],
        request_pull: Callable[[str], None],
        save_signing_keys: Callable[[SigningKeys, str], Awaitable[None]],
        save_entries: Callable[[Desired], Awaitable[None]],
    ) -> None:
        self._node = node
        self._apply_event = apply_event
        self._request_pull = request_pull
        self._save_signing_keys = save_signing_keys
        self._save_entries = save_entries
        self._newest: dict[str, int] = {}  # time of issue of the last applied event, of the types that order by it
        node.on_renewed.append(self._newest.clear)

    def component(self) -> Component:
        return Component(
            events={
                ReconcileRequested: self._pull,
                SigningKeysRotated: self._take_signing_keys,
                SigningKeyReplaced: self._take_signing_keys,
                NodeStateUpdated: self._take_entries,
                SecretRefsUpdated: self._take_entries,
                PeerAdded: self._fold,
                PeerRemoved: self._fold,
                PeerKeyRotated: self._fold,
                EndpointOffered: self._fold,
            }
        )

    async def _pull(self, _: ReconcileRequested, envelope: Envelope) -> None:
        self._request_pull(envelope.event_type)

    async def _take_signing_keys(self, event: SigningKeysRotated | SigningKeyReplaced, envelope: Envelope) -> None:
        keys = fold(self._node.desired, event).signing_keys
        if keys is not None and keys != self._node.desired.signing_keys:
            await self._save_signing_keys(keys, envelope.event_id)  # the disk first
        self._node.fold(event)  # always, because the event outdates state answers that are on their way

    async def _take_entries(self, event: NodeStateUpdated | SecretRefsUpdated, envelope: Envelope) -> None:
        issued = envelope.issued or 0
        if issued < self._newest.get(envelope.event_type, 0):
            log.debug("event older than the last of its type", event_id=envelope.event_id)
            return
        self._newest[envelope.event_type] = issued
        desired = fold(self._node.desired, event)
        if desired is not self._node.desired:
            await self._save_entries(desired)  # the disk first
        self._node.fold(event)

    async def _fold(self, event: Foldable, envelope: Envelope) -> None:
        try:
            changed = self._node.fold(event)
        except Unfoldable as exc:
            write = log.info if isinstance(exc, NotHereYet) else log.error
            write(
                "event does not fit the snapshot, state pulled",
                event_type=envelope.event_type,
                event_id=envelope.event_id,
                reason=str(exc),
            )
            self._request_pull("unusable event")
            return
        if changed and not await self._apply_event():
            self._request_pull("event not applied")
