"""Holds the event stream open: connect, decode, verify, hand over, reconnect.

Reading and verifying is one task, handling another; between them a bounded queue. Only what was handled to its end
moves Last-Event-ID, so what was not is replayed. An event that fails its checks has no effect, ever.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from plexd.errors import ControlError, Forbidden, NotFound, Transient, Unauthenticated
from plexd.log import get_logger
from plexd.node.connection_status import Stream
from plexd.node.health import Condition, Health
from plexd.node.state import Node
from plexd.runtime.backoff import FullJitter, requested_delay
from plexd.runtime.waiting import set_within, to_its_end
from plexd.wire.envelope import NONCE_LIMIT, Envelope, Outcome, Verdict, Verifier
from plexd.wire.sse import Decoder, Item, Malformed, Oversized, Retry

log = get_logger("events")

IDLE_SECONDS = 90.0
HEALTHY_SECONDS = 30.0
POLLING_AFTER_SECONDS = 300.0
REFUSED_RETRY_SECONDS = 300.0  # after 403 and 404
UNAUTHENTICATED_RETRY_SECONDS = 60.0
JITTER_CAP_SECONDS = 60.0
HANDLER_SECONDS = 30.0
QUEUE_EVENTS = 1024
QUEUE_BYTES = 16 << 20
OFF_LOOP_CHARACTERS = 256 << 10  # taking apart and compacting more than this stalls the loop for over 10 ms
WARNINGS_A_MINUTE = 10
REPLAY_SECONDS = 60.0  # after a connection, replayed events may well be stale
KEY_PULL_SPACING_SECONDS = 60.0
EVICTION_WARNING_SPACING_SECONDS = 3600.0


class ControlPlane(Protocol):
    def events(self, last_event_id: str | None) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The stream; entering raises ControlError, so does reading from it."""


class _Queue:
    """Verified events on their way to the handler; `put` waits while 1024 of them or 16 MiB are waiting."""

    def __init__(self) -> None:
        self._items: deque[tuple[Envelope | None, str | None, int]] = deque()
        self._bytes = 0
        self._changed = asyncio.Condition()

    async def put(self, event: Envelope | None, event_id: str | None, size: int) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._items or (len(self._items) < QUEUE_EVENTS and self._bytes + size <= QUEUE_BYTES)
            )
            self._items.append((event, event_id, size))
            self._bytes += size
            self._changed.notify_all()

    async def get(self) -> tuple[Envelope | None, str | None]:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._items))
            event, event_id, size = self._items.popleft()
            self._bytes -= size
            self._changed.notify_all()
            return event, event_id


