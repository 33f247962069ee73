"""Text that fits the terminal: tables, wrapped lines, sizes and ages."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from plexd.mesh.age import format_age
from plexd.wire.times import parse_time

MIN_COLUMN = 8  # what a column keeps of its text at least when a terminal is too narrow


def terminal_width() -> int | None:
    """Columns of the terminal that is written to; None: it is none, and nothing has to fit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def fit(line: str, width: int | None, indent: str = "  ") -> list[str]:
    """The line, wrapped where a terminal is too narrow for it."""
    if width is None or len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


def named(rows: Iterable[tuple[str, str]], size: int, width: int | None) -> list[str]:
    """`Name: text` each, the texts `size` columns in; a row without a name goes on with the one before."""
    return [
        line for name, text in rows for line in fit(f"{name + ':' if name else '':<{size}}{text}", width, " " * size)
    ]


def table(columns: Mapping[str, Callable[[Any], str]], items: Sequence[Any], width: int | None) -> list[str]:
    """A line for each item, under the names of the columns; in `width` columns the last one wraps below its line."""
    *titles, last_title = columns
    *cells, last_cell = columns.values()
    rows = [[*titles], *([cell(item) for cell in cells] for item in items)]
    last_column = [last_title, *(last_cell(item) for item in items)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        _narrow(widths, width)
    lines = []
    for row, last in zip(rows, last_column, strict=True):
        start = "  ".join(f"{_cut(text, size):<{size}}" for text, size in zip(row, widths, strict=True))
        whole = f"{start}  {last}".rstrip()
        if width is None or len(whole) <= width:
            lines.append(whole)
        else:
            lines.append(start.rstrip())
            if row is not rows[0]:
                lines += textwrap.wrap(last, width, initial_indent="    ", subsequent_indent="    ")
    return lines


def _narrow(widths: list[int], width: int) -> None:
    """Take from the widest column until the line fits or nothing can be spared."""
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"


def format_bytes(number: int) -> str:
    """`812B`, `1.2MiB`."""
    if number < 1024:
        return f"{number}B"
    size = float(number)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1023.95:
            return f"{size:.1f}{unit}"
    return f"{size / 1024:.1f}TiB"


def since(time_stamp: str, now: float) -> str:
    """How long ago that was; `now` is in Unix seconds."""
    return format_age(now - (parse_time(time_stamp) or now))
