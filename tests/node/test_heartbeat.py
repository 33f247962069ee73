"""Heartbeats over hours: their pace and the flags they bring; what is told once after a start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from structlog.testing import capture_logs

from plexd.errors import NotFound, RateLimited, WireError
from plexd.mesh.keys import PrivateKey
from plexd.node.capabilities import Capabilities
from plexd.node.heartbeat import Heartbeat
from tests.node.heartbeats import GONE, REFUSED, UNKNOWN, Beats, Hints, beats, gaps
from tests.node_harness import highest, lowest, make_node

pytestmark = pytest.mark.virtual_time

# --- pace


def test_first_heartbeat_is_at_once_then_every_interval() -> None:
    assert beats(100, lambda _: Hints()).times == [0, 30, 60, 90]


@pytest.mark.parametrize(("uniform", "interval"), [(lowest, 27), (highest, 33)])
def test_interval_is_spread_by_a_tenth(uniform: Callable[[float, float], float], interval: float) -> None:
    assert gaps(beats(200, lambda _: Hints(), uniform=uniform).times) == pytest.approx(
        [interval] * int(200 // interval)
    )


@pytest.mark.parametrize(("interval", "limit"), [(5.0, 5.0), (30.0, 30.0), (300.0, 30.0)])
def test_limit_of_a_request_is_the_interval_and_at_most_30_seconds(interval: float, limit: float) -> None:
    assert beats(1, lambda _: Hints(), interval=interval).limits == {limit}


def test_hanging_request_does_not_stack() -> None:
    watched = beats(100, lambda _: GONE, takes=29.0)
    assert watched.times == [0, 30, 60, 90]  # a tick has its time, whatever the request took


@pytest.mark.parametrize("error", [GONE, WireError("nonsense")])
def test_failures_keep_the_pace_and_are_the_first_and_every_tenth_a_warning(error: Exception) -> None:
    with capture_logs() as lines:
        watched = beats(30 * 25 + 1, lambda _: error)
    assert set(gaps(watched.times)) == {30}
    assert [line["failures"] for line in lines if line["event"] == "heartbeat failed"] == [1, 10, 20]
    assert not watched.is_refused


@pytest.mark.parametrize(("uniform", "waited"), [(lowest, 100), (highest, 125)])
def test_retry_after_is_spread_and_skips_ticks(uniform: Callable[[float, float], float], waited: float) -> None:
    limited = RateLimited("429", status=429, retry_after=100.0)
    watched = beats(200, lambda n: limited if n == 1 else Hints(), uniform=uniform)
    assert watched.times[:2] == [0, waited]


async def test_request_sends_one_at_once_and_the_interval_counts_from_there() -> None:
    watched = Beats()
    await watched.run(70, (7.0, watched.heartbeat.request), (7.0, watched.heartbeat.request))
    assert watched.times == [0, 7, 37, 67]


async def test_request_during_a_heartbeat_sends_one_behind_it() -> None:
    watched = Beats(takes=10.0)
    await watched.run(45, (3.0, watched.heartbeat.request))
    assert watched.times == [0, 10, 40]


async def test_request_does_not_overrule_retry_after() -> None:
    limited = RateLimited("429", status=429, retry_after=100.0)
    watched = Beats(lambda n: limited if n == 1 else Hints(), uniform=lowest)
    await watched.run(110, (3.0, watched.heartbeat.request))
    assert watched.times == [0, 100]


# --- flags


def test_flag_asks_for_a_reconciliation() -> None:
    watched = beats(40, lambda n: Hints(reconcile=n == 2))
    assert watched.reconcile.calls == [(30, "heartbeat")]
    assert watched.rotation.calls == []


def test_flag_asks_for_a_rotation() -> None:
    watched = beats(40, lambda n: Hints(rotate_keys=n == 2))
    assert watched.rotation.calls == [(30, "heartbeat")]
    assert watched.reconcile.calls == []


async def test_rotation_is_asked_for_before_the_reconciliation() -> None:
    order: list[str] = []
    watched = Beats(lambda _: Hints(reconcile=True, rotate_keys=True))
    heartbeat = Heartbeat(
        watched.beat, watched.node, 30.0, lambda _: order.append("reconcile"), lambda _: order.append("rotate")
    )
    task = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(1)
    task.cancel()
    assert order == ["rotate", "reconcile"]


async def test_flag_from_before_the_last_rotation_is_stale() -> None:
    """The heartbeat was on its way when the rotation it asks for was finished."""
    watched = Beats(lambda n: Hints(rotate_keys=n <= 2), takes=2.0)
    new = replace(watched.node.identity, private_key=PrivateKey(bytes([16] * 32)))
    await watched.run(40, (1.0, lambda: watched.node.rotate(new)))
    assert watched.rotation.calls == [(32, "heartbeat")]


def test_two_404s_are_nothing() -> None:
    watched = beats(400, lambda n: Hints() if n % 3 == 0 else UNKNOWN)
    assert not watched.is_refused
    assert set(gaps(watched.times)) == {30}


# --- capabilities, told once after every start


@dataclass
class Told:
    errors: list[Exception]
    times: list[float] = field(default_factory=list)

    async def put_capabilities(self) -> None:
        self.times.append(asyncio.get_running_loop().time())
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.parametrize(
    ("errors", "times"), [([], [0]), ([NotFound("404", status=404)], [0]), ([REFUSED, REFUSED], [0, 60, 120])]
)
async def test_capabilities_are_told_once(errors: list[Exception], times: list[float]) -> None:
    told = Told(list(errors))
    task = asyncio.create_task(Capabilities(told, make_node()).run())
    await asyncio.sleep(1000)
    assert not task.done()
    task.cancel()
    assert told.times == times


# --- what status tells


@pytest.mark.parametrize(
    ("answer", "ok"),
    [
        (Hints(), True),
        (REFUSED, False),
        (UNKNOWN, False),
        (GONE, False),
        (WireError("not JSON"), False),
    ],
)
def test_contact_knows_how_the_last_heartbeat_went(answer: Hints | Exception, ok: bool) -> None:
    watched = beats(1, lambda _: answer)
    assert watched.node.connection.last_heartbeat_ok is ok
    assert watched.node.connection.last_heartbeat_at is not None


def test_contact_knows_that_heartbeats_are_taken_again() -> None:
    assert beats(100, lambda n: GONE if n == 1 else Hints()).node.connection.last_heartbeat_ok is True


def test_404s_with_other_failures_between_are_not_in_a_row() -> None:
    watched = beats(400, lambda n: UNKNOWN if n % 2 else GONE)
    assert not watched.is_refused
    assert set(gaps(watched.times)) == {30}


async def test_new_node_says_at_once_that_it_is_alive_whatever_the_old_one_was_to_wait_for() -> None:
    watched = Beats(lambda n: RateLimited("429", status=429, retry_after=300.0) if n == 1 else Hints())
    other = replace(watched.node.identity, node_id="n_new")
    await watched.run(50, (40.0, lambda: watched.node.renew(other, watched.node.desired, 0.0)))
    assert watched.times == [0, 40]
