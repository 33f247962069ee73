"""Services of this node that are let in for a while, beside the policies (docs/contract/mesh.md §6.8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from plexd.errors import TooManyTemporaryAllows
from plexd.mesh.policy import Protocol

MAX_TEMPORARY_ALLOWS = 256


class TemporaryAllow(NamedTuple):
    """A service of ours that is let in for a while: TCP or UDP to a port of `dst`, from `src` or (empty) from all."""

    name: str
    protocol: Protocol
    port: int
    dst: bytes
    src: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class TemporaryAllows:
    """The temporary allows in force, each under its own name. The agent starts without any."""

    held: tuple[TemporaryAllow, ...] = ()

    def open(self, allow: TemporaryAllow) -> TemporaryAllows:
        """In place of one of the same name. TooManyTemporaryAllows when there are too many."""
        others = self.close(allow.name).held
        if len(others) >= MAX_TEMPORARY_ALLOWS:
            raise TooManyTemporaryAllows(f"{MAX_TEMPORARY_ALLOWS} temporary allows are in use, close one first")
        return TemporaryAllows((*others, allow))

    def close(self, name: str) -> TemporaryAllows:
        """Closing what is not open is fine."""
        return TemporaryAllows(tuple(allow for allow in self.held if allow.name != name))


NO_TEMPORARY_ALLOWS = TemporaryAllows()
