"""Keeps the garbage collector from stalling the event loop.

A full collection walks over every object that may be part of a cycle. Ten thousand peers are a hundred thousand of
those, 50 ms at a time, and each state pull makes enough new ones to bring it about. They live long and are in no
cycle, so they are taken out of the walk: collected once, then frozen. From time to time all of it is looked at again.
"""

from __future__ import annotations

import asyncio
import gc

from plexd.log import get_logger
from plexd.runtime.backoff import Backoff

log = get_logger("daemon")

FIRST_SECONDS = 10.0  # by then a node that starts has its peers
LONGEST_SECONDS = 3600.0


class Garbage:
    name = "garbage"

    async def run(self) -> None:
        pauses = Backoff(FIRST_SECONDS, LONGEST_SECONDS)
        try:
            while True:
                await asyncio.sleep(pauses.next())
                gc.unfreeze()
                found = gc.collect()
                gc.freeze()
                log.debug("garbage collected", found=found, kept=gc.get_freeze_count())
        finally:
            gc.unfreeze()
