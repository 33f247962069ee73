"""The event stream over hours, in virtual time: when it is opened again, what is replayed, what is believed."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from plexd.errors import ControlError, Forbidden, NotFound, RateLimited, Transient, Unauthenticated
from plexd.events.listener import OFF_LOOP_CHARACTERS, Listener
from plexd.mesh.desired import SigningKeys
from plexd.mesh.events import SigningKeysRotated
from plexd.node.health import Condition, Health
from plexd.node.state import Node
from plexd.wire.envelope import Envelope, Verdict, Verifier
from tests.node_harness import (
    FOREVER,
    NEW_KEY,
    OLD_KEY,
    STRANGER,
    Asked,
    Step,
    Streams,
    envelope,
    highest,
    lowest,
    make_node,
    middle,
    public,
    send,
    sse,
    unix_time,
)
from tests.virtual_time import run_virtual

Script = Callable[[int], Sequence[Step] | ControlError]
Uniform = Callable[[float, float], float]


@dataclass
class Watched:
    """A listener at work; `handled` are the event ids in the order of their handling."""

    script: Script
    uniform: Uniform = middle
    poll_interval: float = 60.0
    handler: Callable[[Envelope], Awaitable[None]] | None = None
    pulls: Asked = field(default_factory=Asked)
    handled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = Streams(self.script)
        self.health = Health()
        self.node: Node = make_node(health=self.health)
        self.listener = Listener(
            self.streams,
            self.node,
            Verifier(),
            self._handle,
            self.pulls,
            self.health,
            self.poll_interval,
            unix_time,
            self.uniform,
        )

    async def _handle(self, event: Envelope) -> None:
        self.handled.append(event.event_id)
        if self.handler is not None:
            await self.handler(event)

    async def run(self, seconds: float, meanwhile: Awaitable[None] | None = None) -> None:
        task = asyncio.create_task(self.listener.run())
        if meanwhile is not None:
            await meanwhile
        await asyncio.sleep(seconds)
        assert not task.done(), task
        task.cancel()
        await asyncio.wait({task})

    @property
    def stream_is_down(self) -> bool:
        return any(finding.condition is Condition.STREAM_DOWN for finding in self.health.findings())

    def delays(self) -> list[float]:
        """Between attempts, less the moment a connection takes."""
        times = self.streams.times
        return [round(later - earlier - 0.001, 3) for earlier, later in itertools.pairwise(times)]


def watch(script: Script, seconds: float, **options: object) -> Watched:
    async def main() -> Watched:
        watched = Watched(script, **options)  # type: ignore[arg-type]
        await watched.run(seconds)
        return watched

    return run_virtual(main())


def always(*steps: Step) -> Script:
    return lambda _: steps


def refusing(error: ControlError) -> Script:
    return lambda _: error


GONE = Transient("events: connection to the control plane failed")


# --- Last-Event-ID


@pytest.mark.virtual_time
async def test_every_connection_but_the_first_is_told_as_a_reconnection() -> None:
    watched = Watched(lambda n: [1.0] if n < 3 else [FOREVER])
    told: list[float] = []
    watched.listener.on_reconnected.append(lambda: told.append(asyncio.get_running_loop().time()))
    await watched.run(100)
    assert [round(at - 0.001, 3) for at in told] == [round(at, 3) for at in watched.streams.times[1:]]


@pytest.mark.virtual_time
async def test_every_connection_wakes_what_waits_to_be_delivered() -> None:
    """Also the first: after a start without a control plane, reports wait for up to five minutes."""
    watched = Watched(lambda n: GONE if n in {1, 2, 4} else [1.0] if n == 3 else [FOREVER])
    told: list[float] = []
    watched.listener.on_connected.append(lambda: told.append(asyncio.get_running_loop().time()))
    await watched.run(100)
    attempts = watched.streams.times
    assert [round(at - 0.001, 3) for at in told] == [round(attempts[n], 3) for n in (2, 4)]


def test_first_connection_after_a_start_asks_for_no_replay() -> None:
    watched = watch(always(send("policy_updated", sse_id="1"), FOREVER), 5)
    assert watched.streams.replay_from == [None]


def test_reconnection_names_the_last_event_that_was_handled() -> None:
    watched = watch(
        lambda n: [send("policy_updated", sse_id="7"), send("policy_updated", sse_id="8")] if n == 1 else [FOREVER], 10
    )
    assert len(watched.handled) == 2
    assert watched.streams.replay_from == [None, "8"]


NOT_MOVING = {
    "malformed": lambda: sse("{}", "9"),
    "not UTF-8": lambda: b"id: 9\ndata: \xff\n\n",
    "oversized": lambda: b"id: 9\ndata: " + b"x" * ((4 << 20) + 1) + b"\n\n",
    "unsigned": lambda: sse(envelope("policy_updated").replace('"signature":"', '"signature":"","was":"'), "9"),
    "signed by a stranger": lambda: sse(envelope("policy_updated", key=STRANGER), "9"),
    "stale": lambda: sse(envelope("policy_updated", issued=unix_time() - 301), "9"),
    "an event without id": lambda: b"data: " + envelope("policy_updated").encode() + b"\n\n",
    "a comment": lambda: b": id: 9\n\n",
}


@pytest.mark.parametrize("step", NOT_MOVING.values(), ids=NOT_MOVING)
def test_what_was_not_verified_does_not_move_last_event_id(step: Callable[[], bytes]) -> None:
    watched = watch(lambda n: [send("policy_updated", sse_id="8"), step] if n == 1 else [FOREVER], 10)
    assert watched.streams.replay_from == [None, "8"]


def test_good_events_around_bad_ones_are_handled_in_order() -> None:
    steps: list[Step] = []
    for number, bad in enumerate(NOT_MOVING.values()):
        steps += [send("policy_updated", event_id=f"good-{number}", sse_id=str(number)), bad]
    steps.append(send("policy_updated", event_id="last", sse_id="last"))
    watched = watch(lambda n: steps if n == 1 else [FOREVER], 10)
    good = [event_id for event_id in watched.handled if not event_id.startswith("ev-")]
    assert good == [*(f"good-{n}" for n in range(len(NOT_MOVING))), "last"]
    assert watched.streams.replay_from == [None, "last"]


def test_duplicate_moves_last_event_id_and_is_not_handled_again() -> None:
    again = send("policy_updated", event_id="e", nonce="same", sse_id="9")
    watched = watch(
        lambda n: [send("policy_updated", event_id="e", nonce="same", sse_id="8"), again] if n == 1 else [FOREVER], 10
    )
    assert watched.handled == ["e"]
    assert watched.streams.replay_from == [None, "9"]


def test_replay_after_a_reconnection_is_recognised() -> None:
    replayed = send("policy_updated", event_id="e", nonce="same", sse_id="8")
    watched = watch(lambda n: [replayed, 31.0] if n <= 3 else [FOREVER], 200)
    assert watched.handled == ["e"]


def test_failed_handler_moves_last_event_id_and_asks_for_a_pull() -> None:
    async def fail(_: Envelope) -> None:
        raise KeyError("bug")

    watched = watch(
        lambda n: [send("peer_removed", {"id": "x"}, sse_id=str(n))] if n == 1 else [FOREVER], 10, handler=fail
    )
    assert watched.streams.replay_from == [None, "1"]
    assert "failed handler" in watched.pulls.reasons


def test_event_still_waiting_is_asked_for_again() -> None:
    """The stream ends while the first of two events is being handled: neither counts as handled yet."""

    async def slow(event: Envelope) -> None:
        if event.event_id == "slow":
            await asyncio.sleep(20)

    steps = [send("policy_updated", event_id="slow", sse_id="1"), send("policy_updated", event_id="next", sse_id="2")]
    watched = watch(lambda n: steps if n == 1 else [FOREVER], 60, handler=slow)
    assert watched.streams.replay_from == [None, None]
    assert watched.handled == ["slow", "next"]


def test_empty_id_takes_the_last_event_id_back() -> None:
    steps = [send("policy_updated", sse_id="8"), send("policy_updated", sse_id="")]
    watched = watch(lambda n: steps if n == 1 else [FOREVER], 10)
    assert watched.streams.replay_from == [None, None]


# --- reopening


def reopen(script: Script, *at: float, seconds: float = 60.0, **options: object) -> Watched:
    async def main() -> Watched:
        watched = Watched(script, **options)  # type: ignore[arg-type]
        for moment in at:
            asyncio.get_running_loop().call_later(moment, watched.listener.reopen, "resumed after 600 s")
        await watched.run(seconds)
        return watched

    return run_virtual(main())


def test_reopened_stream_is_there_again_at_once_and_goes_on_behind_the_last_event_that_was_handled() -> None:
    watched = reopen(lambda n: [send("policy_updated", sse_id=str(n)), FOREVER], 10, 20)
    assert watched.streams.attempts == [(0, None), (10, "1"), (20, "2")]
    assert watched.streams.open == 0


@pytest.mark.virtual_time
async def test_attempt_that_waits_for_an_answer_is_made_anew() -> None:
    """Its connection leads nowhere as well."""

    class Silent(Streams):
        @asynccontextmanager
        async def events(self, last_event_id: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
            async with super().events(last_event_id) as chunks:
                if len(self.attempts) == 1:
                    await asyncio.sleep(30)
                yield chunks

    watched = Watched(always(FOREVER))
    streams = watched.listener._control = Silent(always(FOREVER))
    asyncio.get_running_loop().call_later(5, watched.listener.reopen, "resumed after 600 s")
    await watched.run(60)
    assert streams.times == [0, 5]


def test_reopening_is_no_failure() -> None:
    """However often: the delay after a loss is that after the first, and nothing is polled."""

    def script(n: int) -> Sequence[Step] | ControlError:
        return [FOREVER] if n < 30 else GONE

    watched = reopen(script, *range(10, 300, 10), seconds=299, uniform=highest)
    assert watched.delays()[:30] == [*[pytest.approx(10, abs=0.01)] * 29, 2]
    assert watched.pulls.times("polling") == []


@pytest.mark.virtual_time
async def test_reopening_waits_for_no_poll() -> None:
    def script(n: int) -> Sequence[Step] | ControlError:
        return GONE if asyncio.get_running_loop().time() < 600 else [FOREVER]

    watched = Watched(script)
    loop = asyncio.get_running_loop()
    reopened: list[float] = []

    async def soon_after_the_connection() -> None:
        await watched.listener.connected.wait()
        await asyncio.sleep(1)
        reopened.append(loop.time())
        watched.listener.reopen("resumed after 600 s")

    await watched.run(20, soon_after_the_connection())
    assert watched.streams.times[-1] == reopened[0]
    assert not watched.stream_is_down


def test_attempt_that_is_not_due_yet_is_not_made_for_a_reopening() -> None:
    watched = reopen(lambda n: RateLimited("429", status=429, retry_after=40.0) if n == 1 else [FOREVER], 10)
    assert watched.delays()[0] >= 40


# --- silence


def test_silence_of_90_seconds_ends_the_connection() -> None:
    watched = watch(always(FOREVER), 100, uniform=lowest)
    assert watched.streams.times[1] == pytest.approx(90 + 0.001 + 0.05)


def test_comments_keep_a_silent_stream_alive_for_hours() -> None:
    keepalives: list[Step] = [60.0, b": keepalive\n\n"] * 500
    watched = watch(always(*keepalives), 4 * 3600)
    assert len(watched.streams.attempts) == 1
    assert not watched.stream_is_down


# --- reconnection


def test_delays_lie_under_a_bound_that_doubles_up_to_a_minute() -> None:
    bounds: list[tuple[float, float]] = []

    def note(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    watched = watch(refusing(GONE), 280, uniform=note)
    assert bounds[:8] == [(0.0, high) for high in (2, 4, 8, 16, 32, 60, 60, 60)]
    assert watched.delays()[:7] == [2, 4, 8, 16, 32, 60, 60]


def test_delay_is_never_shorter_than_50_milliseconds() -> None:
    watched = watch(refusing(GONE), 2, uniform=lowest)
    assert set(watched.delays()) == {0.05}


def test_server_sets_the_base_of_the_delay() -> None:
    watched = watch(lambda n: [b"retry: 5000\n\n"] if n == 1 else GONE, 100, uniform=highest)
    assert watched.delays()[:3] == [10, 20, 40]


@pytest.mark.parametrize(("text", "first"), [("1", 0.2), ("999999", 60), ("7x", 2), ("-5", 2)])
def test_retry_is_clamped_and_must_be_digits(text: str, first: float) -> None:
    watched = watch(lambda n: [f"retry: {text}\n\n".encode()] if n == 1 else GONE, 100, uniform=highest)
    assert watched.delays()[0] == pytest.approx(first)


def test_server_that_closes_at_once_makes_no_storm() -> None:
    """However chance falls: in an hour no more attempts than full jitter and polling allow."""
    counts = []
    for seed in range(20):
        watched = watch(always(), 3600, uniform=random.Random(seed).uniform)
        counts.append(len(watched.streams.attempts))
        times = watched.streams.times
        assert sum(at < 10 for at in times) <= 10
        assert all(later - earlier >= 60 for earlier, later in itertools.pairwise(times) if earlier > 360)
    assert max(counts) < 90


def test_stream_that_lived_for_half_a_minute_starts_the_delays_again() -> None:
    def script(n: int) -> Sequence[Step] | ControlError:
        return GONE if n <= 4 else [31.0]

    watched = watch(script, 120, uniform=highest)
    assert watched.delays()[:4] == [2, 4, 8, 16]
    assert watched.delays()[4:6] == [pytest.approx(33, abs=0.01), pytest.approx(33, abs=0.01)]


def test_one_verified_event_makes_a_connection_healthy() -> None:
    watched = watch(lambda n: GONE if n <= 4 else [send("policy_updated")], 60, uniform=highest)
    assert watched.delays()[4:7] == [2, 2, 2]


def test_forged_events_do_not_make_a_connection_healthy() -> None:
    watched = watch(always(send("policy_updated", key=STRANGER)), 60, uniform=highest)
    assert watched.delays()[:4] == [2, 4, 8, 16]


def test_every_connection_asks_for_a_pull() -> None:
    watched = watch(always(31.0), 200)
    assert len(watched.pulls.times("stream connected")) == len(watched.streams.attempts) > 3


# --- what the control plane answers instead


@pytest.mark.parametrize("seconds", [1.0, 45.0, 299.0])
def test_retry_after_is_waited_for(seconds: float) -> None:
    watched = watch(lambda n: RateLimited("429", status=429, retry_after=seconds) if n == 1 else [FOREVER], 400)
    assert watched.delays()[0] >= seconds


def test_reconnections_that_were_asked_to_wait_are_spread() -> None:
    limited = RateLimited("429", status=429, retry_after=200.0)
    watched = watch(lambda n: limited if n == 1 else [FOREVER], 400, uniform=highest)
    assert watched.delays()[0] == pytest.approx(250, abs=0.1)


def test_long_retry_after_is_polling_time_all_the_same() -> None:
    watched = watch(refusing(Transient("503", status=503, retry_after=3600.0)), 3500)
    assert len(watched.streams.attempts) == 1
    assert watched.stream_is_down
    assert watched.pulls.times("polling") == pytest.approx(list(range(300, 3500, 60)), abs=1)


@pytest.mark.parametrize("error", [Forbidden("403", status=403), NotFound("404", status=404)])
def test_forbidden_stream_is_polled_at_once_and_tried_every_five_minutes(error: ControlError) -> None:
    watched = watch(refusing(error), 1000)
    assert watched.streams.times == pytest.approx([0, 300, 600, 900], abs=1)
    assert watched.stream_is_down
    assert watched.pulls.times("polling")[:5] == pytest.approx([0, 60, 120, 180, 240], abs=1)


def test_forbidden_stream_is_said_once_at_error() -> None:
    with capture_logs() as lines:
        watch(refusing(Forbidden("403", status=403)), 2000)
    assert [line["event"] for line in lines if line["log_level"] == "error"].count("stream refused") == 1


def test_forbidden_stream_comes_back_when_it_is_allowed() -> None:
    watched = watch(lambda n: Forbidden("403") if n == 1 else [b": hello\n\n", 40.0, b": x\n\n", FOREVER], 380)
    assert watched.streams.times == pytest.approx([0, 300], abs=1)
    assert not watched.stream_is_down


@pytest.mark.virtual_time
async def test_401_waits_a_minute_while_the_heartbeat_finds_out() -> None:
    watched = Watched(refusing(Unauthenticated("401", status=401)))
    await watched.run(150)
    assert watched.streams.times == pytest.approx([0, 60, 120], abs=1)


@pytest.mark.virtual_time
async def test_refused_identity_closes_the_stream_and_an_accepted_one_opens_it_at_once() -> None:
    watched = Watched(lambda _: [FOREVER])

    async def refuse_and_accept() -> None:
        await asyncio.sleep(5)
        watched.node.refuse()
        await asyncio.sleep(5)
        assert not watched.listener.connected.is_set()
        watched.node.accept(watched.node.credential())

    await watched.run(20, refuse_and_accept())
    assert watched.streams.times == pytest.approx([0, 10], abs=0.1)


# --- another identity


@pytest.mark.virtual_time
async def test_stream_of_the_new_node_begins_where_it_begins() -> None:
    """No place in the old stream, no nonce of it, and nothing that was waiting to be handled."""

    async def slow(event: Envelope) -> None:
        if event.event_id == "slow":
            await asyncio.Event().wait()

    def script(n: int) -> Sequence[Step]:
        first = send("policy_updated", event_id="first", nonce="same", sse_id="8")
        rest = [send("policy_updated", event_id="slow"), send("policy_updated", event_id="waiting")]
        return [first, *rest, FOREVER] if n == 1 else [first, FOREVER]

    watched = Watched(script, handler=slow)
    await watched.run(10)
    watched.node.renew(watched.node.identity, watched.node.desired, 0.0)
    await watched.run(10)
    assert watched.streams.replay_from == [None, None]
    assert watched.handled == ["first", "slow", "first"]


@pytest.mark.virtual_time
async def test_stream_that_only_failed_goes_on_where_it_was() -> None:
    watched = Watched(lambda n: [send("policy_updated", nonce="same", sse_id="8"), FOREVER])
    await watched.run(10)
    await watched.run(10)
    assert watched.streams.replay_from == [None, "8"]
    assert len(watched.handled) == 1


@pytest.mark.virtual_time
async def test_event_under_way_when_the_listener_is_stopped_is_handled_when_it_is_started_again() -> None:
    async def slow(event: Envelope) -> None:
        if event.event_id == "slow" and len(watched.handled) == 2:
            await asyncio.Event().wait()

    first, under_way, waiting = (
        send("policy_updated", event_id=name, nonce=name, sse_id=name) for name in ("first", "slow", "waiting")
    )
    watched = Watched(lambda n: [first, under_way, waiting, FOREVER] if n == 1 else [FOREVER], handler=slow)
    await watched.run(10)
    await watched.run(10)
    assert watched.streams.replay_from == [None, "waiting"]
    assert watched.handled == ["first", "slow", "slow", "waiting"]
    assert watched.pulls.reasons == ["stream connected", "interrupted event", "stream connected"]


# --- what status tells


@pytest.mark.virtual_time
async def test_contact_follows_the_stream() -> None:
    def script(_: int) -> Sequence[Step] | ControlError:
        now = asyncio.get_running_loop().time()
        if now < 10:
            return [send("policy_updated"), 60.0]
        return GONE if now < 600 else [b": hello\n\n", FOREVER]

    watched = Watched(script)
    contact = watched.node.connection
    seen: list[tuple[str, int, bool]] = []

    async def look() -> None:
        for wait in (0, 5, 100, 300, 265):
            await asyncio.sleep(wait)
            seen.append((contact.stream.value, contact.reconnects, contact.last_event_at is not None))

    await watched.run(0, look())
    seen.append((contact.stream.value, contact.reconnects, contact.last_event_at is not None))
    assert seen == [
        ("connecting", 0, False),
        ("connected", 0, True),
        ("connecting", 0, True),
        ("polling", 0, True),
        ("connected", 1, True),
        ("stopped", 1, True),
    ]


def test_forged_event_is_no_news() -> None:
    watched = watch(always(send("policy_updated", key=STRANGER), FOREVER), 5)
    assert watched.node.connection.last_event_at is None


# --- polling


def test_five_failing_minutes_start_polling_at_the_poll_interval() -> None:
    watched = watch(refusing(GONE), 1200, uniform=highest, poll_interval=45.0)
    polls = watched.pulls.times("polling")
    assert polls[0] == pytest.approx(300, abs=1)
    late = [at for at in watched.streams.times if at > 370]
    assert all(
        44.9 <= later - earlier <= 60.1 for earlier, later in itertools.pairwise(late)
    )  # the delay itself may be up to a minute
    assert watched.stream_is_down


def test_two_minutes_without_a_control_plane_are_not_yet_polling() -> None:
    """Gone for two minutes and back: one connection within a minute of its return, and a pull with it."""

    def script(n: int) -> Sequence[Step] | ControlError:
        now = asyncio.get_running_loop().time()
        if n == 1:
            return [send("policy_updated", sse_id="5"), 10.0, Transient("reset")]
        return GONE if now < 130 else [b": hello\n\n", FOREVER]

    for seed in range(10):
        watched = watch(script, 200, uniform=random.Random(seed).uniform)
        last, replay_from = watched.streams.attempts[-1]
        assert 130 <= last <= 190
        assert replay_from == "5"
        assert len(watched.streams.attempts) < 40
        assert watched.pulls.reasons == ["stream connected", "stream connected"]
        assert not watched.stream_is_down


def test_polling_ends_when_a_connection_proves_itself() -> None:
    def script(_: int) -> Sequence[Step] | ControlError:
        return GONE if asyncio.get_running_loop().time() < 600 else [b": hello\n\n", 80.0, b": x\n\n", FOREVER]

    with capture_logs() as lines:
        watched = watch(script, 760)
    assert not watched.stream_is_down
    connected = watched.streams.times[-1]
    assert [at for at in watched.pulls.times("polling") if at > connected] == []
    told = [line["event"] for line in lines if line["log_level"] == "info" and "polled" in line["event"]]
    assert told == ["stream is down, state is polled"]
    assert sum(line["event"] == "stream is back" for line in lines) == 1


def test_connection_that_ends_before_it_is_healthy_does_not_end_polling() -> None:
    def script(_: int) -> Sequence[Step] | ControlError:
        return GONE if asyncio.get_running_loop().time() < 600 else [5.0]

    watched = watch(script, 1200)
    polls = [at for at in watched.pulls.times("polling") if at > 600]
    assert len(polls) >= 8
    assert watched.stream_is_down


# --- handlers


def test_handler_that_hangs_is_given_up_after_half_a_minute() -> None:
    async def hang(event: Envelope) -> None:
        if event.event_id == "hangs":
            await asyncio.Event().wait()

    steps: list[Step] = [send("policy_updated", event_id="hangs"), send("policy_updated", event_id="next")]
    watched = watch(always(*steps, 80.0, b": x\n\n", 80.0), 60, handler=hang)
    assert watched.handled == ["hangs", "next"]
    assert watched.pulls.times("failed handler") == pytest.approx([30], abs=1)
    assert len(watched.streams.attempts) == 1


def test_handler_that_raises_is_logged_with_a_traceback_and_the_stream_lives_on() -> None:
    async def fail(event: Envelope) -> None:
        if event.event_id == "fails":
            raise ZeroDivisionError

    steps: list[Step] = [send("policy_updated", event_id="fails"), send("policy_updated", event_id="next"), FOREVER]
    with capture_logs() as lines:
        watched = watch(always(*steps), 10, handler=fail)
    assert watched.handled == ["fails", "next"]
    assert len(watched.streams.attempts) == 1
    failed = [line for line in lines if line["event"] == "event handler failed"]
    assert [(line["event_id"], line["log_level"], bool(line["exc_info"])) for line in failed] == [
        ("fails", "error", True)
    ]


def test_reader_stops_reading_at_1024_waiting_events_and_does_not_call_that_silence() -> None:
    read = 0

    async def slow(_: Envelope) -> None:
        await asyncio.sleep(29)

    def one() -> bytes:
        nonlocal read
        read += 1
        return sse(envelope("policy_updated"), str(read))

    watched = watch(always(*[one] * 3000), 290, handler=slow)
    assert len(watched.handled) == 10
    assert read == 1024 + 10 + 1  # waiting, handled, and the one the reader holds
    assert len(watched.streams.attempts) == 1


def test_reader_stops_reading_at_16_mebibytes() -> None:
    read = 0

    async def slow(_: Envelope) -> None:
        await asyncio.sleep(29)

    def one() -> bytes:
        nonlocal read
        read += 1
        return sse(envelope("policy_updated", "x" * (1 << 20)), str(read))

    watched = watch(always(*[one] * 40), 20, handler=slow)
    assert len(watched.handled) == 1
    assert read == 15 + 1 + 1


def test_waiting_events_are_all_handled_once_the_handler_is_free() -> None:
    steps: list[Step] = [send("policy_updated", event_id=f"e{n}", sse_id=str(n)) for n in range(1500)]
    watched = watch(always(*steps, FOREVER), 60)
    assert watched.handled == [f"e{n}" for n in range(1500)]


@pytest.mark.virtual_time
async def test_event_that_found_no_room_before_the_stream_was_closed_is_handled_when_it_comes_again() -> None:
    """The queue is full behind a slow handler; the reader holds one more, verified, as new keys close the stream."""
    free = asyncio.Event()

    async def slow(event: Envelope) -> None:
        if event.event_id == "e0":
            await free.wait()

    sent: list[bytes] = []

    def script(n: int) -> Sequence[Step]:
        if n == 1:
            sent.extend(sse(envelope("policy_updated", event_id=f"e{i}"), str(i)) for i in range(1026))
            refused = sse(envelope("policy_updated", key=NEW_KEY, event_id="refused"), "refused")
            return [sent[0] + refused + b"".join(sent[1:]), FOREVER]
        return [b"".join(sent), FOREVER]

    watched = Watched(script, handler=slow)

    async def rotate() -> None:
        await asyncio.sleep(1)
        rotate_to_new_key(watched.node)
        await asyncio.sleep(1)
        free.set()

    await watched.run(10, rotate())
    assert len(watched.streams.attempts) == 2
    assert watched.handled == [f"e{n}" for n in range(1026)]


async def test_event_being_verified_when_the_stream_is_closed_is_handled_when_it_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large one is verified in a thread, which does not end with the stream."""
    entered, free, first_over = threading.Event(), threading.Event(), threading.Event()
    verify = Verifier.verify

    def verify_slowly(verifier: Verifier, data: str, *, now: float, monotonic: float) -> Verdict:
        if len(data) < OFF_LOOP_CHARACTERS:
            return verify(verifier, data, now=now, monotonic=monotonic)
        if entered.is_set():
            first_over.wait(30)
            return verify(verifier, data, now=now, monotonic=monotonic)
        entered.set()
        free.wait(30)
        try:
            return verify(verifier, data, now=now, monotonic=monotonic)
        finally:
            first_over.set()

    monkeypatch.setattr(Verifier, "verify", verify_slowly)
    large = sse(envelope("policy_updated", "x" * OFF_LOOP_CHARACTERS, event_id="large"), "1")
    refused = sse(envelope("policy_updated", key=NEW_KEY, event_id="refused"), "0")
    handled = asyncio.Event()

    async def note(_: Envelope) -> None:
        handled.set()

    watched = Watched(lambda n: [refused + large, FOREVER] if n == 1 else [large, FOREVER], handler=note)
    watching = asyncio.create_task(watched.listener.run())
    assert await asyncio.to_thread(entered.wait, 30)
    rotate_to_new_key(watched.node)
    await asyncio.sleep(0)  # the stream is told before the thread ends
    free.set()
    async with asyncio.timeout(30):
        await handled.wait()
    watching.cancel()
    await asyncio.wait({watching})
    assert watched.handled == ["large"]


