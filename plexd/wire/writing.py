"""Writing documents: compact UTF-8 JSON, members in the order of the model (docs/contract/wire.md §6.2)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from pydantic import SecretStr

from plexd.wire.models import Model, OmitEmpty
from plexd.wire.reading import JSONText

_SURROGATE = re.compile("[\ud800-\udfff]")

_quote = json.JSONEncoder(ensure_ascii=False).encode


class _Member(NamedTuple):
    name: str
    start: str
    omit_empty: bool


def dump(value: Model | Sequence[Model]) -> bytes:
    """The document that stands for `value`, secrets in clear. Bytes that were no UTF-8 become U+FFFD."""
    text = _write(value)
    try:
        return text.encode()
    except UnicodeEncodeError:  # program output decoded with surrogateescape
        return _SURROGATE.sub("\ufffd", text).encode()


@cache
def _members(model: type[Model]) -> tuple[_Member, ...]:
    return tuple(
        _Member(name, f"{_quote(name)}:", any(isinstance(mark, OmitEmpty) for mark in field.metadata))
        for name, field in model.model_fields.items()
    )


def _write(value: object) -> str:
    if isinstance(value, JSONText):
        return value
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, SecretStr):
        return _quote(value.get_secret_value())
    if isinstance(value, Model):
        members = ((member, getattr(value, member.name)) for member in _members(type(value)))
        return "{" + ",".join(m.start + _write(v) for m, v in members if not (m.omit_empty and _is_empty(v))) + "}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quote(name)}:{_write(member)}" for name, member in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(_write, value)) + "]"
    raise TypeError(f"no model has members of {type(value).__name__}")


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | SecretStr | Mapping | tuple) and len(value) == 0)
