"""How far each telemetry source has been delivered, kept in `telemetry/cursors.json` (docs/contract/telemetry.md §2.8).

Sources hold their positions themselves; here they are asked for them when it is time to write. A position that was
not written when the process died only means that some entries are sent twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from plexd.errors import LocalStateError
from plexd.log import get_logger
from plexd.store.files import DIRECTORY_MODE, move_aside, read_optional, write_whole

log = get_logger("telemetry")

VERSION = 1
SPACING_SECONDS = 1.0  # between two writes


class _Section(NamedTuple):
    current: Callable[[], Any]
    saved: Callable[[Any], None]


class Cursors:
    """A service; `directory` is made by `load`.

    `is_new`: there was no file, so this is the first start. `was_corrupt`: there was one that could not be used.
    `problem` says why positions are not written now, empty when they are.
    """

    name = "cursors"

    def __init__(self, directory: Path) -> None:
        self.is_new = True
        self.was_corrupt = False
        self.problem = ""
        self._directory = directory
        self._path = directory / "cursors.json"
        self._loaded: dict[str, Any] = {}
        self._sections: dict[str, _Section] = {}
        self._changed = asyncio.Event()
        self._lock = asyncio.Lock()

    def load(self) -> None:
        """Blocks. Raises LocalStateError when the directory cannot be made or the file cannot be read."""
        try:
            self._directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        except OSError as exc:
            raise LocalStateError(f"cannot make {self._directory}: {exc.strerror}; check the data directory") from exc
        raw = read_optional(self._path)
        if raw is None:
            return
        try:
            document = json.loads(raw)
            if not isinstance(document, dict) or document.get("version") != VERSION:
                raise ValueError("it is not of this version")
        except (ValueError, RecursionError) as exc:
            self.was_corrupt = True
            move_aside(self._path, str(exc))
            return
        self.is_new = False
        self._loaded = document

    def register(self, section: str, current: Callable[[], Any], saved: Callable[[Any], None] = lambda _: None) -> Any:
        """What an earlier process, or who had it before, left there, None for nothing.

        `current` is asked for the value when it is time to write, `saved` is told what has safely been written.
        """
        self._sections[section] = _Section(current, saved)
        return self._loaded.get(section)

    def release(self, section: str) -> None:
        """Its source has ended: the position stays as it is now, for whoever registers the section next."""
        if (released := self._sections.pop(section, None)) is not None:
            self._loaded[section] = released.current()

    def touch(self) -> None:
        """A position has moved."""
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            await self.save()
            await asyncio.sleep(SPACING_SECONDS)

    async def save(self) -> bool:
        """Write all positions; whether that succeeded."""
        async with self._lock:
            self._changed.clear()
            sections = dict(self._sections)
            values = {name: section.current() for name, section in sections.items()}
            document = self._loaded | values | {"version": VERSION}
            raw = json.dumps({name: value for name, value in document.items() if value is not None}).encode()
            try:
                await asyncio.to_thread(write_whole, self._path, raw)
            except OSError as exc:
                if not self.problem:
                    log.error(
                        "positions not saved",
                        error=str(exc),
                        next_step="make room in the data directory or make it writable; a restart repeats entries",
                    )
                self.problem = exc.strerror or str(exc)
                self._changed.set()
                return False
            if self.problem:
                log.info("positions saved again")
            self.problem = ""
            for name, value in values.items():
                sections[name].saved(value)
            return True
