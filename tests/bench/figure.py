"""One measured number, with what it should be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """`budget` is in the same unit; None when there is none. `at_least` says which side of it is good."""

    name: str
    value: float
    unit: str
    budget: float | None = None
    at_least: bool = False

    def line(self) -> str:
        verdict = ""
        if self.budget is not None:
            holds = self.value >= self.budget if self.at_least else self.value <= self.budget
            sign = "≥" if self.at_least else "≤"
            verdict = f"  (budget {sign} {self.budget:g} {self.unit}: {'holds' if holds else 'MISSED'})"
        return f"{self.name:<72} {self.value:>10.3f} {self.unit}{verdict}"


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