class Listener:
    """`handle` takes a verified event; `request_pull` asks for a reconciliation; `poll_interval` is in seconds.

    `on_connected` is called at every connection, `on_reconnected` at all but the first.
    """

    name = "listener"

    def __init__(
        self,
        control: ControlPlane,
        node: Node,
        verifier: Verifier,
        handle: Callable[[Envelope], Awaitable[None]],
        request_pull: Callable[[str], None],
        health: Health,
        poll_interval: float,
        now: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.connected = asyncio.Event()
        self.on_connected: list[Callable[[], None]] = []
        self.on_reconnected: list[Callable[[], None]] = []
        self.on_rejected: list[Callable[[str, str, str], None]] = []  # told reason, event id and type
        self.poll_interval = poll_interval
        self._control = control
        self._node = node
        self._verifier = verifier
        self._handle = handle
        self._request_pull = request_pull
        self._health = health
        self._now = now
        self._uniform = uniform
        self._jitter = FullJitter(base=1.0, cap=JITTER_CAP_SECONDS, uniform=uniform)
        self._queue = _Queue()
        self._under_way: tuple[Envelope | None, str | None] | None = None  # taken from the queue, not yet handled
        self._last_event_id: str | None = None
        self._stream: asyncio.Task[None] | None = None
        self._close_reason = ""
        self._healthy_at = 0.0  # monotonic, the last healthy moment
        self._polling = False
        self._queued = self._handled = 0  # since the start
        self._missed_behind: int | None = None  # how many were queued when an event could not be verified
        self._key_pull_at = float("-inf")
        self._connected_at = float("-inf")
        self._evicted_said = 0
        self._eviction_said_at = float("-inf")
        self._warned_minute = self._warned_count = 0
        node.on_renewed.append(self._forget)

    def reopen(self, reason: str) -> None:
        """Close the stream, or the attempt at it, and connect at once for what was not handled yet; that is no failure.

        Between two attempts there is nothing to close: the next one comes in its time.
        """
        if self._stream is not None:
            self._close_reason = reason
            self._stream.cancel()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._healthy_at = loop.time()
        self._node.connection.stream_is(Stream.CONNECTING)
        self._verifier.replace_keys(self._node.desired.signing_keys)
        self._node.on_signing_keys.append(self._keys_changed)
        self._node.on_refused.append(self._identity_refused)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._handle_events(), name="event handler")
                group.create_task(self._keep_connected(), name="event reader")
        finally:
            self._node.on_signing_keys.remove(self._keys_changed)
            self._node.on_refused.remove(self._identity_refused)
            self._node.connection.stream_is(Stream.STOPPED)

    # connection

    async def _keep_connected(self) -> None:
        while True:
            await self._node.accepted.wait()
            if (delay := await self._connect_once()) is not None:
                await self._wait(delay)

    async def _wait(self, delay: float) -> None:
        """The time before the next attempt. State is polled meanwhile, once the stream has failed for too long."""
        loop = asyncio.get_running_loop()
        attempt_at = loop.time() + delay
        self._judge_polling()
        if self._polling:
            attempt_at = max(attempt_at, loop.time() + self.poll_interval)
        while True:
            if self._polling:
                self._request_pull("polling")
                wake_at = loop.time() + self.poll_interval
            else:
                wake_at = self._healthy_at + POLLING_AFTER_SECONDS
            if attempt_at <= wake_at:
                await asyncio.sleep(attempt_at - loop.time())
                return
            await asyncio.sleep(wake_at - loop.time())
            self._judge_polling()

    async def _connect_once(self) -> float | None:
        """One connection, from the attempt to its end; the seconds to wait before the next, None if it was reopened."""
        loop = asyncio.get_running_loop()
        self._stream = asyncio.create_task(self._read_stream(), name="event stream")
        try:
            await self._stream
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._stream.cancel()
                raise
            log.info("stream closed", reason=self._close_reason)
            return None
        except Unauthenticated as exc:
            log.warning("stream refused", error=str(exc))
            if self._node.accepted.is_set():
                await asyncio.sleep(UNAUTHENTICATED_RETRY_SECONDS)
            else:
                await set_within(self._node.accepted, UNAUTHENTICATED_RETRY_SECONDS)
            return 0.0
        except (Forbidden, NotFound) as exc:
            if not self._polling:
                log.error("stream refused", error=str(exc), next_step="state is polled, next attempt in 5 minutes")
            self._healthy_at = min(self._healthy_at, loop.time() - POLLING_AFTER_SECONDS)
            return REFUSED_RETRY_SECONDS
        except ControlError as exc:
            log.log(
                20 if self._jitter.attempt == 0 else 10, "stream lost", error=str(exc), attempt=self._jitter.attempt + 1
            )
            return max(self._jitter.next(), requested_delay(exc, self._uniform))
        finally:
            self.connected.clear()
            self._node.connection.stream_is(Stream.POLLING if self._polling else Stream.CONNECTING)
            self._stream = None
        log.log(20 if self._jitter.attempt == 0 else 10, "stream ended", attempt=self._jitter.attempt + 1)
        return self._jitter.next()

    async def _read_stream(self) -> None:
        loop = asyncio.get_running_loop()
        decoder = Decoder()
        async with self._control.events(self._last_event_id) as chunks:
            self.connected.set()
            is_first = self._connected_at == float("-inf")
            for listener in (*self.on_connected, *(() if is_first else self.on_reconnected)):
                listener()
            self._node.connection.stream_is(Stream.CONNECTED)
            self._connected_at = loop.time()
            self._health.set(Condition.STREAM_DOWN, False)
            log.info("stream connected", replay_after=self._last_event_id or "")
            self._request_pull("stream connected")
            healthy = loop.call_later(HEALTHY_SECONDS, self._healthy)
            try:
                while True:
                    try:
                        async with asyncio.timeout(IDLE_SECONDS):  # runs only while waiting for the socket
                            chunk = await anext(chunks)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        raise Transient(f"no byte on the event stream for {IDLE_SECONDS:.0f} s") from None
                    for item in decoder.feed(chunk):
                        await self._take(item)
            finally:
                healthy.cancel()
                if self._is_healthy(loop.time()):
                    self._healthy_at = loop.time()

    def _healthy(self) -> None:
        """The connection has proven itself: 30 s, or one verified event."""
        self._healthy_at = asyncio.get_running_loop().time()
        self._jitter.reset()
        if self._polling:
            self._polling = False
            log.info("stream is back", next_step="polling ended")

    def _is_healthy(self, now: float) -> bool:
        return self._healthy_at >= self._connected_at and now >= self._connected_at

    def _judge_polling(self) -> None:
        failing = asyncio.get_running_loop().time() - self._healthy_at
        if failing >= POLLING_AFTER_SECONDS:
            self._health.set(Condition.STREAM_DOWN, True, f"for {failing:.0f} s")
            if not self._polling:
                self._polling = True
                self._node.connection.stream_is(Stream.POLLING)
                log.info("stream is down, state is polled", failing_seconds=round(failing))

    # verification

    async def _take(self, item: Item) -> None:
        match item:
            case Retry(seconds):
                self._jitter.base = seconds
                return
            case Malformed():
                self._reject(reason=Outcome.MALFORMED.value, event_type="", event_id="", detail="not UTF-8")
                return
            case Oversized(_, size):
                log.error("event skipped", reason="oversized", bytes=size)
                return
        monotonic = asyncio.get_running_loop().time()
        now = self._now()
        if len(item.data) < OFF_LOOP_CHARACTERS:
            verdict = self._verifier.verify(item.data, now=now, monotonic=monotonic)
        else:  # nobody else verifies meanwhile: this is the only reader
            verdict = await self._verify_in_thread(item.data, now, monotonic)
        self._say_evictions(monotonic)
        if verdict.outcome is Outcome.VERIFIED:
            self._healthy()
            self._node.connection.event_arrived()
            try:
                await self._put(verdict.envelope, item.id, len(item.data))
            except asyncio.CancelledError:  # the stream was closed while there was no room
                self._verifier.forget(verdict)
                raise
            return
        self._log_refused(verdict, monotonic)
        if verdict.outcome is Outcome.REPLAYED:
            await self._put(None, item.id, 0)  # moves Last-Event-ID in its turn
        elif verdict.outcome is Outcome.BAD_SIGNATURE:
            self._missed_behind = self._queued
            if monotonic - self._key_pull_at >= KEY_PULL_SPACING_SECONDS:
                self._key_pull_at = monotonic
                self._request_pull("bad signature")

    async def _verify_in_thread(self, data: str, now: float, monotonic: float) -> Verdict:
        """A thread goes on when the stream is closed, so its end is waited for: the event comes again."""
        verifying = asyncio.create_task(
            asyncio.to_thread(self._verifier.verify, data, now=now, monotonic=monotonic), name="verification"
        )
        try:
            await to_its_end(asyncio.wait({verifying}))
        except asyncio.CancelledError:
            self._verifier.forget(verifying.result())
            raise
        return verifying.result()

    async def _put(self, event: Envelope | None, event_id: str | None, size: int) -> None:
        await self._queue.put(event, event_id, size)
        self._queued += 1  # not before: what was closed out is counted when it comes again

    def _say_evictions(self, monotonic: float) -> None:
        """At most once an hour, with all since the last time."""
        count = self._verifier.evicted - self._evicted_said
        if count and monotonic - self._eviction_said_at >= EVICTION_WARNING_SPACING_SECONDS:
            self._evicted_said, self._eviction_said_at = self._verifier.evicted, monotonic
            log.warning("nonces given up early", count=count, reason=f"more than {NONCE_LIMIT} are remembered")

    def _log_refused(self, verdict: Verdict, monotonic: float) -> None:
        keys = {
            "reason": verdict.outcome.value,
            "event_type": verdict.envelope.event_type if verdict.envelope else "",
            "event_id": verdict.envelope.event_id if verdict.envelope else "",
            "detail": verdict.reason,
        }
        expected = verdict.same_event or (
            verdict.outcome is Outcome.STALE and monotonic - self._connected_at < REPLAY_SECONDS
        )
        if expected:
            log.info("event skipped", **keys)
        else:
            self._reject(**keys)

    def _reject(self, *, reason: str, event_type: str, event_id: str, detail: str) -> None:
        self._warn("event refused", reason=reason, event_type=event_type, event_id=event_id, detail=detail)
        for listener in self.on_rejected:
            listener(reason, event_id, event_type)

    def _warn(self, message: str, **keys: str) -> None:
        """At most ten lines a minute; the rest is counted."""
        minute = int(asyncio.get_running_loop().time() // 60)
        if minute != self._warned_minute:
            if self._warned_count > WARNINGS_A_MINUTE:
                log.warning("more events refused", count=self._warned_count - WARNINGS_A_MINUTE)
            self._warned_minute, self._warned_count = minute, 0
        self._warned_count += 1
        if self._warned_count <= WARNINGS_A_MINUTE:
            log.warning(message, **keys)

    def _keys_changed(self) -> None:
        """What could not be verified with the old keys may verify with the new ones: have it replayed, once."""
        self._verifier.replace_keys(self._node.desired.signing_keys)
        if self._missed_behind is not None and self._stream is not None:
            self._missed_behind = None
            self.reopen("new signing keys, refused events are replayed")

    def _forget(self) -> None:
        """All that belongs to the stream of the node that this one was."""
        self._verifier.forget_nonces()
        self._queue = _Queue()
        self._under_way = None
        self._queued = self._handled = 0
        self._last_event_id = self._missed_behind = None
        self._key_pull_at = float("-inf")

    def _identity_refused(self) -> None:
        self.reopen("identity refused")

    # handling

    async def _handle_events(self) -> None:
        if self._under_way is not None:
            # it may be folded in and not applied: handled again, it changes nothing
            self._request_pull("interrupted event")
        while True:
            if self._under_way is None:
                self._under_way = await self._queue.get()
            event, event_id = self._under_way
            if event is not None:
                await self._handle_one(event)
            self._under_way = None
            if event_id is not None:
                self._last_event_id = event_id or None
            self._handled += 1
            if self._missed_behind is not None and self._handled > self._missed_behind:
                self._missed_behind = None  # Last-Event-ID is past it: a replay would not bring it

    async def _handle_one(self, event: Envelope) -> None:
        try:
            async with asyncio.timeout(HANDLER_SECONDS):
                await self._handle(event)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # a cancellation that nobody asked for must not end the handling of all further events
            log.error("event handler cancelled itself", event_type=event.event_type, event_id=event.event_id)
            self._request_pull("failed handler")
        except TimeoutError:
            log.error("event handler took too long", event_type=event.event_type, event_id=event.event_id)
            self._request_pull("failed handler")
        except Exception:
            log.exception("event handler failed", event_type=event.event_type, event_id=event.event_id)
            self._request_pull("failed handler")