# --- signing keys


def test_bad_signatures_ask_for_one_pull_a_minute() -> None:
    forged: list[Step] = [send("policy_updated", key=STRANGER), 1.0]
    watched = watch(always(*forged * 150), 150)
    assert watched.pulls.times("bad signature") == pytest.approx([0, 60, 120], abs=1)


def rotate_to_new_key(node: Node) -> None:
    node.fold(SigningKeysRotated(SigningKeys(public(NEW_KEY), public(OLD_KEY), unix_time() + 3600)))


@pytest.mark.virtual_time
async def test_new_keys_reopen_the_stream_once_for_what_could_not_be_verified() -> None:
    steps: list[Step] = [
        send("policy_updated", sse_id="1"),
        send("policy_updated", key=NEW_KEY, event_id="missed", sse_id="2"),
        FOREVER,
    ]

    def script(n: int) -> Sequence[Step]:
        replay = send("policy_updated", key=NEW_KEY, event_id="missed", sse_id="2")
        return steps if n == 1 else [replay, FOREVER]

    watched = Watched(script)

    async def rotate() -> None:
        await asyncio.sleep(5)
        rotate_to_new_key(watched.node)

    await watched.run(60, rotate())
    assert watched.streams.attempts == [(0, None), (pytest.approx(5, abs=0.1), "1")]
    assert watched.handled[1:] == ["missed"]


