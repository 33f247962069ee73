"""Requests for what this node does not offer are rejected: once each, in order, whatever happens to a delivery."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from plexd.errors import ControlError, NotFound, Unauthenticated
from plexd.events.rejections import Rejections
from tests.node_harness import make_node

pytestmark = pytest.mark.virtual_time


class Answers:
    """A control plane that takes rejections of actions and sessions; each of `errors` meets one of an action."""

    def __init__(self, *errors: ControlError) -> None:
        self._errors = list(errors)
        self.executions: list[tuple[str, str]] = []
        self.sessions: list[tuple[str, str]] = []

    @property
    def execution_ids(self) -> list[str]:
        return [execution_id for execution_id, _ in self.executions]

    async def reject_execution(self, execution_id: str, reason: str) -> None:
        if self._errors:
            raise self._errors.pop(0)
        self.executions.append((execution_id, reason))

    async def report_session_closed(self, session_id: str, reason: str) -> None:
        self.sessions.append((session_id, reason))


@contextlib.asynccontextmanager
async def running(rejections: Rejections) -> AsyncIterator[None]:
    task = asyncio.create_task(rejections.run())
    try:
        yield
    finally:
        task.cancel()


async def test_actions_and_sessions_are_rejected_with_their_reasons() -> None:
    answers = Answers()
    rejections = Rejections(answers, make_node())
    rejections.reject_action("x-1")
    rejections.reject_session("s-1")
    async with running(rejections):
        await asyncio.sleep(1)
    assert answers.executions == [("x-1", "actions_disabled")]
    assert answers.sessions == [("s-1", "rejected: disabled")]


async def test_rejections_wait_while_the_identity_is_refused() -> None:
    answers, node = Answers(), make_node()
    node.refuse()
    rejections = Rejections(answers, node)
    rejections.reject_action("x-1")
    async with running(rejections):
        await asyncio.sleep(1000)
        assert answers.executions == []
        node.accept(node.credential())
        await asyncio.sleep(1)
        assert len(answers.executions) == 1


@pytest.mark.parametrize(
    ("error", "delivered"),
    [
        pytest.param(Unauthenticated("401", status=401), ["x-1", "x-2"], id="a 401 is tried again"),
        pytest.param(NotFound("404", status=404), ["x-2"], id="a 404 does not hold up the next"),
    ],
)
async def test_rejection_that_failed(error: ControlError, delivered: list[str]) -> None:
    answers = Answers(error)
    rejections = Rejections(answers, make_node())
    rejections.reject_action("x-1")
    rejections.reject_action("x-2")
    async with running(rejections):
        await asyncio.sleep(100)
    assert answers.execution_ids == delivered


async def test_requests_to_the_former_node_do_not_reach_the_new_one() -> None:
    answers, node = Answers(), make_node()
    rejections = Rejections(answers, node)
    rejections.reject_action("x-1")
    node.renew(node.identity, node.desired, 0.0)
    rejections.reject_action("x-2")
    async with running(rejections):
        await asyncio.sleep(1)
    assert answers.execution_ids == ["x-2"]


async def test_action_is_answered_while_sessions_wait_for_the_control_plane() -> None:
    class Slow(Answers):
        async def report_session_closed(self, session_id: str, reason: str) -> None:
            await asyncio.Event().wait()

    answers = Slow()
    rejections = Rejections(answers, make_node())
    rejections.reject_session("s-1")
    rejections.reject_action("x-1")
    async with running(rejections):
        await asyncio.sleep(1)
    assert answers.execution_ids == ["x-1"]
