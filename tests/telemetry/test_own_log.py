"""The agent's own records as entries."""

import asyncio

import pytest

from plexd.telemetry.own_log import RING, OwnLog
from plexd.telemetry.records import LogEncoder
from tests.telemetry.harness import Plane, Stage

pytestmark = pytest.mark.virtual_time


async def with_own_log(stage: Stage) -> OwnLog:
    own = OwnLog(stage.pipeline, LogEncoder("plexd", "host", 16384), "plexd.service")
    stage.pipeline.sources[:] = [own]
    return own


async def test_records_are_forwarded_with_their_severity_and_keys() -> None:
    stage = Stage()
    own = await with_own_log(stage)
    own.add("warn", "mesh", "mesh: peer lost peer=n_1")
    own.add("error", "telemetry", "telemetry: delivery failing")  # would make more of its own kind
    async with stage:
        own.add("fatal", "daemon", "daemon: the end")
        await asyncio.sleep(11)
        found = [(e["severity"], e["source"], e["unit"], e["message"]) for e in stage.plane.taken]
        assert found == [
            ("warning", "plexd", "plexd.service", "mesh: peer lost peer=n_1"),
            ("crit", "plexd", "plexd.service", "daemon: the end"),
        ]


async def test_what_does_not_fit_into_the_ring_is_counted_and_marked() -> None:
    stage = Stage(Plane())
    own = await with_own_log(stage)
    for number in range(RING + 7):
        own.add("info", "mesh", f"mesh: {number}")
    async with stage:
        await asyncio.sleep(30)
        assert stage.plane.markers == ["telemetry gap: source=agent reason=overflow lost=7"]
        assert stage.plane.taken[-1]["message"] == f"mesh: {RING + 6}"
        assert stage.pipeline.counters.dropped == {"overflow": 7}
