"""Delays between tries. Numbers only; the callers do the waiting."""

from __future__ import annotations

import random
from collections.abc import Callable

from plexd.errors import ControlError, Transient

Uniform = Callable[[float, float], float]


class Backoff:
    """First delay `base` seconds, doubled for each further failure up to `cap`, each times 0.75 to 1.25."""

    def __init__(self, base: float, cap: float, uniform: Uniform = random.uniform) -> None:
        self._base, self._cap, self._uniform = base, cap, uniform
        self._failures = 0

    def next(self) -> float:
        delay = self.peek()
        self._failures += 1
        return delay * self._uniform(0.75, 1.25)

    def peek(self) -> float:
        """The next delay before it is spread."""
        return float(min(self._cap, self._base * 2 ** min(self._failures, 32)))

    def reset(self) -> None:
        self._failures = 0


class FullJitter:
    """Reconnection of the event stream: delay n is random in 0..min(cap, base * 2^n), at least 50 ms.

    Full jitter, so that a fleet does not come back in one burst (docs/contract/events.md §6).
    """

    FLOOR_SECONDS = 0.05

    def __init__(self, base: float, cap: float, uniform: Uniform = random.uniform) -> None:
        self.base, self._cap, self._uniform = base, cap, uniform
        self.attempt = 0

    def next(self) -> float:
        self.attempt += 1
        return max(self.FLOOR_SECONDS, self._uniform(0.0, min(self._cap, self.base * 2 ** min(self.attempt, 32))))

    def reset(self) -> None:
        self.attempt = 0


def requested_delay(error: ControlError, uniform: Uniform) -> float:
    """The seconds that the control plane asked to wait with `Retry-After`, 0.0 if it did not ask.

    They are spread by up to a quarter more, so that a fleet that was told to wait does not come back at one moment
    (docs/contract/wire.md §4).
    """
    if isinstance(error, Transient) and error.retry_after is not None:
        return error.retry_after * uniform(1.0, 1.25)
    return 0.0


class Postponement:
    """A wait that the control plane asked this node for. A wait for a former identity of the node does not count.

    `node_id` gives the id of the node now. Moments are in the loop's time.
    """

    def __init__(self, node_id: Callable[[], str], uniform: Uniform = random.uniform) -> None:
        self._node_id = node_id
        self._uniform = uniform
        self._until = float("-inf")
        self._asked = ""  # the id of the node that was asked to wait

    def postpone(self, error: ControlError, asked: str, now: float) -> None:
        """Keep the wait that `error` asks for, if any. `asked` is the id of the node that had sent the request.

        The answer to a request of the former node may come after the identity has changed.
        """
        delay = requested_delay(error, self._uniform)
        if delay and asked == self._node_id():
            self._until, self._asked = now + delay, asked

    def remaining(self, now: float) -> float:
        """The seconds left to wait."""
        return max(0.0, self._until - now) if self._asked == self._node_id() else 0.0
