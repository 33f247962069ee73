"""Threads for what the mesh waits for, apart from those of everything else.

The loop's own threads write files and read logs, and a disk that hangs keeps each of them: looks at the kernel,
repairs and events must not queue up behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

P = ParamSpec("P")
R = TypeVar("R")

THREADS = 4  # at most, made as they are needed

# they end with their loop; a thread belongs to the network namespace in which it was made
_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPoolExecutor] = WeakKeyDictionary()


async def in_mesh_thread(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What `asyncio.to_thread` is for the rest."""
    loop = asyncio.get_running_loop()
    threads = _of_loops.get(loop)
    if threads is None:
        threads = _of_loops[loop] = ThreadPoolExecutor(THREADS, "mesh")
    return await loop.run_in_executor(threads, partial(call, *args, **kwargs))
