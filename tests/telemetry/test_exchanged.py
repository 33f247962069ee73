"""A pipeline that is exchanged for a new one: nothing is lost between the two, and the counters go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from plexd.runtime.exchange import Exchangeable
from plexd.store.cursors import Cursors
from plexd.telemetry.counters import Counters
from plexd.telemetry.gaps import Reason
from plexd.telemetry.pipeline import Pipeline
from tests.telemetry.harness import Stage, error

pytestmark = pytest.mark.virtual_time


class Numbers:
    """A source of numbers without end, one a second; its position is the number it begins with."""

    name = "numbers"

    def __init__(self, pipeline: Pipeline, cursors: Cursors, first: int = 0) -> None:
        self.delivered = cursors.register(self.name, lambda: self.delivered) or first
        self._next = self.delivered
        self._feed = pipeline.feed(self.name, self._settled)

    def _settled(self, position: int) -> None:
        self.delivered = position

    async def collect(self) -> None:
        while True:
            await self._feed.put(b'{"n":%d}' % self._next, self._next + 1)
            self._next += 1
            await asyncio.sleep(1)


class Bench:
    """Pipelines that succeed each other at one control plane, as long as `is_on`."""

    def __init__(self, directory: Path) -> None:
        self.cursors = Cursors(directory)
        self.cursors.load()
        self.is_on = True
        self.stages: list[Stage] = []
        self.counters = Counters()
        self.plane = Stage().plane

    def build(self) -> Pipeline | None:
        if not self.is_on:
            return None
        stage = Stage(self.plane)
        stage.pipeline.counters = self.counters
        stage.pipeline.sources[:] = [Numbers(stage.pipeline, self.cursors)]
        self.stages.append(stage)
        return stage.pipeline

    async def retire(self, pipeline: Pipeline) -> None:
        await pipeline.finish(5)
        pipeline.drop_rest(lambda feed: feed == Numbers.name)
        self.cursors.release(Numbers.name)
        assert pipeline.imbalance() == 0


@pytest.mark.parametrize("status", [None, 503])
async def test_successor_goes_on_where_the_other_one_got(tmp_path: Path, status: int | None) -> None:
    bench = Bench(tmp_path)
    service = Exchangeable("logs", bench.build, Pipeline.run, bench.retire)
    running = asyncio.create_task(service.run())
    await asyncio.sleep(15)
    if status is not None:
        bench.plane.judge = lambda _: error(status)
    await bench.stages[0].hand.feed.gap(Reason.ROTATED_AWAY, 1, 0)
    service.exchange()
    await asyncio.sleep(30)
    bench.plane.judge = lambda _: None
    await asyncio.sleep(60)
    bench.is_on = False
    service.exchange()
    await asyncio.sleep(30)
    last = bench.plane.numbers[-1]
    bench.is_on = True
    service.exchange()
    await asyncio.sleep(30)
    assert len(bench.stages) == 3
    assert bench.plane.numbers == list(range(bench.plane.numbers[-1] + 1))
    assert bench.plane.numbers[-1] > last > 60
    assert bench.stages[-1].pipeline.imbalance() == 0
    running.cancel()
    await asyncio.wait({running})


async def test_end_that_was_interrupted_is_gone_through_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.plane.seconds = 3.0
    service = Exchangeable("logs", bench.build, Pipeline.run, bench.retire)
    running = asyncio.create_task(service.run())
    await asyncio.sleep(15)
    service.exchange()
    await asyncio.sleep(1)
    running.cancel()
    await asyncio.wait({running})
    assert len(bench.stages) == 1
    running = asyncio.create_task(service.run())
    await asyncio.sleep(60)
    assert len(bench.stages) == 2
    numbers = list(dict.fromkeys(bench.plane.numbers))
    assert numbers == list(range(numbers[-1] + 1))
    assert numbers[-1] > 40
    running.cancel()
    await asyncio.wait({running})


async def test_failure_is_the_supervisors_to_see_and_the_pipeline_stays(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    service = Exchangeable("logs", bench.build, lambda pipeline: pipeline.run(), bench.retire)
    pipeline = bench.stages[0].pipeline
    run = pipeline.run

    async def fail() -> None:
        raise RuntimeError

    pipeline.run = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        await service.run()
    pipeline.run = run  # type: ignore[method-assign]
    running = asyncio.create_task(service.run())
    await asyncio.sleep(20)
    assert bench.plane.numbers
    assert len(bench.stages) == 1
    running.cancel()
    await asyncio.wait({running})
