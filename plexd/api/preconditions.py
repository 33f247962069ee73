"""`If-Match` and `If-None-Match`: what a write demands of the present version (docs/contract/node-api.md §4.1)."""

from __future__ import annotations

import re
from collections.abc import Callable

from plexd.api.http_server import Request

_VERSION = re.compile(r'([0-9]{1,18})|"([0-9]{1,18})"')
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


class BadPrecondition(Exception):
    """The text says what is wrong."""


def demanded(request: Request) -> Callable[[int], bool]:
    """Whether a write may go on, as a function of the current version; 0: there is no entry. Raises BadPrecondition."""
    match, none_match = _single(request, "if-match"), _single(request, "if-none-match")
    if none_match not in {None, "*"}:
        raise BadPrecondition("If-None-Match of a write can only be *")
    wanted = None if match in {None, "*"} else _version(match or "")

    def may(current: int) -> bool:
        if none_match is not None and current:
            return False
        return match is None or (current > 0 if wanted is None else current == wanted)

    return may


def is_known(request: Request, version: int) -> bool:
    """Whether a reader says that it has this version already."""
    tags = ",".join(request.header("if-none-match"))
    return tags.strip() == "*" or str(version) in _TAG.findall(tags)


def _single(request: Request, name: str) -> str | None:
    values = request.header(name)
    if len(values) > 1:
        raise BadPrecondition("a precondition has one value")
    return values[0].strip() if values else None


def _version(text: str) -> int:
    found = _VERSION.fullmatch(text)
    if found is None:
        raise BadPrecondition("If-Match is a version, quoted or not, or *")
    return int(found[1] or found[2])
