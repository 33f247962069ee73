"""What each verified event does on this node. Nothing here waits for the control plane."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from plexd.errors import WireError
from plexd.log import get_logger
from plexd.mesh.desired import Desired, SigningKeys
from plexd.mesh.events import (
    AboutSelf,
    ActionRequested,
    FeatureOff,
    NodeStateUpdated,
    ReconcileRequested,
    RotationRequested,
    SecretRefsUpdated,
    SessionRevoked,
    SigningKeyReplaced,
    SigningKeysRotated,
    SSHSessionRequested,
    UnknownEvent,
)
from plexd.mesh.fold import NotHereYet, Unfoldable, fold
from plexd.node.state import Node
from plexd.wire.envelope import Envelope
from plexd.wire.mapping import OwnNode
from plexd.wire.payloads import EventEffect, parse_event, reaction_to_bad

log = get_logger("events")


class Effects:
    """Folds events into the node and passes the rest on to whom it concerns."""

    def __init__(
        self,
        node: Node,
        own: Callable[[], OwnNode],
        apply_event: Callable[[], Awaitable[bool]],
        request_pull: Callable[[str], None],
        request_rotation: Callable[[str], None],
        refuse_action: Callable[[str], None],
        refuse_session: Callable[[str], None],
        save_signing_keys: Callable[[SigningKeys, str], Awaitable[None]],
        save_entries: Callable[[Desired], Awaitable[None]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._node = node
        self._own = own
        self._apply_event = apply_event
        self._request_pull = request_pull
        self._request_rotation = request_rotation
        self._refuse_action = refuse_action
        self._refuse_session = refuse_session
        self._save_signing_keys = save_signing_keys
        self._save_entries = save_entries
        self._now = now
        self._newest: dict[str, int] = {}  # time of issue of the last applied event, of the types that order by it
        node.on_renewed.append(self._newest.clear)

    async def handle(self, envelope: Envelope) -> None:
        """The effect of one verified event; applying the same event twice equals applying it once."""
        try:
            event = parse_event(envelope.event_type, envelope.payload, own=self._own(), now=self._now())
        except WireError as exc:
            log.error("event not usable", event_type=envelope.event_type, event_id=envelope.event_id, reason=str(exc))
            if reaction_to_bad(envelope.event_type) is EventEffect.RECONCILE:
                self._request_pull("bad payload")
            return
        match event:
            case ReconcileRequested():
                self._request_pull(envelope.event_type)
            case RotationRequested():
                self._request_rotation("event")
            case ActionRequested(execution_id):
                self._refuse_action(execution_id)
            case SSHSessionRequested(session_id):
                self._refuse_session(session_id)
            case SessionRevoked() | FeatureOff() | AboutSelf() | UnknownEvent():
                log.debug("event without effect here", event_type=envelope.event_type, event_id=envelope.event_id)
            case SigningKeysRotated() | SigningKeyReplaced():
                keys = fold(self._node.desired, event).signing_keys
                if keys is not None and keys != self._node.desired.signing_keys:
                    await self._save_signing_keys(keys, envelope.event_id)  # on disk before it counts
                self._node.fold(event)  # always: it outdates the state answers on their way
            case NodeStateUpdated() | SecretRefsUpdated():
                issued = envelope.issued or 0
                if issued < self._newest.get(envelope.event_type, 0):
                    log.debug("event older than the last of its type", event_id=envelope.event_id)
                    return
                self._newest[envelope.event_type] = issued
                desired = fold(self._node.desired, event)
                if desired is not self._node.desired:
                    await self._save_entries(desired)  # on disk before it counts
                self._node.fold(event)
            case _:
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
