"""A disk that hangs holds up nothing that the mesh waits for."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from plexd.runtime.threads import in_mesh_thread


def test_mesh_does_not_queue_up_behind_what_hangs() -> None:
    free = threading.Event()

    async def main() -> str:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        hanging = asyncio.create_task(asyncio.to_thread(free.wait))
        queued = asyncio.create_task(asyncio.to_thread(lambda: None))
        try:
            async with asyncio.timeout(10):
                name = await in_mesh_thread(lambda: threading.current_thread().name)
            assert not hanging.done()
            assert not queued.done()
            return name
        finally:
            free.set()
            await asyncio.gather(hanging, queued)

    assert asyncio.run(main()).startswith("mesh")


def test_every_loop_has_threads_of_its_own() -> None:
    """Those of the one before may belong to another network namespace."""

    async def main() -> threading.Thread:
        return await in_mesh_thread(threading.current_thread)

    first, second = asyncio.run(main()), asyncio.run(main())
    assert first is not second
