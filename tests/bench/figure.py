"""One line of the benchmark's table."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """`budget` is an upper bound in the same unit, None for a figure that only explains others."""

    name: str
    value: float
    unit: str
    budget: float | None = None
    note: str = ""


def table(figures: list[Figure]) -> str:
    width = max(len(figure.name) for figure in figures)
    lines = []
    for figure in figures:
        verdict = ""
        if figure.budget is not None:
            verdict = f"budget {figure.budget:g}: {'holds' if figure.value <= figure.budget else 'MISSED'}"
        lines.append(
            f"{figure.name:{width}}  {figure.value:9.3f} {figure.unit:5}  {verdict:22}  {figure.note}".rstrip()
        )
    return "\n".join(lines)
