"""Suspended machines and set clocks."""

from __future__ import annotations

import asyncio

import pytest

from plexd.runtime.clocks import Clocks, Reading, gap, read_clocks
from tests.node_harness import Asked

pytestmark = pytest.mark.virtual_time

BEFORE = Reading(100.0, 500.0, 1_800_000_000.0)


@pytest.mark.parametrize(
    ("monotonic", "boot", "wall", "what"),
    [
        (2.0, 2.0, 2.0, None),
        (31.0, 31.0, 31.0, None),  # a loop that was blocked
        (2.0, 2.0, 3.5, None),
        (2.0, 602.0, 602.0, "resumed after 600 s"),
        (2.0, 602.0, 2.0, "resumed after 600 s"),
        (2.0, 2.0, 3602.0, "clock set by +3600 s"),
        (2.0, 2.0, -3598.0, "clock set by -3600 s"),
    ],
)
def test_time_that_went_by_unseen_is_told(monotonic: float, boot: float, wall: float, what: str | None) -> None:
    now = Reading(BEFORE.monotonic + monotonic, BEFORE.boot + boot, BEFORE.wall + wall)
    assert gap(BEFORE, now) == what


def test_own_clocks_agree_about_a_moment() -> None:
    assert gap(read_clocks(), read_clocks()) is None


async def test_gap_is_told_once() -> None:
    asleep = 0.0

    def read() -> Reading:
        now = asyncio.get_running_loop().time()
        return Reading(now, now + asleep, now + asleep)

    asked = Asked()
    clocks = Clocks(read)
    clocks.on_gap.append(asked)
    task = asyncio.create_task(clocks.run())
    await asyncio.sleep(61)
    assert asked.calls == []
    asleep = 3600.0
    await asyncio.sleep(60)
    assert asked.calls == [(62.0, "resumed after 3600 s")]
    task.cancel()
    await asyncio.wait({task})


def test_who_looks_at_once_knows_of_a_gap_before_the_timer_does() -> None:
    readings = iter([BEFORE, Reading(101.0, 4101.0, 1_800_003_601.0)])
    asked: list[str] = []
    clocks = Clocks(lambda: next(readings))
    clocks.on_gap.append(asked.append)
    clocks.look()
    assert asked == ["resumed after 3600 s"]
