"""Heartbeats over hours: their pace, the flags they bring, and how a refused identity is confirmed and ends."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from structlog.testing import capture_logs

from plexd.errors import NotFound, RateLimited, Transient, Unauthenticated, WireError
from plexd.health import Condition, Health
from plexd.mesh.keys import PrivateKey
from plexd.node import Node
from plexd.services.capabilities import Capabilities
from plexd.services.heartbeat import Heartbeat
from tests.services.stage import Asked, highest, lowest, make_node, middle
from tests.virtual_time import run_virtual

REFUSED = Unauthenticated("401", status=401)
UNKNOWN = NotFound("404", status=404)
GONE = Transient("gone")


@dataclass(frozen=True)
class Hints:
    reconcile: bool = False
    rotate_keys: bool = False


@dataclass
class Beats:
    """Heartbeat n (from 1) takes `takes` seconds and is answered with `script(n)`."""

    script: Callable[[int], Hints | Exception] = lambda _: Hints()
    takes: float = 0.0
    uniform: Callable[[float, float], float] = middle
    interval: float = 30.0
    times: list[float] = field(default_factory=list)
    limits: set[float] = field(default_factory=set)
    running: int = 0
    reconcile: Asked = field(default_factory=Asked)
    rotation: Asked = field(default_factory=Asked)

    def __post_init__(self) -> None:
        self.health = Health()
        self.node: Node = make_node(health=self.health)

    async def beat(self, limit_seconds: float) -> Hints:
        self.times.append(round(asyncio.get_running_loop().time(), 3))
        self.limits.add(limit_seconds)
        number = len(self.times)
        self.running += 1
        assert self.running == 1, "heartbeats pile up"
        await asyncio.sleep(self.takes)
        self.running -= 1
        answer = self.script(number)
        if isinstance(answer, Exception):
            if answer is REFUSED:
                self.node.suspect(self.node.credential())  # as the client does
            raise answer
        return answer

    async def run(self, seconds: float, *meanwhile: tuple[float, Callable[[], object]]) -> None:
        """`meanwhile` are calls and when they are made."""
        loop = asyncio.get_running_loop()
        heartbeat = Heartbeat(self.beat, self.node, self.interval, self.reconcile, self.rotation, self.uniform)
        task = asyncio.create_task(heartbeat.run())
        for when, call in meanwhile:
            loop.call_at(when, call)
        await asyncio.sleep(seconds)
        assert not task.done(), task
        task.cancel()
        await asyncio.wait({task})

    @property
    def is_refused(self) -> bool:
        return any(finding.condition is Condition.IDENTITY_REFUSED for finding in self.health.findings())

    def suspect(self) -> None:
        self.node.suspect(self.node.credential())


def beats(seconds: float, script: Callable[[int], Hints | Exception], **options: object) -> Beats:
    async def main() -> Beats:
        watched = Beats(script, **options)  # type: ignore[arg-type]
        await watched.run(seconds)
        return watched

    return run_virtual(main())


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


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


def test_retry_after_skips_ticks() -> None:
    limited = RateLimited("429", status=429, retry_after=100.0)
    watched = beats(200, lambda n: limited if n == 1 else Hints(), uniform=lowest)
    assert watched.times[:2] == [0, 100]


# --- flags


def test_flag_asks_for_a_reconciliation() -> None:
    watched = beats(40, lambda n: Hints(reconcile=n == 2))
    assert watched.reconcile.calls == [(30, "heartbeat")]
    assert watched.rotation.calls == []


def test_flag_asks_for_a_rotation() -> None:
    watched = beats(40, lambda n: Hints(rotate_keys=n == 2))
    assert watched.rotation.calls == [(30, "heartbeat")]
    assert watched.reconcile.calls == []


def test_rotation_is_asked_for_before_the_reconciliation() -> None:
    async def main() -> list[str]:
        order: list[str] = []
        watched = Beats(lambda _: Hints(reconcile=True, rotate_keys=True))
        heartbeat = Heartbeat(
            watched.beat, watched.node, 30.0, lambda _: order.append("reconcile"), lambda _: order.append("rotate")
        )
        task = asyncio.create_task(heartbeat.run())
        await asyncio.sleep(1)
        task.cancel()
        return order

    assert run_virtual(main()) == ["rotate", "reconcile"]


def test_flag_from_before_the_last_rotation_is_stale() -> None:
    """The heartbeat was on its way when the rotation it asks for was finished."""

    async def main() -> Beats:
        watched = Beats(lambda n: Hints(rotate_keys=n <= 2), takes=2.0)
        new = replace(watched.node.identity, private_key=PrivateKey(bytes([16] * 32)))
        await watched.run(40, (1.0, lambda: watched.node.rotate(new)))
        return watched

    assert run_virtual(main()).rotation.calls == [(32, "heartbeat")]


# --- a refused identity


def test_one_401_is_confirmed_by_a_heartbeat_after_5_seconds() -> None:
    watched = beats(50, lambda n: REFUSED if n == 1 else Hints())
    assert watched.times == [0, 5, 35]
    assert not watched.is_refused
    assert not watched.node.suspected.is_set()


def test_passing_fault_is_a_warning() -> None:
    with capture_logs() as lines:
        beats(20, lambda n: REFUSED if n == 1 else Hints())
    assert [line["log_level"] for line in lines if line["event"] == "identity confirmed after a refusal"] == ["warning"]


def test_401_to_another_call_cuts_the_wait_short() -> None:
    async def main() -> Beats:
        watched = Beats()
        await watched.run(50, (7.0, watched.suspect), (8.0, watched.suspect), (9.0, watched.suspect))
        return watched

    watched = run_virtual(main())
    assert watched.times == [0, 12, 42]
    assert not watched.is_refused


def test_401_to_an_older_credential_means_nothing() -> None:
    async def main() -> Beats:
        watched = Beats()
        older = make_node(identity=replace(watched.node.identity, node_key=type(watched.node.credential())("older")))
        await watched.run(50, (7.0, lambda: watched.node.suspect(older.credential())))
        return watched

    assert run_virtual(main()).times == [0, 30]


@pytest.mark.parametrize("uniform", [lowest, middle, highest])
def test_confirmation_waits_5_seconds_spread_by_a_quarter(uniform: Callable[[float, float], float]) -> None:
    watched = beats(20, lambda n: REFUSED if n == 1 else Hints(), uniform=uniform)
    assert watched.times[1] == pytest.approx(uniform(3.75, 6.25))


def test_confirmed_refusal_is_probed_after_1_2_4_and_then_every_5_minutes() -> None:
    watched = beats(3000, lambda _: REFUSED)
    assert watched.is_refused
    assert not watched.node.accepted.is_set()
    assert gaps(watched.times)[:7] == [5, 60, 120, 240, 300, 300, 300]


def test_refusal_is_one_error_line() -> None:
    with capture_logs() as lines:
        beats(3000, lambda _: REFUSED)
    assert sum(line["event"] == "identity refused" for line in lines) == 1


def test_accepted_probe_ends_the_refusal() -> None:
    watched = beats(500, lambda n: REFUSED if n <= 4 else Hints())
    assert not watched.is_refused
    assert watched.node.accepted.is_set()
    assert watched.times == [0, 5, 65, 185, 425, 455, 485]


def test_next_refusal_is_probed_from_the_beginning() -> None:
    watched = beats(2000, lambda n: REFUSED if n <= 5 or n >= 8 else Hints())
    assert gaps(watched.times)[:11] == [5, 60, 120, 240, 300, 30, 30, 5, 60, 120, 240]


def test_refused_identity_that_cannot_be_reached_is_probed_at_the_same_pace() -> None:
    watched = beats(400, lambda n: REFUSED if n <= 2 else GONE)
    assert gaps(watched.times) == [5, 60, 120, 120]
    assert watched.is_refused


def test_suspicion_that_nobody_can_confirm_keeps_the_ordinary_pace() -> None:
    """A 401, and then a control plane that is gone: no heartbeat every five seconds."""
    watched = beats(200, lambda n: REFUSED if n == 1 else GONE)
    assert gaps(watched.times) == [5, 30, 30, 30, 30, 30, 30]
    assert not watched.is_refused


def test_retry_after_holds_while_a_suspicion_is_confirmed() -> None:
    limited = RateLimited("503", status=503, retry_after=120.0)
    watched = beats(200, lambda n: {1: REFUSED, 2: limited}.get(n, Hints()), uniform=lowest)
    assert watched.times[2] - watched.times[1] >= 120


def test_three_404s_in_a_row_count_as_a_401() -> None:
    watched = beats(300, lambda _: UNKNOWN)
    assert watched.is_refused
    assert gaps(watched.times)[:5] == [30, 30, 5, 60, 120]


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
def test_capabilities_are_told_once(errors: list[Exception], times: list[float]) -> None:
    async def main() -> Told:
        told = Told(list(errors))
        task = asyncio.create_task(Capabilities(told, make_node()).run())
        await asyncio.sleep(1000)
        assert not task.done()
        task.cancel()
        return told

    assert run_virtual(main()).times == times


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
    assert watched.node.contact.last_heartbeat_ok is ok
    assert watched.node.contact.last_heartbeat_at is not None


def test_contact_knows_that_heartbeats_are_taken_again() -> None:
    assert beats(100, lambda n: GONE if n == 1 else Hints()).node.contact.last_heartbeat_ok is True
