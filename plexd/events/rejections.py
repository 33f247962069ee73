"""Rejects what the control plane asks for and this node does not offer: actions and SSH sessions."""

from __future__ import annotations

import asyncio
from typing import Protocol

from plexd.errors import ControlError, Unauthenticated
from plexd.log import get_logger
from plexd.mesh.events import ActionRequested, SSHSessionRequested
from plexd.node.state import Node
from plexd.runtime.component import Component, Envelope

log = get_logger("actions")

MAX_WAITING = 1000
REPEAT_SECONDS = 60.0  # after a 401, unless a heartbeat finds that it stands


class ControlPlane(Protocol):
    async def reject_execution(self, execution_id: str, reason: str) -> None:
        """Tried as often as the endpoint's policy says. Raises ControlError."""

    async def report_session_closed(self, session_id: str, reason: str) -> None:
        """Tried as often as the endpoint's policy says. Raises ControlError."""


class Rejections:
    """Each rejection stays queued until its delivery has ended; one of a kind is delivered at a time, in order.

    Rejections of actions are due at once. They do not wait behind those of sessions, which may take minutes.
    """

    name = "rejections"

    def __init__(self, control: ControlPlane, node: Node) -> None:
        self._control = control
        self._node = node
        self._forget()
        node.on_renewed.append(self._forget)

    def component(self) -> Component:
        """Takes the requests for actions and SSH sessions, and offers neither actions nor hooks."""
        return Component(
            services=(self,),
            events={ActionRequested: self._on_action, SSHSessionRequested: self._on_session},
            capabilities={"builtin_actions": tuple, "hooks": tuple},
        )

    def reject_action(self, execution_id: str) -> None:
        self._put("execution_id", execution_id)

    def reject_session(self, session_id: str) -> None:
        self._put("session_id", session_id)

    async def _on_action(self, event: ActionRequested, _: Envelope) -> None:
        self.reject_action(event.execution_id)

    async def _on_session(self, event: SSHSessionRequested, _: Envelope) -> None:
        self.reject_session(event.session_id)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for kind in self._waiting:
                group.create_task(self._answer(kind), name=f"rejections by {kind}")

    async def _answer(self, kind: str) -> None:
        while True:
            identifier = await self._waiting[kind].get()
            await self._node.accepted.wait()
            while not await self._deliver(kind, identifier):
                await asyncio.sleep(REPEAT_SECONDS)
                await self._node.accepted.wait()

    async def _deliver(self, kind: str, identifier: str) -> bool:
        """Whether the delivery has ended, successfully or not."""
        try:
            if kind == "execution_id":
                await self._control.reject_execution(identifier, "actions_disabled")
            else:
                await self._control.report_session_closed(identifier, "rejected: disabled")
        except Unauthenticated:
            return False
        except ControlError as exc:
            log.warning("rejection not delivered", error=str(exc), **{kind: identifier})
        else:
            log.info("request rejected", reason="this node does not offer it", **{kind: identifier})
        return True

    def _forget(self) -> None:
        """Requests to the former node do not concern the new one."""
        self._waiting: dict[str, asyncio.Queue[str]] = {
            kind: asyncio.Queue(MAX_WAITING) for kind in ("execution_id", "session_id")
        }

    def _put(self, kind: str, identifier: str) -> None:
        try:
            self._waiting[kind].put_nowait(identifier)
        except asyncio.QueueFull:
            log.error("request dropped", reason=f"{MAX_WAITING} rejections are waiting", **{kind: identifier})
