"""The configuration in force, and what happens when it is read again (docs/contract/operations.md §4.6)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from plexd import log as logging
from plexd.config.load import Loaded
from plexd.config.models import Config
from plexd.config.reload import Reloaded, is_below, take_over
from plexd.errors import ConfigError
from plexd.log import get_logger

log = get_logger("daemon")


class Configuration:
    """`current` is in force; whoever wants to notice a reload asks for it anew.

    `live` says what a changed key or section does; a key that is nowhere in it waits for a restart. `on_read` is
    called at every reload, after that; it may raise ConfigError. `announcing` is open for as long as a reload takes.
    """

    def __init__(
        self, config: Config, load: Callable[[], Loaded], announcing: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.current = config
        self.live: dict[str, Callable[[], None]] = {
            "log_level": self._set_up_log,
            "log_format": self._set_up_log,
            "token": _read_when_needed,
            "registration": _read_when_needed,
            "deregister_on_shutdown": _read_when_needed,
            "mesh.keep_on_stop": _read_when_needed,
        }
        self.on_read: list[Callable[[], Awaitable[None]]] = []
        self._load = load
        self._announcing = announcing
        self._reading = asyncio.Lock()

    async def read_again(self) -> Reloaded:
        """Read the file again and apply what can be; any mistake in it leaves all as it is. Raises ConfigError."""
        async with self._reading:
            try:
                with self._announcing():
                    loaded = await asyncio.to_thread(self._load)
                    reloaded = take_over(self.current, loaded.config, self.live)
                    self.current = reloaded.config
                    for name, apply in self.live.items():
                        if any(is_below(key, {name}) for key in reloaded.changed):
                            apply()
                    for listener in self.on_read:
                        await listener()
            except ConfigError as exc:
                log.error("configuration not reloaded", problems=list(exc.problems), next_step="the old one stays")
                raise
            for warning in loaded.warnings:
                log.warning("configuration warning", detail=warning)
            log.info("configuration reloaded", changed=reloaded.changed, restart_required=reloaded.restart_required)
            return reloaded

    def _set_up_log(self) -> None:
        logging.set_up(self.current.log_level, self.current.log_format)


def _read_when_needed() -> None:
    """A key that nobody holds on to."""
