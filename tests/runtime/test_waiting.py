"""What must not be left half done is not, however often it is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from plexd.runtime.waiting import to_its_end, unless_set
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time


def test_work_gives_its_result() -> None:
    async def work() -> int:
        await asyncio.sleep(1)
        return 7

    assert run_virtual(to_its_end(work())) == 7


@pytest.mark.parametrize("cancellations", [1, 3])
async def test_cancellation_waits_for_the_work_and_is_passed_on(cancellations: int) -> None:
    done: list[float] = []

    async def work() -> None:
        await asyncio.sleep(10)
        done.append(asyncio.get_running_loop().time())

    task = asyncio.create_task(to_its_end(work()))
    for _ in range(cancellations):
        await asyncio.sleep(1)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [10]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_failed_work_says_so_cancelled_or_not(cancelled: bool) -> None:
    async def work() -> None:
        await asyncio.sleep(10)
        raise OSError("disk full")

    task = asyncio.create_task(to_its_end(work()))
    await asyncio.sleep(1)
    if cancelled:
        task.cancel()
    with pytest.raises(OSError, match="disk full"):
        await task


@pytest.mark.parametrize("is_set", [False, True])
async def test_work_is_done_unless_the_event_comes_first(is_set: bool) -> None:
    event, ended = asyncio.Event(), []

    async def work() -> int:
        try:
            await asyncio.sleep(2)
            return 1
        finally:
            ended.append(True)

    if is_set:
        asyncio.get_running_loop().call_later(1, event.set)
    assert await unless_set(event, work()) == (None if is_set else 1)
    assert ended == [True]


@pytest.mark.parametrize("is_set", [False, True])
async def test_cancellation_ends_work_and_caller_also_while_the_event_is_ending_the_work(is_set: bool) -> None:
    event, ended = asyncio.Event(), []

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(5)
            ended.append(True)

    async def service() -> None:
        await unless_set(event, slow_to_end())
        await asyncio.sleep(100)

    task = asyncio.create_task(service())
    await asyncio.sleep(1)
    if is_set:
        event.set()
        await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task}, timeout=10)
    assert (task.done() and task.cancelled(), ended) == (True, [True])


@pytest.mark.parametrize("is_set", [False, True])
async def test_work_that_fails_while_it_is_ended_says_so(is_set: bool) -> None:
    event = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            raise OSError("disk full")

    task = asyncio.create_task(unless_set(event, work()))
    await asyncio.sleep(1)
    if is_set:
        event.set()
    else:
        task.cancel()
    with pytest.raises(OSError, match="disk full"):
        await task
