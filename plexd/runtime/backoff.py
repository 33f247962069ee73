"""Delays between tries. Numbers only; whoever waits does the waiting."""

from __future__ import annotations

import random
from collections.abc import Callable

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
