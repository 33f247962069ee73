"""Observe, plan, apply: the one routine that changes the kernel.

A pass takes each resource in turn: it looks, plans and applies. A whole pass looks at everything; a repair after a
notification leaves out the peers, about which WireGuard notifies nobody. An event is applied from two targets, before
and after, without a look; when the kernel refuses, the next pass repairs. All of that runs under one lock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from plexd.converge.resources import Look, Resource
from plexd.converge.results import PassResult, combined, first_error, log_failures
from plexd.errors import KernelError
from plexd.log import get_logger
from plexd.mesh.repair_limiter import RepairLimiter, flapping_correction
from plexd.node.health import Condition, Health
from plexd.runtime.backoff import Backoff

log = get_logger("mesh")

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 60.0  # between repairs of a resource that fails
FLAPPING_SHOWN = 3


@dataclass(slots=True)
class _Record:
    """What is known of one resource. `problem` is the sentence about the last failure, "" while there is none.

    `retry_at` is when a failing resource may be repaired again, in the loop's time.
    """

    resource: Resource
    retry: Backoff
    limiter: RepairLimiter = field(default_factory=RepairLimiter)
    is_clean: bool = False
    problem: str = ""
    reported: str = ""  # the failure that the log said last
    retry_at: float | None = None


class Converger:
    """Keeps the kernel equal to what is wanted of each resource, whenever asked to.

    `clean` is set while the last try at every resource, pass or event, succeeded in everything. `deferred` is set when
    a pass defers the repair of a flapping object; the consumer clears it.
    """

    def __init__(
        self,
        resources: Sequence[Resource],
        health: Health,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.clean = asyncio.Event()
        self.deferred = asyncio.Event()
        self._records = [
            _Record(resource, Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, uniform)) for resource in resources
        ]
        self._health = health
        self._lock = asyncio.Lock()

    async def converge(self) -> PassResult:
        """One pass over everything. A kernel that refuses shows in the result and in health, not as an exception."""
        async with self._lock:
            return await self._pass(self._records, whole=True)

    async def repair(self, *, whole: bool = False, at_once: bool = False) -> PassResult:
        """A pass over what notifications tell of, or over everything; over everything too where less is not enough.

        A resource whose last repair failed is left out until its time has come, unless `at_once`. What was half done
        and undone comes back as a notification: without that rest the repair would go round and round.
        """
        async with self._lock:
            now = asyncio.get_running_loop().time()
            ready: list[_Record] = []
            results: list[PassResult] = []
            for record in self._records:
                if record.retry_at is None or record.retry_at <= now or at_once:
                    ready.append(record)
                else:
                    results.append(PassResult(0, 0, (), record.retry_at))
            results.append(await self._pass(ready, whole=whole))
            for record in ready:
                if not record.is_clean:
                    record.retry_at = asyncio.get_running_loop().time() + record.retry.next()
            return combined(results)

    async def apply_event(self) -> bool:
        """Bring what was folded in since the last look into the kernel; False when something failed and a pass is due.

        Nothing is observed: the messages are those about the peers that changed.
        """
        async with self._lock:
            applied = [
                await self._step(record, record.resource.look_at_event, "event not applied") for record in self._records
            ]
            self._show()
        return all(applied)

    async def step(self, resource: Resource, look: Callable[[], Awaitable[Look | None]], failure: str) -> bool:
        """Apply changes to one resource between two passes; False when something failed and a pass is due.

        `failure` is the log message for a kernel that refuses.
        """
        record = next(record for record in self._records if record.resource is resource)
        async with self._lock:
            succeeded = await self._step(record, look, failure)
            self._show()
        return succeeded

    async def _pass(self, records: Sequence[_Record], *, whole: bool) -> PassResult:
        results = [await self._converge(record, whole=whole) for record in records]
        self._show()
        flapping = [text for record in self._records for text in record.limiter.flapping]
        self._health.set(Condition.REPAIR_CONTESTED, bool(flapping), ", ".join(flapping[:FLAPPING_SHOWN]))
        return combined(results)

    async def _converge(self, record: _Record, *, whole: bool) -> PassResult:
        """The part of a pass that is about one resource."""
        resource, limiter = record.resource, record.limiter
        now = asyncio.get_running_loop().time()
        try:
            look = await resource.look(whole=whole or not record.is_clean or limiter.leaves_damage)
            if look is None:
                record.is_clean = False
                return PassResult(changed=0, failed=1, corrections=())
            changes = look.due
            if look.is_repair:
                limiter, admitted = limiter.admit(resource.subject, look.due, now)
                changes = look.admit(admitted)
            outcomes = await look.apply(changes) if changes else []
        except KernelError as exc:
            record.is_clean, record.problem = False, str(exc)
            resource.failed(exc, is_news=record.reported != record.problem)
            record.reported = record.problem
            return PassResult(changed=0, failed=1, corrections=())
        record.reported = ""
        failed = log_failures(outcomes)
        corrections = look.settle(changes, outcomes)
        record.is_clean, record.problem = not failed, first_error(outcomes)
        if not failed:
            record.retry.reset()
            record.retry_at = None
        if look.is_repair:
            done = [outcome.change for outcome in outcomes if outcome.error is None]
            limiter = limiter.record(resource.subject, done, now)
        corrections += flapping_correction(record.limiter, limiter)
        record.limiter = limiter
        if limiter.due is not None:
            self.deferred.set()
        return PassResult(len(outcomes) - failed, failed, corrections, limiter.due)

    async def _step(self, record: _Record, look: Callable[[], Awaitable[Look | None]], failure: str) -> bool:
        """Only a pass, which sees everything, clears what failed before."""
        try:
            step = await look()
            if step is None:
                return False
            outcomes = await step.apply(step.due) if step.due else []
        except KernelError as exc:
            record.is_clean = False
            log.error(failure, resource=record.resource.subject.name, error=str(exc))
            return False
        failed = log_failures(outcomes)
        step.settle(step.due, outcomes)
        if failed:
            record.is_clean, record.problem = False, first_error(outcomes)
        return not failed

    def _show(self) -> None:
        """Tell the loops that wait, and health, how the resources stand."""
        if all(record.is_clean for record in self._records):
            self.clean.set()
        else:
            self.clean.clear()
        problems = [self._named(record) for record in self._records if record.problem]
        self._health.set(Condition.CHANGES_FAILED, bool(problems), "; ".join(problems))

    def _named(self, record: _Record) -> str:
        if len(self._records) == 1:
            return record.problem
        return f"{record.resource.subject.name}: {record.problem}"
