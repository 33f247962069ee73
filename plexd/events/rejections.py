"""Answers what the control plane asks for and this node does not offer: actions and SSH sessions are off."""

from __future__ import annotations

import asyncio
from typing import Protocol

from plexd.errors import ControlError, Unauthenticated
from plexd.log import get_logger
from plexd.node.state import Node

log = get_logger("actions")

MAX_WAITING = 1000
REPEAT_SECONDS = 60.0  # after a 401, unless a heartbeat finds that it stands


class ControlPlane(Protocol):
    async def reject_execution(self, execution_id: str, reason: str) -> None:
        """Tried as often as the endpoint's policy says. Raises ControlError."""

    async def report_session_closed(self, session_id: str, reason: str) -> None:
        """Tried as often as the endpoint's policy says. Raises ControlError."""


class Rejections:
    """Each answer stays queued until it was tried to the end, one of a kind at a time, in the order asked.

    An action is to be answered at once, so it does not wait behind a session, which may be tried for minutes.
    """

    name = "refusals"

    def __init__(self, control: ControlPlane, node: Node) -> None:
        self._control = control
        self._node = node
        self._forget()
        node.on_renewed.append(self._forget)

    def refuse_action(self, execution_id: str) -> None:
        self._put("execution_id", execution_id)

    def refuse_session(self, session_id: str) -> None:
        self._put("session_id", session_id)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for kind in self._waiting:
                group.create_task(self._answer(kind), name=f"refusals by {kind}")

    async def _answer(self, kind: str) -> None:
        while True:
            identifier = await self._waiting[kind].get()
            await self._node.accepted.wait()
            while not await self._deliver(kind, identifier):
                await asyncio.sleep(REPEAT_SECONDS)
                await self._node.accepted.wait()

    async def _deliver(self, kind: str, identifier: str) -> bool:
        """Whether that is done with, delivered or not."""
        try:
            if kind == "execution_id":
                await self._control.reject_execution(identifier, "actions_disabled")
            else:
                await self._control.report_session_closed(identifier, "rejected: disabled")
        except Unauthenticated:
            return False
        except ControlError as exc:
            log.warning("refusal not delivered", error=str(exc), **{kind: identifier})
        else:
            log.info("request refused", reason="this node does not offer it", **{kind: identifier})
        return True

    def _forget(self) -> None:
        """What another node was asked for is no business of this one."""
        self._waiting: dict[str, asyncio.Queue[str]] = {
            kind: asyncio.Queue(MAX_WAITING) for kind in ("execution_id", "session_id")
        }

    def _put(self, kind: str, identifier: str) -> None:
        try:
            self._waiting[kind].put_nowait(identifier)
        except asyncio.QueueFull:
            log.error("request dropped", reason=f"{MAX_WAITING} refusals are waiting", **{kind: identifier})
