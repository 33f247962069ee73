"""Tells the control plane what this node can do: once after every start."""

from __future__ import annotations

import asyncio
from typing import Protocol

from plexd.errors import ControlError, Unauthenticated
from plexd.log import get_logger
from plexd.node.state import Node

log = get_logger("capabilities")

REPEAT_SECONDS = 60.0  # after a 401, unless a heartbeat finds that it stands


class ControlPlane(Protocol):
    async def put_capabilities(self) -> None:
        """Retried without end. Raises ControlError when the control plane does not want it."""


class Capabilities:
    name = "capabilities"

    def __init__(self, control: ControlPlane, node: Node) -> None:
        self._control = control
        self._node = node

    async def run(self) -> None:
        while True:
            await self._node.accepted.wait()
            try:
                await self._control.put_capabilities()
            except Unauthenticated:
                await asyncio.sleep(REPEAT_SECONDS)
                continue
            except ControlError as exc:
                log.error("capabilities not accepted", error=str(exc))
            break
        await asyncio.Event().wait()  # what the node can do changes with its program only: the next start says it
