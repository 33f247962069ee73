"""WireGuard in the kernel and in a program in its place, behind one protocol. For each, what is said is pure and apart
from who says it: `messages` for `kernel`, `uapi` for `userspace`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from plexd.mesh.changes import PeerChange
from plexd.mesh.keys import PrivateKey, PublicKey
from plexd.mesh.observed import Device


class WireGuardDevice(Protocol):
    """The WireGuard side of an interface. Methods raise OSError; the door translates it.

    `writes` counts what was sent to change something.
    """

    writes: int

    async def dump(self) -> Device | None:
        """None when there is no such device, or nobody answers for it."""

    async def set_device(self, private_key: PrivateKey, listen_port: int) -> None:
        """Set key and port, and fwmark to 0; peers stay."""

    async def change_peers(self, changes: Sequence[PeerChange]) -> None:
        """In order, as one batch. After an error some of it may be done; all of it may be repeated.

        New peers in great number may be left without their handshakes, which take many times as long to compute as it
        takes to add them; `begin_handshakes` is due then.
        """

    async def begin_handshakes(self) -> None:
        """Have those peers begin, now that everything else is in place."""

    async def renew_sessions(self, public_keys: Sequence[PublicKey], keepalive: int) -> None:
        """Have these peers, whose keepalive interval is the given one, shake hands at once."""
