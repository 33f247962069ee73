"""Services are started again for ever, less and less often; a fatal error ends them all. All in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from structlog.testing import capture_logs

from plexd.errors import ConfigError, FatalError, LocalStateError
from plexd.runtime.supervisor import Groups, Supervisor
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Hundreds of tracebacks on a terminal take longer than everything else here."""
    with capture_logs():
        yield


class Scripted:
    """A service that does what it is told and notes when it was started."""

    def __init__(self, script: Callable[[], Awaitable[None]], name: str = "scripted") -> None:
        self.name = name
        self.starts: list[float] = []
        self.cancelled = False
        self._script = script

    async def run(self) -> None:
        self.starts.append(asyncio.get_running_loop().time())
        try:
            await self._script()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    @property
    def pauses(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.starts, self.starts[1:], strict=False)]


async def fail() -> None:
    raise RuntimeError("broken")


async def end() -> None:
    pass


async def live() -> None:
    await asyncio.Event().wait()


async def fail_fatally() -> None:
    await asyncio.sleep(10)
    raise ConfigError("key x is wrong")


async def cancel_something_awaited() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


def supervise(seconds: float, *services: Scripted) -> list[tuple[float, frozenset[str]]]:
    """Run the services for a while and cancel; what `on_flapping` was told, and when."""
    told: list[tuple[float, frozenset[str]]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        supervisor = Supervisor(lambda names: told.append((loop.time(), names)))
        async with asyncio.timeout(seconds):
            await supervisor.run(services)

    with pytest.raises(TimeoutError):
        run_virtual(main())
    return told


@pytest.mark.parametrize("script", [fail, end, cancel_something_awaited])
def test_service_that_stops_is_started_again_less_and_less_often(script: Callable[[], Awaitable[None]]) -> None:
    service = Scripted(script)
    supervise(600, service)
    expected = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert len(service.pauses) >= len(expected)
    for pause, middle in zip(service.pauses, expected, strict=False):
        assert 0.75 * middle <= pause <= 1.25 * middle


def test_pauses_are_spread() -> None:
    services = [Scripted(fail, f"s{n}") for n in range(10)]
    supervise(3, *services)
    assert len({service.pauses[0] for service in services}) == 10


def test_failure_is_logged_with_its_traceback_and_an_end_as_unexpected() -> None:
    with capture_logs() as records:
        supervise(0.5, Scripted(fail, "broken"), Scripted(end, "short"))
    errors = {record["service"]: record for record in records if record["log_level"] == "error"}
    assert (errors["broken"]["event"], errors["broken"]["exc_info"]) == ("service failed", True)
    assert errors["short"]["event"] == "service ended unexpectedly"


def test_failing_service_does_not_disturb_the_others() -> None:
    steady = Scripted(live, "steady")
    supervise(1000, Scripted(fail, "broken"), steady)
    assert steady.starts == [0.0]


def test_service_that_ran_five_minutes_starts_again_as_quickly_as_at_first() -> None:
    attempts: Iterator[Callable[[], Awaitable[None]]] = iter([fail, fail, fail, fail, lambda: asyncio.sleep(301)])

    async def script() -> None:
        await next(attempts, live)()

    service = Scripted(script)
    supervise(1000, service)
    assert 4 * 0.75 <= service.pauses[2] <= 4 * 1.25
    assert 301.75 <= service.pauses[4] <= 302.25


async def test_cancellation_reaches_every_service_and_the_caller() -> None:
    services = [Scripted(live, "a"), Scripted(live, "b")]
    task = asyncio.create_task(Supervisor(lambda names: None).run(services))
    await asyncio.sleep(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [service.cancelled for service in services] == [True, True]


def test_cancellation_ends_a_service_that_waits_for_its_restart() -> None:
    service = Scripted(fail)
    supervise(0.5, service)
    assert service.starts == [0.0]


@pytest.mark.virtual_time
async def test_fatal_error_ends_all_and_reaches_the_caller_as_itself() -> None:
    steady = Scripted(live, "steady")
    with pytest.raises(ConfigError, match="key x is wrong") as caught:
        await Supervisor(lambda names: None).run([Scripted(fail_fatally, "config"), steady, Scripted(fail, "broken")])
    assert caught.value.exit_code == 5
    assert caught.value.__cause__ is None
    assert steady.cancelled


@pytest.mark.virtual_time
async def test_first_of_several_fatal_errors_is_the_one_that_is_told() -> None:
    async def worse_while_stopping() -> None:
        try:
            await live()
        finally:
            raise LocalStateError("a consequence")

    with pytest.raises(FatalError, match="key x is wrong"):
        await Supervisor(lambda names: None).run([Scripted(worse_while_stopping, "a"), Scripted(fail_fatally, "b")])


# flapping


def test_more_than_ten_failures_in_ten_minutes_are_reported_once() -> None:
    service = Scripted(fail, "broken")
    told = supervise(3600, service)
    assert [names for _, names in told] == [{"broken"}]
    assert told[0][0] == service.starts[10]


def test_ten_failures_in_ten_minutes_are_not_reported() -> None:
    failures = iter([fail] * 10)

    async def script() -> None:
        await next(failures, live)()

    assert supervise(3600, Scripted(script)) == []


def test_rare_failures_are_not_reported() -> None:
    """One a minute or less: never more than ten within ten minutes."""

    async def script() -> None:
        await asyncio.sleep(62)
        await fail()

    assert supervise(7200, Scripted(script)) == []


def test_flapping_is_over_after_five_steady_minutes() -> None:
    failures = iter([fail] * 11)

    async def script() -> None:
        await next(failures, live)()

    service = Scripted(script, "broken")
    (_, raised), (at, cleared) = supervise(3600, service)
    assert raised == {"broken"}
    assert not cleared
    assert at == pytest.approx(service.starts[-1] + 300)


def test_each_flapping_service_is_named() -> None:
    told = supervise(1200, Scripted(fail, "a"), Scripted(fail, "b"), Scripted(live, "c"))
    assert told[-1][1] == {"a", "b"}


# pausing


def pause(service: Scripted, *, at: float, seconds: float, until: float = 100.0) -> list[bool]:
    """Pause once; whether the service was running before, inside and after it."""
    running: list[bool] = []
    inside = 0

    async def counted() -> None:
        nonlocal inside
        inside += 1
        try:
            await script()
        finally:
            inside -= 1

    script, service._script = service._script, counted

    async def main() -> None:
        supervisor = Supervisor(lambda names: None)
        task = asyncio.create_task(supervisor.run([service]))
        await asyncio.sleep(at)
        running.append(bool(inside))
        async with supervisor.paused():
            running.append(bool(inside))
            await asyncio.sleep(seconds)
            running.append(bool(inside))
        await asyncio.sleep(0.001)
        running.append(bool(inside))
        await asyncio.sleep(until - at - seconds)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    run_virtual(main())
    return running


def test_paused_service_has_ended_and_starts_anew_afterwards() -> None:
    service = Scripted(live)
    assert pause(service, at=10, seconds=20) == [True, False, False, True]
    assert service.starts == [0, 30]


def test_pause_is_no_failure() -> None:
    with capture_logs() as records:
        pause(Scripted(live), at=10, seconds=20)
    assert records == []


def test_pause_waits_for_a_service_that_has_something_to_finish() -> None:
    async def finish_first() -> None:
        try:
            await live()
        finally:
            await asyncio.sleep(5)

    service = Scripted(finish_first)
    assert pause(service, at=10, seconds=20) == [True, False, False, True]
    assert service.starts == [0, 35]


def test_pause_names_the_service_that_keeps_it_waiting() -> None:
    async def linger() -> None:
        try:
            await live()
        finally:
            await asyncio.sleep(50)

    with capture_logs() as records:
        assert pause(Scripted(linger, "lingering"), at=10, seconds=20) == [True, False, False, True]
    assert [(r["event"], r["services"]) for r in records] == [("services do not end", ["lingering"])]


def test_failed_service_is_not_started_again_during_a_pause() -> None:
    """Its delay is over before the pause is."""
    failures = iter([fail])

    async def script() -> None:
        await next(failures, live)()

    service = Scripted(script)
    assert pause(service, at=0.5, seconds=20) == [False, False, False, True]
    assert service.starts == [0, 20.5]


async def test_stop_during_a_pause_is_a_stop() -> None:
    service = Scripted(live)
    supervisor = Supervisor(lambda names: None)
    task = asyncio.create_task(supervisor.run([service]))
    await asyncio.sleep(1)
    async with supervisor.paused():
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
    assert service.starts == [0]


async def test_groups_tell_of_all_that_keep_failing_and_forget_those_of_a_group_that_begins_anew() -> None:
    told: list[frozenset[str]] = []
    groups = Groups(told.append)
    first = groups.start("first", [Scripted(fail, "a")])
    second = groups.start("second", [Scripted(fail, "b")])
    await asyncio.sleep(700)
    first.cancel()
    await asyncio.wait({first})
    third = groups.start("first", [Scripted(live, "c")])
    await asyncio.sleep(1)
    for task in (second, third):
        task.cancel()
    await asyncio.wait({second, third})
    assert told[-2:] == [{"a", "b"}, {"b"}]
