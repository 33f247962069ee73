"""Secrets that no line may hold, whoever prints it: the log, a command, what is forwarded."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

SHORTEST_SECRET = 4  # masking something shorter would black out every line and hide nothing
MASK = "[redacted]"

_secrets: set[str] = set()
_pattern: re.Pattern[str] | None = None


def register_secret(text: str) -> None:
    """Mask `text` in every line from now on, also where it was escaped by JSON, repr or a URL."""
    global _pattern  # noqa: PLW0603 - one process has one set of secrets, as it has one stderr
    if len(text) < SHORTEST_SECRET:
        return
    spelled = {text}
    for _ in range(2):  # a quoted text in a quoted text
        spelled |= {spelling[1:-1] for form in spelled for spelling in (repr(form), quoted(form))}
    _secrets.update(spelled, [quote(text, safe="")])
    _pattern = re.compile("|".join(map(re.escape, sorted(_secrets, key=len, reverse=True))))


def mask(text: str) -> str:
    """`text` without the registered secrets; for what is printed past the log, and for what is forwarded."""
    # hardly any text holds one, and looking for each of them is several times faster than the pattern
    return _pattern.sub(MASK, text) if _pattern and any(map(text.__contains__, _secrets)) else text


def quoted(value: Any) -> str:
    """JSON, readable except where that would break a line; JSON itself escapes only what is below a space."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value).replace("\x7f", "\\u007f")


def one_line(text: str) -> str:
    """On one line, and without control characters that a terminal would obey."""
    return text if text.isprintable() else quoted(text)[1:-1]
