"""The addresses of this host over minutes of virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from plexd.errors import KernelError
from plexd.mesh.address import parse_ip
from plexd.traversal.host_addresses import HostAddresses
from tests.node_harness import Asked
from tests.virtual_time import run_virtual


class Host:
    def __init__(self) -> None:
        self.readdressed = asyncio.Event()
        self.fails = False
        self._addresses = {parse_ip("192.0.2.1")}

    async def host_addresses(self) -> frozenset[bytes]:
        if self.fails:
            raise KernelError("no answer")
        return frozenset(self._addresses)

    def add(self, text: str) -> None:
        self._addresses.add(parse_ip(text))
        self.readdressed.set()

    def remove(self, text: str) -> None:
        self._addresses.discard(parse_ip(text))
        self.readdressed.set()


def asked_during(script: Callable[[Host], Awaitable[None]]) -> list[float]:
    """When a discovery was asked for, in whole tenths of a second."""

    async def main() -> Asked:
        host, asked = Host(), Asked()
        task = asyncio.create_task(HostAddresses(host, asked).run())
        await asyncio.sleep(0)
        await script(host)
        await asyncio.sleep(60)
        task.cancel()
        await asyncio.wait({task})
        return asked

    return [round(at, 1) for at in run_virtual(main()).times("host addresses changed")]


def test_change_is_told_two_seconds_later_with_all_that_came_in_between() -> None:
    async def script(host: Host) -> None:
        host.remove("192.0.2.1")
        await asyncio.sleep(1)
        host.add("198.51.100.1")
        await asyncio.sleep(0.9)
        host.add("2001:db8::1")
        await asyncio.sleep(10)
        host.remove("2001:db8::1")

    assert asked_during(script) == [2.0, 13.9]


def test_address_that_is_renewed_or_comes_back_is_no_change() -> None:
    async def script(host: Host) -> None:
        host.readdressed.set()  # the first listening, or a router's advertisement
        await asyncio.sleep(10)
        host.remove("192.0.2.1")
        await asyncio.sleep(1)
        host.add("192.0.2.1")

    assert asked_during(script) == []


def test_kernel_that_refuses_to_list_is_asked_again_at_the_next_change() -> None:
    async def script(host: Host) -> None:
        host.fails = True
        host.add("198.51.100.1")
        await asyncio.sleep(10)
        host.fails = False
        host.readdressed.set()

    assert asked_during(script) == [12.0]
