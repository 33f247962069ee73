"""A resolver that hangs takes no thread from anybody else, and does not hold up the end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from plexd.linux.lookup import MAX_LOOKUPS, use_own_threads


def test_names_resolve_as_ever() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        use_own_threads(loop)
        infos = await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        assert infos[0][4] == ("127.0.0.1", 80)
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo("no-such-name.invalid", 80)

    asyncio.run(main())


def test_hung_lookups_leave_the_executor_free_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()

    def hung(*_: object, **__: object) -> object:
        hang.wait(30)
        return []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        use_own_threads(loop)
        for _ in range(MAX_LOOKUPS):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await loop.getaddrinfo("example.invalid", 80)
        with pytest.raises(socket.gaierror, match="too many name lookups"):
            await loop.getaddrinfo("example.invalid", 80)
        assert await asyncio.to_thread(lambda: "free") == "free"

    monkeypatch.setattr(socket, "getaddrinfo", hung)
    started = time.monotonic()
    asyncio.run(main())
    ended = time.monotonic() - started
    hang.set()
    assert ended < 20  # the lookups would have held the executor, and so the end of the loop, for 30
