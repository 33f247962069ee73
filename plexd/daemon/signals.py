"""What the signals do: stop (docs/contract/lifecycle.md §12), read the configuration again, show where tasks wait."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from plexd.errors import ConfigError
from plexd.log import get_logger

log = get_logger("daemon")

STOP_TOTAL_SECONDS = 50.0  # after this what is still open is abandoned


class Signals:
    """`stopping` is set by the first SIGTERM or SIGINT, `hurrying` by the second: nothing is waited for any more that
    the next start does as well. `reload` may raise ConfigError once it has said why.
    """

    def __init__(self, reload: Callable[[], Awaitable[object]]) -> None:
        self.stopping = asyncio.Event()
        self.hurrying = asyncio.Event()
        self._reload = reload
        self._stops = 0

    def handle(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGUSR1, self._on_dump)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)

    def _on_stop(self) -> None:
        self._stops += 1
        if self._stops == 1:
            asyncio.get_running_loop().call_later(STOP_TOTAL_SECONDS, _abandon)
        if self._stops == 2:
            log.warning("second stop signal, deliveries wait for the next start")
            self.hurrying.set()
        if self._stops > 2:
            log.error("third stop signal, ending at once")
            os._exit(1)
        self.stopping.set()

    def _on_dump(self) -> None:
        for task in asyncio.all_tasks():
            log.info("task", name=task.get_name(), at=_innermost(task))

    def _on_reload(self) -> None:
        self._reload_task = asyncio.create_task(self._reload_or_log(), name="reload")

    async def _reload_or_log(self) -> None:
        with contextlib.suppress(ConfigError):  # it has been said
            await self._reload()


def _abandon() -> None:
    log.error("stop took too long, open steps abandoned", limit_seconds=STOP_TOTAL_SECONDS)
    os._exit(1)


def _innermost(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the coroutine at the end of its chain of awaits."""
    awaited: Any = task.get_coro()
    while getattr(getattr(awaited, "cr_await", None), "cr_frame", None) is not None:
        awaited = awaited.cr_await
    frame = getattr(awaited, "cr_frame", None)
    return f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame is not None else "-"
