"""When and how the control plane was last reached; the services write it, status and readiness read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum


class Stream(StrEnum):
    """What the event stream is doing; POLLING: it has been down for so long that state is polled instead."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    POLLING = "polling"
    STOPPED = "stopped"


class ConnectionStatus:
    """Moments are in Unix seconds, None for never. `reconnects` counts connections after the first one."""

    def __init__(self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.stream = Stream.STOPPED
        self.reconnects = 0
        self.last_event_at: float | None = None
        self.last_heartbeat_at: float | None = None
        self.last_heartbeat_ok: bool | None = None
        self.last_pull_at: float | None = None
        self.last_pull_error = ""
        self.heartbeats_taken = 0
        self.heartbeats_failed = 0
        self.passes = 0
        self.failures = 0  # of passes and of pulls
        self.corrections = 0
        self._now = now
        self._monotonic = monotonic
        self._was_connected = False
        self._heard_at = monotonic()

    def stream_is(self, stream: Stream) -> None:
        if self.stream is Stream.CONNECTED:
            self._heard_at = self._monotonic()
        self.stream = stream
        if stream is Stream.CONNECTED:
            self.reconnects += self._was_connected
            self._was_connected = True

    def event_arrived(self) -> None:
        """A verified one."""
        self.last_event_at = self._now()

    def heartbeat_sent(self, ok: bool) -> None:
        """`ok`: the control plane took it."""
        self.last_heartbeat_at = self._now()
        self.last_heartbeat_ok = ok
        self.heartbeats_taken += ok
        self.heartbeats_failed += not ok

    def state_pulled(self, error: str = "") -> None:
        """`error` says why there is no new state, empty when there is."""
        self.last_pull_error = error
        self.failures += bool(error)
        if not error:
            self.last_pull_at = self._now()
            self._heard_at = self._monotonic()

    def pass_ended(self, failed: bool, corrections: int) -> None:
        """The node was compared with what is wanted; `corrections` is how much drift was put right."""
        self.passes += 1
        self.failures += failed
        self.corrections += corrections

    def silent_seconds(self) -> float:
        """For how long neither stream nor state pull has brought news; counted from the start at first."""
        return 0.0 if self.stream is Stream.CONNECTED else self._monotonic() - self._heard_at
