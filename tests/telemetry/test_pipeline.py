"""Collection and delivery in virtual time: order, batches, failures, waits, the end. The balance holds after each."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from plexd.errors import ControlError
from plexd.telemetry.gaps import Gap, Reason
from plexd.telemetry.window import Limits
from tests.node_harness import highest
from tests.telemetry.harness import LIMITS, Hand, Plane, Stage, body, error

pytestmark = pytest.mark.virtual_time


def failing(*statuses: int | None, retry_after: float | None = None) -> Plane:
    """The first requests fail with these; the rest is taken."""
    left = list(statuses)

    def judge(_batch: list[Any]) -> ControlError | None:
        status = left.pop(0) if left else None
        return None if status is None else error(status, retry_after)

    return Plane(judge)


async def test_partial_batch_is_sent_after_the_batch_interval() -> None:
    async with Stage() as stage:
        await stage.hand.put(1, 2, 3)
        await asyncio.sleep(9.9)
        assert stage.plane.batches == []
        await asyncio.sleep(0.2)
        assert stage.plane.numbers == [1, 2, 3]
        assert stage.hand.settled == [1, 2, 3]


async def test_full_batch_is_sent_at_once() -> None:
    async with Stage() as stage:
        await stage.hand.put(*range(25))
        await asyncio.sleep(1)
        assert [len(batch) for batch in stage.plane.batches] == [10, 10]


async def test_first_batch_is_shifted_so_that_a_fleet_is_not_in_step() -> None:
    stage = Stage()
    stage.pipeline._first_shift = 7.0
    async with stage:
        await stage.hand.put(1)
        await asyncio.sleep(16)
        assert stage.plane.batches == []
        await asyncio.sleep(2)
        await stage.hand.put(2)
        await asyncio.sleep(10.1)
        assert stage.plane.numbers == [1, 2]


async def test_slow_request_does_not_stop_collection_and_there_is_one_at_a_time() -> None:
    async with Stage(Plane(seconds=20.0)) as stage:
        await stage.hand.put(*range(30))
        assert asyncio.get_running_loop().time() == 0
        await asyncio.sleep(65)
        assert stage.plane.numbers == list(range(30))


async def test_window_that_is_full_holds_the_source_up_and_nothing_is_dropped() -> None:
    async with Stage(Plane(lambda _: error(503))) as stage:
        putting = asyncio.create_task(stage.hand.put(*range(150)))
        await asyncio.sleep(600)
        assert stage.pipeline.window.count == 100
        assert stage.pipeline.status()["sources"][0]["state"] == "paused"
        stage.plane.judge = lambda _: None
        await putting
        await asyncio.sleep(100)
        assert stage.plane.numbers == list(range(150))
        assert stage.pipeline.counters.dropped.total() == 0


async def test_failures_back_off_and_the_same_batch_is_sent_again() -> None:
    async with Stage(failing(500, None, 502, 408)) as stage:
        await stage.hand.put(*range(10))
        await asyncio.sleep(5)
        assert stage.plane.batches == [[{"n": n} for n in range(10)]] * 2
        await stage.hand.put(*range(10, 20))
        await asyncio.sleep(30)
        assert stage.plane.numbers == list(range(20))
        assert stage.pipeline.counters.batches_failed == 3


async def test_backlog_of_an_outage_is_sent_without_waiting() -> None:
    async with Stage(failing(*[503] * 8)) as stage:
        await stage.hand.put(*range(95))
        await asyncio.sleep(400)
        sent = stage.plane.times[8:]
        assert [len(batch) for batch in stage.plane.batches[8:]] == [10] * 9 + [5]
        assert sent[8] - sent[0] < 0.1


async def test_retry_after_is_respected_and_others_go_on() -> None:
    """T7."""
    async with Stage(failing(429, retry_after=120.0)) as slowed, Stage() as other:
        await slowed.hand.put(*range(10))
        await other.hand.put(*range(10))
        await asyncio.sleep(119)
        assert len(slowed.plane.batches) == 1
        slowed.pipeline.wake()
        await asyncio.sleep(0.5)
        assert len(slowed.plane.batches) == 1
        assert other.plane.numbers == list(range(10))
        await asyncio.sleep(2)
        assert slowed.plane.numbers == list(range(10))


@pytest.mark.parametrize(
    ("status", "retry_after"), [(429, 3600.0), (503, 3600.0), (403, None), (404, None), (405, None)]
)
async def test_new_node_does_not_serve_a_wait_of_the_former_node(status: int, retry_after: float | None) -> None:
    async with Stage(failing(status, retry_after=retry_after)) as stage:
        await stage.hand.put(*range(10))
        await asyncio.sleep(100)
        assert len(stage.plane.batches) == 1
        stage.pipeline.node_renewed()
        await asyncio.sleep(0.1)
        assert stage.plane.numbers == list(range(10))


async def test_late_answer_to_the_former_node_is_no_wait_for_the_new_one() -> None:
    async with Stage(failing(429, retry_after=3600.0)) as stage:
        stage.plane.seconds = 5.0
        await stage.hand.put(*range(10))
        await asyncio.sleep(1)
        stage.pipeline.node_renewed()
        await asyncio.sleep(10)
        assert stage.plane.numbers == list(range(10))


async def test_postponed_deliveries_of_a_fleet_are_spread() -> None:
    async with Stage(failing(429, retry_after=120.0), uniform=highest) as slowed:
        await slowed.hand.put(*range(10))
        await asyncio.sleep(149)
        assert len(slowed.plane.batches) == 1
        await asyncio.sleep(5)
        assert slowed.plane.numbers == list(range(10))


async def test_first_batches_of_a_fleet_are_shifted_by_up_to_a_batch_interval() -> None:
    """The shift comes on top of the interval, and only for the first batch."""
    async with Stage(uniform=highest) as stage:
        await stage.hand.put(1)
        await asyncio.sleep(1.9 * LIMITS.batch_seconds)
        assert stage.plane.batches == []
        await asyncio.sleep(0.2 * LIMITS.batch_seconds)
        assert len(stage.plane.batches) == 1
        await stage.hand.put(2)
        await asyncio.sleep(1.1 * LIMITS.batch_seconds)
        assert len(stage.plane.batches) == 2


async def test_reached_control_plane_ends_a_backoff() -> None:
    async with Stage(failing(*[503] * 7)) as stage:
        await stage.hand.put(*range(10))
        await asyncio.sleep(60)
        tries = len(stage.plane.batches)
        assert tries < 8
        while len(stage.plane.taken) < 10:
            stage.pipeline.wake()
            await asyncio.sleep(0.1)
        assert asyncio.get_running_loop().time() < 62


async def test_poison_entry_is_dropped_and_the_rest_arrives() -> None:
    """T6."""
    limits = Limits(500, 1 << 20, 10.0, 10_000, 16 << 20)
    stage = Stage(Plane(lambda batch: error(400) if any(e.get("n") == 123 for e in batch) else None), limits)
    async with stage:
        await stage.hand.put(*range(1000))
        await asyncio.sleep(5)
        assert stage.plane.numbers == [n for n in range(1000) if n != 123]
        assert stage.pipeline.counters.dropped == {"rejected": 1}
        assert stage.hand.settled == list(range(1000))


async def test_batch_refused_as_a_whole_is_put_aside_and_the_next_one_flows() -> None:
    async with Stage(Plane(lambda batch: error(422) if batch[0]["n"] < 10 else None)) as stage:
        await stage.hand.put(*range(20))
        await asyncio.sleep(5)
        assert [body(n) for n in range(10)] == stage.aside
        assert stage.plane.numbers == list(range(10, 20))
        assert stage.pipeline.counters.dropped == {"quarantined": 10}


async def test_more_poison_than_requests_may_find_is_put_aside_with_what_stands_beside_it() -> None:
    """Nobody hears of those by a marker, so none may be missing from the quarantine."""
    poison = {20, 70, 120, 170}
    plane = Plane(lambda batch: error(400) if poison & {e.get("n") for e in batch} else None)
    async with Stage(plane, Limits(200, 1 << 20, 10.0, 1000, 16 << 20)) as stage:
        await stage.hand.put(*range(400))
        await asyncio.sleep(5)
        aside = [json.loads(entry)["n"] for entry in stage.aside]
        dropped = stage.pipeline.counters.dropped
        rejected = sorted(set(range(400)) - set(plane.numbers) - set(aside))
        assert set(rejected) < poison
        assert len(aside) > len(poison)
        assert dropped == {"quarantined": len(aside), "rejected": len(rejected)}
        assert len(plane.numbers) + len(aside) + len(rejected) == 400
        assert stage.hand.settled[-1] == 399


async def test_end_that_comes_while_entries_are_put_aside_loses_none_of_them() -> None:
    stage = Stage(Plane(lambda batch: error(422) if batch[0]["n"] < 10 else None))
    put_aside, tries = stage.pipeline._put_aside, []

    async def slowly(bodies: Sequence[bytes]) -> object:
        tries.append(len(bodies))
        if len(tries) == 1:
            await asyncio.sleep(60)
        return await put_aside(bodies)

    stage.pipeline._put_aside = slowly
    async with stage:
        await stage.hand.put(*range(15))
        await asyncio.sleep(5)
        assert (tries, stage.aside, stage.hand.settled) == ([10], [], [])
    await stage.pipeline.finish(5)
    assert stage.aside == [body(n) for n in range(10)]
    assert stage.plane.numbers == list(range(10, 15))
    assert stage.hand.settled == list(range(15))
    assert stage.pipeline.imbalance() == 0


async def test_entries_refused_as_too_large_arrive_in_smaller_batches() -> None:
    """T5."""

    def judge(batch: list[Any]) -> ControlError | None:
        return error(413) if sum(len(e["message"]) for e in batch) > 200 << 10 else None

    stage = Stage(Plane(judge), Limits(1000, 1 << 20, 10.0, 10_000, 16 << 20))
    async with stage:
        await stage.hand.put(*range(3000), message="m" * 1000)
        await asyncio.sleep(30)
        assert stage.plane.numbers == list(range(3000))
        assert stage.pipeline.counters.dropped.total() == 0
        assert stage.pipeline.counters.batches_failed <= 4  # the limit was learnt


async def test_single_entry_too_large_is_cut_short_and_counted() -> None:
    def judge(batch: list[Any]) -> ControlError | None:
        return error(413) if any(len(e["message"]) > 2000 for e in batch) else None

    async with Stage(Plane(judge)) as stage:
        await stage.hand.put(1, message="m" * 5000)
        await asyncio.sleep(11)
        assert stage.plane.taken[0]["message"].endswith("[truncated]")
        assert len(stage.plane.taken[0]["message"]) == 1024
        assert stage.pipeline.counters.truncated == 1
        assert stage.pipeline.window.bytes == 0


@pytest.mark.parametrize(("status", "seconds"), [(403, 300), (404, 300), (405, 900), (501, 900)])
async def test_refusal_of_the_whole_endpoint_pauses(status: int, seconds: float) -> None:
    async with Stage(failing(status)) as stage:
        with capture_logs() as logs:
            await stage.hand.put(*range(10))
            await asyncio.sleep(seconds - 1)
            assert len(stage.plane.batches) == 1
            assert stage.pipeline.status()["state"] == "paused"
            await asyncio.sleep(2)
            assert stage.plane.numbers == list(range(10))
            assert [line["event"] for line in logs] == ["delivery paused", "delivery recovered"]


async def test_unprovisioned_endpoint_empties_what_is_worth_nothing_later() -> None:
    async with Stage(failing(501), keeps_when_unprovisioned=False) as stage:
        await stage.hand.put(*range(15))
        await asyncio.sleep(1)
        assert stage.pipeline.counters.dropped == {"unprovisioned": 15}
        await stage.hand.put(*range(15, 20))
        await asyncio.sleep(1000)
        assert stage.plane.numbers == list(range(15, 20))


async def test_refused_identity_pauses_until_it_is_accepted() -> None:
    async with Stage(failing(401)) as stage:
        await stage.hand.put(*range(10))
        await asyncio.sleep(5)
        stage.accepted.clear()
        await asyncio.sleep(3600)
        assert len(stage.plane.batches) == 1
        assert stage.pipeline.status()["state"] == "paused"
        stage.accepted.set()
        await asyncio.sleep(1)
        assert stage.plane.numbers == list(range(10))


async def test_failing_is_said_once_and_then_every_five_minutes() -> None:
    async with Stage(Plane(lambda _: error(500))) as stage:
        with capture_logs() as logs:
            await stage.hand.put(*range(10))
            await asyncio.sleep(1000)
        assert 3 <= len([line for line in logs if line["event"] == "delivery failing"]) <= 4
        assert len(stage.plane.batches) > 15


async def test_position_of_filtered_entries_waits_for_what_came_before_them() -> None:
    async with Stage() as stage:
        feed = stage.hand.feed
        feed.skip_filtered(1)
        assert stage.hand.settled == [1]
        await stage.hand.put(2)
        feed.skip_filtered(3)
        feed.skip_empty(4)
        assert stage.hand.settled == [1]
        await asyncio.sleep(11)
        assert stage.hand.settled == [1, 4]
        counters = stage.pipeline.counters
        assert (counters.collected, counters.filtered, counters.empty, counters.sent) == (4, 2, 1, 1)


async def test_gap_is_marked_at_its_place_and_later_ones_once_a_minute() -> None:
    async with Stage() as stage:
        await stage.hand.put(1)
        await stage.hand.feed.gap(Reason.TRUNCATED_FILE, None, 2)
        await stage.hand.put(3)
        await stage.hand.feed.gap(Reason.TRUNCATED_FILE, 4, 4)
        await stage.hand.feed.gap(Reason.TRUNCATED_FILE, 5, 5)
        assert stage.pipeline.owed_gaps == [Gap("hand", Reason.TRUNCATED_FILE, 9)]
        await asyncio.sleep(11)
        assert [entry.get("n") for entry in stage.plane.taken] == [1, None, 3]
        assert stage.hand.settled == [1, 2, 5]
        await asyncio.sleep(61)
        assert stage.plane.markers == [
            "telemetry gap: source=hand reason=truncated_file lost=unknown",
            "telemetry gap: source=hand reason=truncated_file lost=9",
        ]
        assert stage.pipeline.owed_gaps == []
        assert stage.saves >= 3


async def test_gap_owed_by_an_earlier_process_is_marked() -> None:
    async with Stage(owed=[Gap("app.log", Reason.ROTATED_AWAY, 7)]) as stage:
        await asyncio.sleep(11)
        assert stage.plane.markers == ["telemetry gap: source=app.log reason=rotated_away lost=7"]


async def test_oldest_gives_way_where_that_is_wanted() -> None:
    async with Stage(Plane(lambda _: error(503))) as stage:
        for number in range(150):
            stage.hand.feed.push(body(number), number)
            await asyncio.sleep(0.01)
        assert stage.pipeline.counters.dropped == {"overflow": 50}
        stage.plane.judge = lambda _: None
        await asyncio.sleep(100)
        assert stage.plane.numbers == [*range(10), *range(60, 150)]  # the first ten were on their way


class Breaking:
    """A source that fails `times` times."""

    name = "hand"

    def __init__(self, stage: Stage, times: int) -> None:
        self.stage, self.left = stage, times
        self.starts: list[float] = []

    async def collect(self) -> None:
        self.starts.append(asyncio.get_running_loop().time())
        if self.left:
            self.left -= 1
            raise ValueError("broken record")
        await self.stage.hand.put(99)
        await asyncio.Event().wait()


async def test_source_that_fails_is_started_again_and_harms_no_other() -> None:
    stage = Stage()
    breaking = Breaking(stage, 3)
    stage.pipeline.sources[:] = [breaking, Hand(stage.pipeline, "other")]
    with capture_logs() as logs:
        async with stage:
            await asyncio.sleep(30)
            assert stage.plane.numbers == [99]
            assert stage.pipeline.counters.source_errors == 3
            assert [round(at) for at in breaking.starts] == [0, 1, 2, 5]
    assert [line["event"] for line in logs] == ["source failed"]


async def test_what_is_left_is_sent_at_the_end() -> None:
    async with Stage() as stage:
        await stage.hand.put(*range(15))
        stage.task.cancel()
        await asyncio.wait({stage.task})
        await stage.pipeline.finish(5.0)
        assert stage.plane.numbers == list(range(15))
        assert stage.hand.settled == list(range(15))


async def test_request_cut_off_by_the_end_is_repeated_and_nothing_is_lost() -> None:
    async with Stage(Plane(seconds=3.0)) as stage:
        await stage.hand.put(*range(15))
        await asyncio.sleep(1)
        stage.task.cancel()
        await asyncio.wait({stage.task})
        await stage.pipeline.finish(7.0)
        assert sorted(set(stage.plane.numbers)) == list(range(15))


@pytest.mark.parametrize("plane", [Plane(lambda _: error(503)), Plane(seconds=1000.0)], ids=["refuses", "hangs"])
async def test_end_with_a_dead_control_plane_is_bounded_and_settles_nothing(plane: Plane) -> None:
    """T13."""
    async with Stage(plane) as stage:
        await stage.hand.put(*range(35))
        await asyncio.sleep(1)
        stage.task.cancel()
        await asyncio.wait({stage.task})
        before = asyncio.get_running_loop().time()
        await stage.pipeline.finish(5.0)
        assert asyncio.get_running_loop().time() - before <= 5.0
        assert stage.hand.settled == []
        assert stage.pipeline.window.count == 35


async def test_status_has_the_members_of_the_contract() -> None:
    async with Stage(failing(500)) as stage:
        stage.hand.feed.row.position = lambda: "there"
        await stage.hand.put(*range(12))
        await asyncio.sleep(3)
        status = stage.pipeline.status()
        assert status.keys() == {
            "enabled", "state", "buffered", "capacity", "dropped", "last_delivery_at", "last_error", "sources",
            "counters",
        }  # fmt: skip
        assert (status["state"], status["buffered"], status["capacity"]) == ("ok", 2, LIMITS.entries)
        assert status["last_error"] == "status 500"
        assert status["sources"][0]["position"] == "there"
        assert status["sources"][0]["entries"] == 12
        gauges = stage.pipeline.gauges()
        assert gauges["buffered_bytes"] == stage.pipeline.window.bytes > 0
        assert gauges["oldest_age_seconds"] == pytest.approx(3.0, abs=0.1)
