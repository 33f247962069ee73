"""One pipeline: sources collect into a window, batches of it are sent one after the other (docs/contract/telemetry.md
§2).

Collection and delivery are separate tasks: a slow request never stops collection before the window is full, and a slow
source never stops delivery. Whatever the process dies of, a source's position has only moved over entries whose fate
is known.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from plexd.errors import ControlError
from plexd.log import get_logger
from plexd.runtime.backoff import Backoff, requested_delay
from plexd.runtime.waiting import any_set_within, set_within
from plexd.telemetry.bisection import Bisection, EntryOutcome, Settled
from plexd.telemetry.counters import Counters, Dropped
from plexd.telemetry.delivery_state import DeliveryState, State
from plexd.telemetry.gaps import Gap, Gaps, Reason
from plexd.telemetry.reaction import NextDelivery, react
from plexd.telemetry.window import Entry, Limits, Window
from plexd.wire.times import format_time

log = get_logger("telemetry")

BACKOFF_FIRST_SECONDS = 1.0
BACKOFF_LAST_SECONDS = 60.0
STEADY_SECONDS = 60.0  # a source that ran this long has recovered
PAUSE_SAID_SECONDS = 10.0  # shorter waits for room are everyday life
UNLIMITED = 1 << 62
REFUSED_SHOWN_BYTES = 200

PositionT = TypeVar("PositionT")
Uniform = Callable[[float, float], float]


class SourceState(StrEnum):
    READING = "reading"
    PAUSED = "paused"
    UNAVAILABLE = "unavailable"
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(slots=True)
class SourceStatus:
    """What the status says about a source. `position` is asked when somebody wants to know."""

    name: str
    state: SourceState = SourceState.READING
    detail: str = ""
    entries: int = 0
    last_entry_at: float | None = None
    position: Callable[[], str] = field(default=str)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state.value,
            "detail": self.detail,
            "position": self.position(),
            "entries": self.entries,
            "last_entry_at": format_time(self.last_entry_at) if self.last_entry_at is not None else None,
        }


class Source(Protocol):
    """Something that is read. It opens its feeds, and keeps its rows, at the pipeline it was given."""

    @property
    def name(self) -> str: ...

    async def collect(self) -> None:
        """Read until cancelled. Raising is a failure: it is counted, and collecting starts again. Returning is final:
        there is nothing here to read."""


class EntryEncoder(Protocol):
    """What the entries of a pipeline look like, as far as the engine has to know."""

    def marker(self, gap: Gap) -> bytes | None:
        """The entry that shows a gap; None where gaps are not shown."""

    def shorten(self, body: bytes) -> bytes | None:
        """The entry with less text, None when there is no text to take away."""


class SourceQueue(Generic[PositionT]):
    """A sequence of entries with positions: what goes in comes out in order, and is settled in order."""

    def __init__(
        self,
        pipeline: Pipeline,
        name: str,
        row: SourceStatus,
        settled: Callable[[PositionT], None],
        *,
        precounted: bool = False,
    ) -> None:
        """`precounted`: the entries were counted as collected when they came into being."""
        self.name = name
        self.row = row
        self.settled = settled
        self._pipeline = pipeline
        self._precounted = precounted
        self._newest: Entry | None = None  # the last one in the window, None when all are settled
        self._unsettled = 0

    def offer(self, body: bytes, position: PositionT) -> bool:
        """Put an entry into the window; False when there is no room for it now."""
        if not self._pipeline.window.fits(len(body)):
            return False
        self._enter(body, position)
        if not self._precounted:
            self._pipeline.counters.collected += 1
        return True

    async def put(self, body: bytes, position: PositionT) -> None:
        """Put an entry into the window as soon as there is room; meanwhile the source is not read."""
        while not self.offer(body, position):
            await self.room(len(body))

    async def room(self, size: int) -> None:
        await self._pipeline.wait_for_room(self.row, size)

    def push(self, body: bytes, position: PositionT) -> int:
        """Put an entry into the window at the cost of the oldest ones; how many those were."""
        gone = self._pipeline.push_out(len(body))
        if not self.offer(body, position):  # all the room is taken by what is in flight
            self.lose(Dropped.OVERFLOW, position)
            return gone + 1
        return gone

    def skip_filtered(self, position: PositionT) -> None:
        """An entry that nobody wants was read."""
        self._pipeline.counters.collected += 1
        self._pipeline.counters.filtered += 1
        self._pass(position)

    def skip_empty(self, position: PositionT) -> None:
        """An entry without text was read."""
        self._pipeline.counters.collected += 1
        self._pipeline.counters.empty += 1
        self._pass(position)

    def lose(self, reason: Dropped, position: PositionT | None = None, count: int = 1) -> None:
        """Entries that were there can't be sent."""
        if not self._precounted:
            self._pipeline.counters.collected += count
        self._pipeline.counters.dropped[reason] += count
        if position is not None:
            self._pass(position)

    def note_truncated(self) -> None:
        self._pipeline.counters.truncated += 1

    def note_error(self) -> None:
        self._pipeline.counters.source_errors += 1

    async def gap(
        self,
        reason: Reason,
        lost: int | None,
        position: PositionT,
        *,
        since: float | None = None,
        until: float | None = None,
        source: str | None = None,
    ) -> None:
        """Continuity cannot be proven: mark it here, or soon if there was a marker lately.

        `source` names it if that is not the feed itself. The position has to lie behind the gap.
        """
        marker = self._pipeline.mark(Gap(source or self.name, reason, lost, since, until))
        if marker is None:
            self._pass(position)
            return
        while not self._pipeline.window.fits(len(marker)):
            await self.room(len(marker))
        self._pipeline.counters.collected += 1
        self._enter(marker, position)

    def settle(self, position: PositionT) -> None:
        """For the pipeline: the oldest entry of this feed has met its fate."""
        self._unsettled -= 1
        if not self._unsettled:
            self._newest = None
        self.settled(position)

    def _enter(self, body: bytes, position: PositionT) -> None:
        pipeline = self._pipeline
        entry = Entry(body, self, position, pipeline.monotonic())
        self._newest = entry
        self._unsettled += 1
        self.row.entries += 1
        self.row.last_entry_at = pipeline.now()
        pipeline.enter(entry)

    def _pass(self, position: PositionT) -> None:
        """Nothing has to happen to what lies up to here; it is settled together with what came before it."""
        if self._newest is None:
            self.settled(position)
        else:
            self._newest.position = position


