"""The filter table as the document that nft takes."""

from __future__ import annotations

from typing import Any

from plexd.mesh.firewall import ruleset
from plexd.mesh.nft_commands import Json


def render(*arguments: Any, **others: Any) -> Json:
    """Arguments are those of `ruleset`."""
    made = ruleset(*arguments, **others)
    assert not made.fault, made.fault
    return made.document()