@pytest.mark.virtual_time
async def test_new_keys_leave_a_stream_alone_that_missed_nothing() -> None:
    watched = Watched(always(send("policy_updated"), FOREVER))

    async def rotate() -> None:
        await asyncio.sleep(5)
        rotate_to_new_key(watched.node)

    await watched.run(60, rotate())
    assert len(watched.streams.attempts) == 1


@pytest.mark.virtual_time
async def test_events_right_behind_a_rotation_are_not_lost() -> None:
    """They are read while the rotation is still waiting to be handled, so the old key refuses them at first."""

    def script(n: int) -> Sequence[Step]:
        before = b"".join(sse(envelope("policy_updated"), str(number)) for number in range(5))
        rotation = sse(envelope("signing_key_rotated", event_id="rotation"), "5")
        behind = sse(envelope("policy_updated", key=NEW_KEY, event_id="behind"), "6")
        return [before + rotation + behind, FOREVER] if n == 1 else [behind, FOREVER]

    async def handle(event: Envelope) -> None:
        await asyncio.sleep(0.1)
        if event.event_id == "rotation":
            rotate_to_new_key(watched.node)

    watched = Watched(script, handler=handle)
    await watched.run(30)
    assert watched.handled[-2:] == ["rotation", "behind"]
    assert watched.streams.replay_from == [None, "5"]


