"""The clock that tests run on is itself right."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from tests.virtual_time import Deadlock, run_virtual


def test_a_long_sleep_takes_no_time() -> None:
    async def main() -> float:
        await asyncio.sleep(86_400 * 30)
        return asyncio.get_running_loop().time()

    started = time.monotonic()
    assert run_virtual(main()) == pytest.approx(86_400 * 30)
    assert time.monotonic() - started < 5


def test_sleepers_wake_in_the_order_of_their_times() -> None:
    async def main() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        woken: list[tuple[str, float]] = []

        async def sleeper(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            woken.append((name, loop.time()))

        async with asyncio.TaskGroup() as group:
            for name, seconds in (("c", 300.0), ("a", 0.001), ("b", 60.0)):
                group.create_task(sleeper(name, seconds))
        return woken

    assert run_virtual(main()) == [("a", 0.001), ("b", 60.0), ("c", 300.0)]


def test_timeouts_are_virtual_too() -> None:
    async def main() -> float:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(90):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(90)


def test_clock_stands_still_while_a_thread_works() -> None:
    async def main() -> tuple[list[str], float]:
        order: list[str] = []

        async def ticker() -> None:
            await asyncio.sleep(1000)
            order.append("timer")

        task = asyncio.create_task(ticker())
        await asyncio.to_thread(time.sleep, 0.05)
        order.append("thread")
        at = asyncio.get_running_loop().time()
        await task
        return order, at

    assert run_virtual(main()) == (["thread", "timer"], 0.0)


def test_waiting_for_nothing_is_reported_instead_of_hanging() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run_virtual(main())


def test_errors_of_the_coroutine_reach_the_caller() -> None:
    async def main() -> None:
        await asyncio.sleep(5)
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_virtual(main())
