"""What of a changed configuration takes effect at once, and what waits for a restart (docs/contract/operations.md
§4.6).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from pydantic import BaseModel

from plexd.config.keys import KEYS
from plexd.config.models import Config


class Reloaded(NamedTuple):
    """`config` is in force from now on; the other two name keys whose value differs from the one before."""

    config: Config
    changed: tuple[str, ...]
    restart_required: tuple[str, ...]


def take_over(old: Config, new: Config, live: Collection[str]) -> Reloaded:
    """`live` are the keys and sections whose changes somebody applies; the old value of any other stays in force."""
    differing = [key for key in KEYS if _value(old, key) != _value(new, key)]
    changed = tuple(key for key in differing if is_below(key, live))
    return Reloaded(
        _merged(old, new, frozenset(changed)), changed, tuple(key for key in differing if key not in changed)
    )


def is_below(key: str, names: Collection[str]) -> bool:
    """Whether the key is one of these, or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(config: BaseModel, key: str) -> object:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _merged(old: Any, new: Any, changed: Collection[str], prefix: str = "") -> Any:
    """`old` with the changed keys of `new`. Both are valid, and no check ties a live key to one that is not."""
    members: dict[str, object] = {}
    for name in type(old).model_fields:
        key, held = prefix + name, getattr(old, name)
        if isinstance(held, BaseModel):
            members[name] = _merged(held, getattr(new, name), changed, f"{key}.")
        elif key in changed:
            members[name] = getattr(new, name)
    return old.model_copy(update=members)
