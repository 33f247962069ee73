"""How a pipeline or a source stands, and when that is worth a line of the log: once a change, with a reminder. Pure."""

from __future__ import annotations

from enum import StrEnum

REMINDER_SECONDS = 300.0


class State(StrEnum):
    """Of a pipeline."""

    OK = "ok"
    FAILING = "failing"
    PAUSED = "paused"
    DISABLED = "disabled"


class DeliveryState:
    def __init__(self) -> None:
        self.state = State.OK
        self._said_at = float("-inf")

    def becomes(self, state: State, now: float) -> bool:
        """Whether to say so; `now` is monotonic."""
        changed = state is not self.state
        self.state = state
        if changed or (state is not State.OK and now - self._said_at >= REMINDER_SECONDS):
            self._said_at = now
            return True
        return False
