"""Tells the control plane what this node can do: once after every start."""

from __future__ import annotations

import asyncio
from typing import Protocol

from plexd.errors import ControlError
from plexd.log import get_logger
from plexd.node import Node

log = get_logger("capabilities")


class ControlPlane(Protocol):
    async def put_capabilities(self) -> None:
        """Retried without end. Raises ControlError when the control plane does not want it."""


class Capabilities:
    name = "capabilities"

    def __init__(self, control: ControlPlane, node: Node) -> None:
        self._control = control
        self._node = node

    async def run(self) -> None:
        await self._node.accepted.wait()
        try:
            await self._control.put_capabilities()
        except ControlError as exc:
            log.error("capabilities not accepted", error=str(exc))
        await asyncio.Event().wait()  # what the node can do changes with its program only: the next start says it
