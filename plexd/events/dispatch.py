"""Hands each verified event to the handler of its type."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from plexd.errors import WireError
from plexd.log import get_logger
from plexd.runtime.component import EventHandler, contribute
from plexd.wire.envelope import Envelope
from plexd.wire.mapping import OwnNode
from plexd.wire.payloads import EventEffect, parse_event, reaction_to_bad

log = get_logger("events")


class Dispatch:
    """The table of handlers, by the type of an event's value. Events without a handler have no effect on this node."""

    def __init__(
        self, own: Callable[[], OwnNode], request_pull: Callable[[str], None], now: Callable[[], float] = time.time
    ) -> None:
        self._own = own
        self._request_pull = request_pull
        self._now = now
        self._handlers: dict[type[Any], EventHandler] = {}

    def add(self, handlers: Mapping[type[Any], EventHandler]) -> None:
        """Raises ValueError when a type of event has a handler already."""
        contribute(self._handlers, handlers)

    async def handle(self, envelope: Envelope) -> None:
        """Act on one verified event; handling the same event twice equals handling it once."""
        try:
            event = parse_event(envelope.event_type, envelope.payload, own=self._own(), now=self._now())
        except WireError as exc:
            log.error("event not usable", event_type=envelope.event_type, event_id=envelope.event_id, reason=str(exc))
            if reaction_to_bad(envelope.event_type) is EventEffect.RECONCILE:
                self._request_pull("bad payload")
            return
        handler = self._handlers.get(type(event))
        if handler is None:
            log.debug("event without effect here", event_type=envelope.event_type, event_id=envelope.event_id)
        else:
            await handler(event, envelope)
