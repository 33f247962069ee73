"""How far the node's clock is from the control plane's. No I/O."""

from __future__ import annotations

from collections import deque
from statistics import median


class ClockOffset:
    """The median of the last five differences, so that one late answer or odd date does not count.

    Seconds; positive when the control plane is ahead.
    """

    SAMPLES = 5

    def __init__(self) -> None:
        self._differences: deque[float] = deque(maxlen=self.SAMPLES)

    def add(self, server_time: float, local_time: float) -> float:
        """Take in one date of the control plane and the local time of its arrival; the offset as known now."""
        self._differences.append(server_time - local_time)
        return median(self._differences)
