"""What lives long is not walked over again and again, and garbage is found all the same."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from plexd.runtime.garbage import FIRST_SECONDS, LONGEST_SECONDS, Garbage

pytestmark = pytest.mark.virtual_time


class Cycle:
    def __init__(self) -> None:
        self.itself = self


async def test_what_is_there_a_while_after_the_start_is_left_out_of_later_collections() -> None:
    kept = Cycle()
    task = asyncio.create_task(Garbage().run())
    await asyncio.sleep(FIRST_SECONDS * 0.5)
    assert gc.get_freeze_count() == 0
    await asyncio.sleep(FIRST_SECONDS)
    assert gc.get_freeze_count() > 0
    assert not any(one is kept for one in gc.get_objects())  # those that a collection would walk over
    task.cancel()
    await asyncio.wait({task})
    assert gc.get_freeze_count() == 0


async def test_garbage_is_found_though_it_was_frozen_while_in_use() -> None:
    cycle = Cycle()
    seen = weakref.ref(cycle)
    task = asyncio.create_task(Garbage().run())
    await asyncio.sleep(FIRST_SECONDS * 1.5)
    del cycle
    gc.collect()
    assert seen() is not None
    await asyncio.sleep(LONGEST_SECONDS)
    assert seen() is None
    task.cancel()
    await asyncio.wait({task})