class Pipeline:
    """A service. `send` posts an array of entries once and returns the bytes that went over the wire; it raises
    ControlError. `accepted` is set while the control plane accepts this node. `put_aside` keeps entries that nothing
    could be done with; it raises OSError. `owed` are gaps of an earlier process, `save` is called when that or a
    position has changed. `counters` are those of a pipeline that this one succeeds.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        form: EntryEncoder,
        send: Callable[[bytes], Awaitable[int]],
        accepted: asyncio.Event,
        put_aside: Callable[[Sequence[bytes]], Awaitable[object]],
        *,
        keeps_when_unprovisioned: bool = True,
        owed: Sequence[Gap] = (),
        counters: Counters | None = None,
        save: Callable[[], None] = lambda: None,
        uniform: Uniform = random.uniform,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.window = Window(limits)
        self.counters = counters or Counters()
        self.rows: list[SourceStatus] = []
        self.sources: list[Source] = []
        self.spooled: Callable[[], tuple[int, int]] = lambda: (0, 0)  # entries and bytes on disk, not yet read
        self.now, self.monotonic = now, monotonic
        self._form = form
        self._send = send
        self._accepted = accepted
        self._put_aside = put_aside
        self._keeps_when_unprovisioned = keeps_when_unprovisioned
        self._gaps = Gaps(owed)
        self._save = save
        self._uniform = uniform
        self._owed_feed = self._feed_of_owed_gaps()
        self._feeds: dict[str, SourceQueue[Any]] = {}
        self._standing = DeliveryState()
        self._backoff = Backoff(BACKOFF_FIRST_SECONDS, BACKOFF_LAST_SECONDS, uniform)
        self._byte_limit = UNLIMITED
        self._trial: Bisection | None = None
        self._decided: list[Settled] = []  # not yet given back: being put aside takes time
        self._due = asyncio.Event()  # the window may hold a batch earlier than was thought
        self._room = asyncio.Event()
        self._woken = asyncio.Event()
        self._renewed = asyncio.Event()  # the identity of the node was replaced since the last request began
        self._owing = asyncio.Event()
        self._first_shift = uniform(0.0, limits.batch_seconds)
        self._last_success_at: float | None = None
        self._last_error = ""
        self._last_error_at: float | None = None
        self._refused_said_at = float("-inf")

    # for sources

    def row(self, name: str) -> SourceStatus:
        """The line of the status about a source; the same one for the same name."""
        for row in self.rows:
            if row.name == name:
                return row
        self.rows.append(SourceStatus(name))
        return self.rows[-1]

    def feed(
        self,
        name: str,
        settled: Callable[[PositionT], None],
        *,
        row: SourceStatus | None = None,
        precounted: bool = False,
    ) -> SourceQueue[PositionT]:
        """The feed of this name, which outlives failures of its source. `settled` is told of positions in order."""
        known = self._feeds.get(name)
        if known is None:
            known = self._feeds[name] = SourceQueue(self, name, row or self.row(name), settled, precounted=precounted)
        return known

    def forget_feed(self, name: str) -> None:
        """It will not come back; what is in the window goes on."""
        self._feeds.pop(name, None)

    def enter(self, entry: Entry) -> None:
        was_empty = self.window.due_at() is None
        self.window.add(entry)
        if was_empty or self.window.holds_a_batch:
            self._due.set()

    def push_out(self, size: int) -> int:
        gone = self.window.make_room(size)
        self.counters.dropped[Dropped.OVERFLOW] += len(gone)
        for entry in gone:
            entry.origin.settle(entry.position)
        return len(gone)

    async def wait_for_room(self, row: SourceStatus, size: int) -> None:
        since, said = self.monotonic(), False
        row.state = SourceState.PAUSED
        try:
            while not self.window.fits(size):
                self._room.clear()
                if not await set_within(self._room, PAUSE_SAID_SECONDS) and not said:
                    said = True
                    log.info("source paused", pipeline=self.name, source=row.name, reason="the window is full")
        finally:
            row.state = SourceState.READING
        if said:
            paused = round(self.monotonic() - since)
            log.info("source reading again", pipeline=self.name, source=row.name, paused_seconds=paused)

    def mark(self, gap: Gap) -> bytes | None:
        """The marker to insert now; None when there is none, or when it follows later."""
        if self._form.marker(gap) is None:
            return None
        noted = self._gaps.note(gap, self.monotonic())
        if noted is None:
            self._save()
            self._owing.set()
            return None
        log.warning("gap in a source", pipeline=self.name, **_described(gap))
        return self._form.marker(noted)

    @property
    def owed_gaps(self) -> Sequence[Gap]:
        """What has to be kept on disk with the positions."""
        return self._gaps.owed

    # running

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for source in self.sources:
                tasks.create_task(self._keep_collecting(source), name=f"{self.name} {source.name}")
            tasks.create_task(self._mark_owed_gaps(), name=f"{self.name} gaps")
            tasks.create_task(self._deliver(), name=f"{self.name} delivery")

    def wake(self) -> None:
        """The control plane was just reached: a wait for the next try ends."""
        self._woken.set()

    def node_renewed(self) -> None:
        """The identity of the node was replaced: what the control plane asked of the former node is over."""
        self._renewed.set()

    async def finish(self, seconds: float) -> None:
        """After `run` has ended: send what there is, one try a batch, for at most that long."""
        try:
            async with asyncio.timeout(seconds):
                await self._settle([])  # the end may have come while entries were put aside
                if self._trial is not None and self._trial.is_over:
                    self._trial = None
                while self._accepted.is_set() and self.window.count:
                    trial = self._trial = self._trial or Bisection(self._cut(), self._byte_limit, self._shorten)
                    if not await self._try_once(trial):
                        break
        except TimeoutError:
            log.info("delivery ended before all was sent", pipeline=self.name, left=self.window.count)

    def drop_rest(self, is_read_again: Callable[[str], bool] = lambda _: False) -> None:
        """At the end of the pipeline, for what can be kept nowhere.

        Of a feed that `is_read_again`, by its name, entries count as not collected so far.
        """
        left = [item.entry for item in self._decided] + (self._trial.abandon() if self._trial is not None else [])
        left += self.window.clear()
        again = sum(is_read_again(entry.origin.name) for entry in left)
        self.window, self._trial, self._decided = Window(self.window.limits), None, []
        self.counters.collected -= again
        self.counters.dropped[Dropped.SHUTDOWN] += len(left) - again

    async def _keep_collecting(self, source: Source) -> None:
        backoff = Backoff(BACKOFF_FIRST_SECONDS, BACKOFF_LAST_SECONDS, self._uniform)
        failing = False
        while True:
            started = self.monotonic()
            for row in self.rows:
                if row.name == source.name and row.state is SourceState.FAILED:
                    row.state, row.detail = SourceState.READING, ""
            try:
                await source.collect()
                return
            except Exception as exc:
                self.counters.source_errors += 1
                if self.monotonic() - started >= STEADY_SECONDS:
                    backoff.reset()
                    failing = False
                if not failing:
                    log.exception("source failed", pipeline=self.name, source=source.name)
                failing = True
                for row in self.rows:
                    if row.name == source.name:
                        row.state, row.detail = SourceState.FAILED, str(exc) or type(exc).__name__
            await asyncio.sleep(backoff.next())

    async def _mark_owed_gaps(self) -> None:
        while True:
            due_at = self._gaps.due_at()
            self._owing.clear()
            if due_at is None:
                await self._owing.wait()
                continue
            await asyncio.sleep(max(0.0, due_at - self.monotonic()))
            for gap in self._gaps.due(self.monotonic()):
                log.warning("gap in a source", pipeline=self.name, **_described(gap))
                await self._owed_feed.put(self._form.marker(gap) or b"{}", gap)

    def _feed_of_owed_gaps(self) -> SourceQueue[Gap]:
        def settled(gap: Gap) -> None:
            self._gaps.delivered(gap)
            self._save()

        return SourceQueue(self, "gaps", SourceStatus("gaps"), settled)

    async def _deliver(self) -> None:
        while True:
            if self._trial is None:
                await self._wait_for_batch()
                self._trial = Bisection(self._cut(), self._byte_limit, self._shorten)
            await self._carry(self._trial)

    async def _wait_for_batch(self) -> None:
        while True:
            self._due.clear()
            due_at, now = self.window.due_at(), self.monotonic()
            if due_at is None:
                await self._due.wait()
                continue
            # so that a fleet that started together does not report in step
            rest = due_at + self._first_shift - now
            if rest <= 0:
                return
            await set_within(self._due, rest)

    def _cut(self) -> list[Entry]:
        self._first_shift = 0.0
        return self.window.cut(self._byte_limit)

    async def _carry(self, trial: Bisection) -> None:
        while not trial.is_over:
            if not self._accepted.is_set():
                self._stand(State.PAUSED, "the control plane refuses this node's key")
                await self._accepted.wait()
            await self._try(trial)
        self._trial = None

    async def _try(self, trial: Bisection) -> None:
        """One request, and the wait that its failure asks for; a new identity of the node ends the wait."""
        self._woken.clear()
        self._renewed.clear()
        try:
            await self._request(trial)
        except ControlError as exc:
            answer, seconds = react(exc)
            if answer is NextDelivery.DIVIDE or answer is NextDelivery.HALVE:
                await self._divide(trial, answer)
                return
            paused = answer is NextDelivery.PAUSE or answer is NextDelivery.UNPROVISIONED
            self._stand(State.PAUSED if paused else State.FAILING, str(exc))
            if answer is NextDelivery.UNPROVISIONED and not self._keeps_when_unprovisioned:
                self._empty(trial)
            if paused:
                await set_within(self._renewed, seconds)
                return
            delay = self._backoff.next()
            floor = requested_delay(exc, self._uniform) or seconds * self._uniform(1.0, 1.25)
            if answer is NextDelivery.RETRY and not floor:
                await any_set_within(delay, self._woken, self._renewed)
            else:
                await set_within(self._renewed, max(delay, floor))

    async def _try_once(self, trial: Bisection) -> bool:
        """One request without a wait; whether another one makes sense."""
        try:
            await self._request(trial)
        except ControlError as exc:
            answer, _ = react(exc)
            if answer is NextDelivery.DIVIDE or answer is NextDelivery.HALVE:
                await self._divide(trial, answer)
            else:
                return False
        if trial.is_over:
            self._trial = None
        return True

    async def _request(self, trial: Bisection) -> None:
        """Raises ControlError, counted."""
        part = trial.next()
        try:
            sent = await self._send(b"[" + b",".join([entry.body for entry in part]) + b"]")
        except ControlError as exc:
            self.counters.batches_failed += 1
            self._last_error, self._last_error_at = str(exc), self.now()
            raise
        self.counters.batches_sent += 1
        self.counters.bytes_sent += sent
        self._last_success_at = self.now()
        self._backoff.reset()
        self._stand(State.OK, "")
        await self._settle(trial.accepted())

    async def _divide(self, trial: Bisection, answer: NextDelivery) -> None:
        settled = trial.refused() if answer is NextDelivery.DIVIDE else trial.too_large()
        self._byte_limit = min(self._byte_limit, trial.byte_limit)
        await self._settle(settled)

    async def _settle(self, decided: list[Settled]) -> None:
        """Cancelled, it leaves what was decided to the next call."""
        self._decided += decided
        aside = [item.entry.body for item in self._decided if item.fate is EntryOutcome.QUARANTINED]
        if aside:
            await self._quarantine(aside)
        settled, self._decided = self._decided, []
        for entry, fate in settled:
            if fate is EntryOutcome.SENT:
                self.counters.sent += 1
            else:
                self.counters.dropped[Dropped(fate.value)] += 1
                self._say_refused(entry, fate)
        self.window.settle([item.entry for item in settled])
        for entry, _ in settled:
            entry.origin.settle(entry.position)
        if settled:
            self._room.set()

    async def _quarantine(self, bodies: list[bytes]) -> None:
        try:
            path = await self._put_aside(bodies)
        except OSError as exc:
            log.error("refused entries could not be kept", pipeline=self.name, count=len(bodies), error=str(exc))
        else:
            log.error("refused entries put aside", pipeline=self.name, count=len(bodies), path=str(path))

    def _say_refused(self, entry: Entry, fate: EntryOutcome) -> None:
        if fate is EntryOutcome.QUARANTINED:
            return
        if self.monotonic() - self._refused_said_at < 60.0:
            return
        self._refused_said_at = self.monotonic()
        log.warning("entry dropped", pipeline=self.name, source=entry.origin.name, reason=fate.value)
        start = entry.body[:REFUSED_SHOWN_BYTES].decode("utf-8", "replace")
        log.debug("dropped entry", pipeline=self.name, start=start)

    def _empty(self, trial: Bisection) -> None:
        """The control plane lacks the endpoint, and what is here is worth nothing later."""
        gone = trial.abandon()
        self.window.settle(gone)
        gone += self.window.clear()
        self.counters.dropped[Dropped.UNPROVISIONED] += len(gone)
        for entry in gone:
            entry.origin.settle(entry.position)
        self._room.set()

    def _shorten(self, entry: Entry) -> bool:
        shorter = self._form.shorten(entry.body)
        if shorter is None:
            return False
        self.window.shorten(entry, shorter)
        self.counters.truncated += 1
        return True

    def _stand(self, state: State, reason: str) -> None:
        before = self._standing.state
        if not self._standing.becomes(state, self.monotonic()):
            return
        if state is State.OK:
            log.info("delivery recovered", pipeline=self.name, was=before.value)
        else:
            log.error(f"delivery {state.value}", pipeline=self.name, reason=reason, buffered=self.window.count)

    # status

    def status(self) -> dict[str, Any]:
        """The body of the status routes (docs/contract/telemetry.md §6)."""
        last = format_time(self._last_success_at) if self._last_success_at is not None else None
        return {
            "enabled": True,
            "state": self._standing.state.value,
            "buffered": self.window.count,
            "capacity": self.window.limits.entries,
            "dropped": self.counters.dropped.total(),
            "last_delivery_at": last,
            "last_error": self._last_error,
            "sources": [row.as_json() for row in self.rows],
            "counters": self.counters.as_json() | self._disk_and_age(),
        }

    def gauges(self) -> dict[str, Any]:
        """The member of this pipeline in the points of group `agent`."""
        last_success, last_error = self._last_success_at, self._last_error_at
        return self.counters.as_json() | {
            "buffered": self.window.count,
            "buffered_bytes": self.window.bytes,
            **self._disk_and_age(),
            "state": self._standing.state.value,
            "last_success_time": format_time(last_success) if last_success is not None else None,
            "last_error": self._last_error or None,
            "last_error_time": format_time(last_error) if last_error is not None else None,
        }

    def _disk_and_age(self) -> dict[str, Any]:
        oldest = self.window.oldest()
        age = round(self.monotonic() - oldest, 1) if oldest is not None else 0.0
        return {"spool_bytes": self.spooled()[1], "oldest_age_seconds": age}

    def imbalance(self) -> int:
        """Entries that are nowhere; always 0."""
        return self.counters.imbalance(self.window.count, self.spooled()[0])


def disabled() -> dict[str, Any]:
    """The body of the status routes for a pipeline that is switched off."""
    empty = Counters().as_json() | {"spool_bytes": 0, "oldest_age_seconds": 0.0}
    return {
        "enabled": False,
        "state": State.DISABLED.value,
        "buffered": 0,
        "capacity": 0,
        "dropped": 0,
        "last_delivery_at": None,
        "last_error": "",
        "sources": [],
        "counters": empty,
    }


def _described(gap: Gap) -> dict[str, Any]:
    return {
        "source": gap.source,
        "reason": gap.reason.value,
        "lost": "unknown" if gap.lost is None else gap.lost,
    }
