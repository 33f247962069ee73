"""The reconcile loop: pull the desired state, converge, hand over drift; at the timer and whenever somebody asks.

Requests fold into one. A cycle reads everything again, so a lost, doubled or reordered request does no harm.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from plexd.converge.results import PassResult
from plexd.errors import ControlError, Forbidden, NotFound, WireError
from plexd.log import get_logger
from plexd.mesh.desired import FullState, SigningKeys
from plexd.mesh.drift import Correction, snapshot_corrections
from plexd.node.health import Condition, Health
from plexd.node.state import Node
from plexd.runtime.backoff import Backoff, Postponement
from plexd.runtime.waiting import set_within

log = get_logger("reconcile")

MIN_SPACING_SECONDS = 1.0  # between the starts of two cycles
FIRST_RETRY_SECONDS = 5.0  # after a cycle with failed changes
RETRY_PATIENCE_SECONDS = 1.0  # what an answer gets before failed changes are tried again without it
MAX_FETCHES = 3  # while events keep overtaking the answer
STALE_INTERVALS = 3
PASS_LIMIT_SECONDS = 300.0
REASON_SECONDS = 60.0

# any word with a digit, but for the numbers that are reasons
_PARTICULAR = re.compile(r"(?<!Errno )(?<!answered )\b[\w:.-]*\d[\w:.-]*")


class ControlPlane(Protocol):
    async def fetch_state(self) -> FullState:
        """Raises ControlError, or WireError when the document is not what the contract says."""


class Converger(Protocol):
    async def converge(self) -> PassResult: ...


class Reconcile:
    """`interval` is in seconds, counted from the end of a cycle and spread by 10 %."""

    name = "reconcile"

    def __init__(
        self,
        control: ControlPlane,
        converger: Converger,
        node: Node,
        report: Callable[[Sequence[Correction]], None],
        save_signing_keys: Callable[[SigningKeys], Awaitable[None]],
        health: Health,
        interval: float,
        now: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.interval = interval
        self.last_pull_succeeded: float | None = None  # monotonic
        self._control = control
        self._converger = converger
        self._node = node
        self._report = report
        self._save_signing_keys = save_signing_keys
        self._health = health
        self._now = now
        self._uniform = uniform
        self._wanted = asyncio.Event()
        self._pass_wanted = asyncio.Event()
        self._pull_wanted = True
        self._postponement = Postponement(lambda: node.identity.node_id, uniform)
        self._retry = Backoff(FIRST_RETRY_SECONDS, max(FIRST_RETRY_SECONDS, interval), uniform)
        self._reported_kind: str | None = None  # of the failure said last, until a pull succeeds
        self._reported_reason = ""
        self._reported_at = 0.0  # monotonic
        node.on_renewed.append(self._renewed)

    def request(self, reason: str) -> None:
        """Ask for a cycle with a state pull. During a cycle it earns exactly one more."""
        log.debug("reconciliation requested", reason=reason)
        self._pull_wanted = True
        self._wanted.set()

    def request_pass(self, reason: str) -> None:
        """Ask for a look at the kernel without a state pull."""
        log.debug("pass requested", reason=reason)
        self._pass_wanted.set()
        self._wanted.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        started_at = timer_at = loop.time()
        self._pull_wanted = True
        # the cached snapshot first: nothing at a start waits for the control plane
        failed = await self._pass(())
        while True:
            self._wanted.clear()
            started = loop.time()
            is_pass = not self._pull_wanted
            failed = await self._cycle(is_retry=failed)
            self._judge_staleness(started_at)
            if failed:
                timer_at = loop.time() + self._retry.next()
            else:
                self._retry.reset()
                if not is_pass or timer_at <= loop.time():  # passes in between must not put the pull off for ever
                    timer_at = loop.time() + self.interval * self._uniform(0.9, 1.1)
            wake_at = timer_at
            if self._pull_wanted and (postponed := self._postponement.remaining(loop.time())):
                wake_at = min(timer_at, loop.time() + postponed)
            if not await set_within(self._wanted, max(0.0, wake_at - loop.time())):
                self._pull_wanted = True  # the timer pulls, requests say themselves
            await asyncio.sleep(max(0.0, started + MIN_SPACING_SECONDS - loop.time()))

    def _renewed(self) -> None:
        """The state of the new node is fetched at once."""
        self.request("new identity")

    def _judge_staleness(self, started_at: float) -> None:
        since = self.last_pull_succeeded if self.last_pull_succeeded is not None else started_at
        age = asyncio.get_running_loop().time() - since
        self._health.set(Condition.STATE_STALE, age > STALE_INTERVALS * self.interval, f"last fetched {age:.0f} s ago")

    async def _cycle(self, *, is_retry: bool) -> bool:
        """One cycle; whether changes failed and a retry is due soon. `is_retry`: they did in the one before."""
        if not self._pull_wanted or self._postponement.remaining(asyncio.get_running_loop().time()):
            return await self._pass(())
        if not self._node.accepted.is_set():
            return await self._pass(())
        self._pull_wanted = False
        pull = asyncio.create_task(self._pull(), name="state pull")
        try:
            # local damage does not wait for an answer, nor do changes that failed
            patience = RETRY_PATIENCE_SECONDS if is_retry else None
            while await self._passes_wanted_before(pull, patience):
                failed = await self._pass(())
                patience = self._retry.next() if failed else None
            return await self._pass(pull.result())
        finally:
            pull.cancel()

    async def _passes_wanted_before(self, pull: asyncio.Task[tuple[Correction, ...]], patience: float | None) -> bool:
        """Whether a pass is due while the pull goes on, at the latest after so many seconds."""
        self._pass_wanted.clear()
        wanted = asyncio.create_task(self._pass_wanted.wait(), name="pass wanted")
        try:
            await asyncio.wait({pull, wanted}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wanted.cancel()
        return not pull.done()

    async def _pass(self, corrections: tuple[Correction, ...]) -> bool:
        """Converge and hand over what was corrected, by the pull before it too; whether changes failed.

        A stop waits for the pass at hand, so that what was done is also reported.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._node.expire_signing_key(self._now())
        work = asyncio.create_task(self._converge(), name="pass")
        try:
            result = await asyncio.shield(work)
        except asyncio.CancelledError:
            corrections += (await work).corrections
            self._report(corrections)
            raise
        corrections += result.corrections
        duration = round(loop.time() - started, 3)
        if result.changed or result.failed or corrections:
            log.info(
                "cycle finished",
                changed=result.changed,
                failed=result.failed,
                corrections=len(corrections),
                duration_seconds=duration,
            )
        else:
            log.debug("cycle finished", changed=0, duration_seconds=duration)
        self._node.connection.pass_ended(bool(result.failed), len(corrections))
        self._report(corrections)
        return bool(result.failed)

    async def _converge(self) -> PassResult:
        try:
            async with asyncio.timeout(PASS_LIMIT_SECONDS):
                return await self._converger.converge()
        except TimeoutError:
            log.error("pass took too long", limit_seconds=PASS_LIMIT_SECONDS, next_step="the next one goes on")
            return PassResult(changed=0, failed=1, corrections=())

    async def _pull(self) -> tuple[Correction, ...]:
        """Replace the desired snapshot; a failure leaves the last one in force, which the pass then repairs against."""
        loop, node_id = asyncio.get_running_loop(), self._node.identity.node_id
        try:
            for fetch in range(1, MAX_FETCHES + 1):
                # taken anew each time: what an event changed meanwhile is no drift
                generation, before = self._node.generation, self._node.desired
                state = await self._control.fetch_state()
                if self._node.generation == generation or fetch == MAX_FETCHES:
                    await self._save_new_signing_keys(state)  # here, because events may come in meanwhile
                if self._node.generation == generation:
                    break
        except (ControlError, WireError) as exc:
            if isinstance(exc, ControlError):
                self._postponement.postpone(exc, node_id, loop.time())
            self._node.connection.state_pulled(str(exc))
            self._log_failure(exc)
            return ()
        self._reported_kind = None
        self._node.replace(state, self._now())
        self._node.connection.state_pulled()
        self.last_pull_succeeded = loop.time()
        log.debug("state fetched", peers=len(self._node.desired.peers))
        return snapshot_corrections(before, self._node.desired)

    async def _save_new_signing_keys(self, state: FullState) -> None:
        if state.signing_keys is not None and state.signing_keys != self._node.desired.signing_keys:
            await self._save_signing_keys(state.signing_keys)

    def _log_failure(self, exc: ControlError | WireError) -> None:
        """Each kind of failure is said once, then a debug line until something else happens; another reason for the
        same kind also counts, at most once a minute.

        A refusal is an error: it does not pass by itself (docs/contract/lifecycle.md §7.5).
        """
        now = asyncio.get_running_loop().time()
        kind, reason = type(exc).__name__, _without_particulars(str(exc))
        is_news = kind != self._reported_kind or (
            reason != self._reported_reason and now - self._reported_at >= REASON_SECONDS
        )
        first = log.error if isinstance(exc, Forbidden | NotFound) else log.warning
        write = first if is_news else log.debug
        write("state not fetched", error=str(exc), kind=kind, next_step="the last known state stays in force")
        if is_news:
            self._reported_kind, self._reported_reason, self._reported_at = kind, reason, now


def _without_particulars(text: str) -> str:
    """An error's text without what differs each time: positions, addresses, times, ids of requests."""
    return _PARTICULAR.sub("#", text)
