"""The handshakes loop: new peers, and all peers after a new key of ours, are in touch within a second or two.

The loop rests while no peer is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

from plexd.converge.handshake_retries import HandshakeRetries
from plexd.converge.mesh import Mesh
from plexd.converge.passes import Converger
from plexd.errors import KernelError
from plexd.log import get_logger
from plexd.mesh.observed import Observed

log = get_logger("mesh")

ROUND_SECONDS = 0.2
FAILURE = "handshakes not tried again"


class Interface(Protocol):
    async def observe(self) -> Observed:
        """Raises KernelError."""


class Handshakes:
    name = "handshakes"

    def __init__(
        self,
        interface: Interface,
        mesh: Mesh,
        retries: HandshakeRetries,
        converger: Converger,
        request_pass: Callable[[str], None],
    ) -> None:
        self._interface = interface
        self._mesh = mesh
        self._retries = retries
        self._converger = converger
        self._request_pass = request_pass

    async def run(self) -> None:
        while True:
            await self._retries.awaiting.wait()
            await asyncio.sleep(ROUND_SECONDS)
            if not await self.try_again():
                self._request_pass(FAILURE)

    async def try_again(self) -> bool:
        """One round for the peers that ought to shake hands; False when a peer may be missing and a pass is due.

        No event waits for the look.
        """
        due, seen = self._retries.next_round(), self._mesh.applied.target
        if not due or seen is None:
            return True
        try:
            observed = await self._interface.observe()
        except KernelError as exc:
            log.error(FAILURE, error=str(exc))
            return True
        return await self._converger.step(
            self._mesh, partial(self._mesh.look_at_handshakes, due, seen, observed), FAILURE
        )
