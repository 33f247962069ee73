"""Keeps services running; knows none of them by name.

A service ends only by cancellation. One that fails, or just returns, is started again after a jittered delay that
doubles from 1 s to 60 s; a FatalError ends them all and reaches the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from plexd.errors import FatalError
from plexd.log import get_logger
from plexd.runtime.backoff import Backoff

log = get_logger("supervisor")

STEADY_SECONDS = 300.0  # a service that ran this long has recovered
FAILURE_WINDOW_SECONDS = 600.0
FAILURE_LIMIT = 10  # more failures than this within the window are reported
SLOW_END_SECONDS = 10.0  # a service that takes longer to end for a pause is named


class Service(Protocol):
    """A loop of the daemon."""

    @property
    def name(self) -> str: ...

    async def run(self) -> None:
        """Run until cancelled; may be called again after a failure."""


class Supervisor:
    """`on_flapping(names)` is told which services keep failing, whenever that changes."""

    def __init__(self, on_flapping: Callable[[frozenset[str]], None]) -> None:
        self._on_flapping = on_flapping
        self._flapping: frozenset[str] = frozenset()
        self._runs: set[asyncio.Task[None]] = set()
        self._wanted = asyncio.Event()
        self._wanted.set()

    async def run(self, services: Sequence[Service]) -> None:
        """Run all of them until cancelled. Raises the first FatalError of any."""
        try:
            async with asyncio.TaskGroup() as group:
                for service in services:
                    group.create_task(self._keep_running(service), name=f"keeper of {service.name}")
        except BaseExceptionGroup as errors:
            fatal, _ = errors.split(FatalError)
            if fatal is None:
                raise
            # one mistake may end several services; the first of them says what to do
            first: BaseException = fatal
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Inside, every service has ended and none begins; at the end they all start anew. No service may ask for it.

        It takes as long as the slowest needs to end.
        """
        self._wanted.clear()
        try:
            for run in self._runs:
                run.cancel()
            if self._runs:
                _, late = await asyncio.wait(self._runs, timeout=SLOW_END_SECONDS)
                if late:
                    names = sorted(run.get_name() for run in late)
                    log.error("services do not end", services=names, next_step="all others are paused until they do")
                    await asyncio.wait(late)
            yield
        finally:
            self._wanted.set()

    async def _keep_running(self, service: Service) -> None:
        loop = asyncio.get_running_loop()
        backoff = Backoff(base=1.0, cap=60.0)
        failures: deque[float] = deque()
        while True:
            await self._wanted.wait()
            run = asyncio.create_task(service.run(), name=service.name)
            self._runs.add(run)
            steady = loop.call_later(STEADY_SECONDS, self._recovered, service.name, backoff, failures)
            try:
                await run
                log.error("service ended unexpectedly", service=service.name)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                if not self._wanted.is_set():
                    continue
                # not meant for the service: something it waited for was cancelled
                log.error("service ended unexpectedly", service=service.name)
            except FatalError:
                raise
            except Exception:
                log.exception("service failed", service=service.name)
            finally:
                steady.cancel()
                self._runs.discard(run)
            failures.append(loop.time())
            while failures[0] < loop.time() - FAILURE_WINDOW_SECONDS:
                failures.popleft()
            if len(failures) > FAILURE_LIMIT:
                self._set_flapping(self._flapping | {service.name})
            delay = backoff.next()
            log.info("service restarts", service=service.name, delay_seconds=round(delay, 1))
            await asyncio.sleep(delay)

    def _recovered(self, name: str, backoff: Backoff, failures: deque[float]) -> None:
        backoff.reset()
        failures.clear()
        self._set_flapping(self._flapping - {name})

    def _set_flapping(self, names: frozenset[str]) -> None:
        if names != self._flapping:
            self._flapping = names
            self._on_flapping(names)


class Groups:
    """Groups of services, each under a supervisor of its own; `on_flapping(names)` tells of all that keep failing."""

    def __init__(self, on_flapping: Callable[[frozenset[str]], None]) -> None:
        self._on_flapping = on_flapping
        self._flapping: dict[str, frozenset[str]] = {}

    def supervisor(self, group: str) -> Supervisor:
        """The group begins anew: what failed in one of the same name before is forgotten."""

        def on_flapping(names: frozenset[str]) -> None:
            self._flapping[group] = names
            self._on_flapping(frozenset().union(*self._flapping.values()))

        if self._flapping.get(group):
            on_flapping(frozenset())
        return Supervisor(on_flapping)

    def start(self, group: str, services: Sequence[Service]) -> asyncio.Task[None]:
        return asyncio.create_task(self.supervisor(group).run(services), name=group)