# --- the log


def test_refused_events_are_ten_lines_a_minute_and_a_number() -> None:
    forged: list[Step] = [send("policy_updated", key=STRANGER)] * 500
    with capture_logs() as lines:
        watch(always(*forged, 70.0, send("policy_updated", key=STRANGER), FOREVER), 80)
    refused = [line for line in lines if line["event"] == "event refused"]
    assert len(refused) == 11
    assert [line["count"] for line in lines if line["event"] == "more events refused"] == [490]
    assert all("payload" not in line and "signature" not in line for line in refused)


@pytest.mark.virtual_time
async def test_rejected_events_are_told_with_their_reason() -> None:
    twice = send("policy_updated")
    watched = Watched(
        always(b"data: \xff\n\n", send("policy_updated", key=STRANGER, event_id="ev-9"), twice, twice, FOREVER)
    )
    told: list[tuple[str, str, str]] = []
    watched.listener.on_rejected.append(lambda *what: told.append(what))
    await watched.run(10)
    assert told == [("malformed", "", ""), ("bad_signature", "ev-9", "policy_updated")]


def test_stale_events_are_expected_right_after_a_connection_only() -> None:
    stale = send("policy_updated", issued=1_000_000_000.0)
    with capture_logs() as lines:
        watch(always(stale, 61.0, stale, FOREVER), 100)
    assert [(line["event"], line["log_level"]) for line in lines if line.get("reason") == "stale"] == [
        ("event skipped", "info"),
        ("event refused", "warning"),
    ]


def test_nonces_that_are_given_up_early_are_one_line_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plexd.wire.envelope.NONCE_LIMIT", 2)
    steps: list[Step] = []
    for _ in range(120):
        steps += [send("policy_updated"), 60.0]
    with capture_logs() as lines:
        watch(always(*steps), 7100)
    assert [line["count"] for line in lines if line["event"] == "nonces given up early"] == [1, 60]
