"""Addresses come in the order of use; a resolver that hangs takes no thread from anybody else."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from plexd.control import ControlPlane
from plexd.errors import Transient, Unresolved
from plexd.linux.lookup import MAX_LOOKUPS, has_route, look_up, use_own_threads
from plexd.mesh.address import parse_ip
from plexd.wire import models

REGISTRATION = models.RegisterRequest(token=SecretStr("a token"), public_key="k", hostname="h")


async def test_names_resolve_as_ever() -> None:
    loop = asyncio.get_running_loop()
    use_own_threads(loop)
    infos = await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
    assert infos[0][4] == ("127.0.0.1", 80)
    with pytest.raises(socket.gaierror):
        await loop.getaddrinfo("no-such-name.invalid", 80)


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


async def test_shortage_of_threads_costs_the_lookups_it_meets_and_no_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    use_own_threads(asyncio.get_running_loop())
    control = ControlPlane("http://localhost:1", ssl.create_default_context())
    with monkeypatch.context() as shortage:
        shortage.setattr(threading.Thread, "start", refuse)
        for _ in range(MAX_LOOKUPS):
            with pytest.raises(Unresolved, match=r"^localhost does not resolve: .*can't start new thread"):
                await look_up("localhost")
        with pytest.raises(Transient, match="can't start new thread"):
            await control.register(REGISTRATION, retry_for=0)
    assert parse_ip("127.0.0.1") in await look_up("localhost")
    await control.close()


# which of a name's addresses comes first

IPV4, IPV6 = "203.0.113.9", "2001:db8:1::9"
LOOK_UP = """
import asyncio
from plexd.linux.lookup import look_up, use_own_threads
from plexd.mesh.address import format_ip

async def main():
    use_own_threads(asyncio.get_running_loop())
    print(*map(format_ip, await look_up("dual.example")))

asyncio.run(main())
"""


class Underlay:
    """A host in its namespace; both families know "dual.example"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files = Path("/etc/netns") / name
        self.files.mkdir(parents=True)
        (self.files / "hosts").write_text(f"127.0.0.1 localhost\n{IPV4} dual.example\n{IPV6} dual.example\n")

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, capture_output=True)

    def add(self, link: str, *networks: str) -> None:
        """A link that is up and has these addresses, with the routes that come with them."""
        self.ip("link", "add", link, "type", "veth", "peer", "name", f"{link}-far")
        for end in (link, f"{link}-far"):
            self.ip("link", "set", end, "up")
        for network in networks:
            self.ip("address", "add", network, "dev", link, *(["nodad"] if ":" in network else []))

    def add_mesh(self) -> None:
        self.add("mesh", "10.100.7.12/32")
        self.ip("route", "add", "10.100.0.0/16", "dev", "mesh", "metric", "2048")

    def addresses(self) -> list[str]:
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", LOOK_UP]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.fixture
def underlay(namespace: str) -> Iterator[Underlay]:
    """The test runs in its namespace."""
    host = Underlay(namespace)
    yield host
    shutil.rmtree(host.files)


@pytest.mark.namespaces
def test_ipv6_comes_first_where_the_mesh_alone_has_ipv4(underlay: Underlay) -> None:
    underlay.add("uplink", "2001:db8:1::2/64")
    underlay.add_mesh()
    assert underlay.addresses() == [IPV6, IPV4]


@pytest.mark.namespaces
def test_ipv4_comes_first_where_both_families_have_routes(underlay: Underlay) -> None:
    underlay.add("uplink", "2001:db8:1::2/64", "203.0.113.2/24")
    underlay.add_mesh()
    assert underlay.addresses() == [IPV4, IPV6]


@pytest.mark.namespaces
def test_ipv4_comes_first_where_no_family_has_a_route(underlay: Underlay) -> None:
    underlay.add("uplink", "2001:db8:2::2/64")
    underlay.add_mesh()
    assert underlay.addresses() == [IPV4, IPV6]


@pytest.mark.namespaces
@pytest.mark.parametrize(("address", "network"), [(IPV4, "203.0.113.2/24"), (IPV6, "2001:db8:1::2/64")])
def test_route_that_is_made_or_refused_is_seen_at_once(underlay: Underlay, address: str, network: str) -> None:
    assert not has_route(parse_ip(address))
    underlay.add("uplink", network)
    assert has_route(parse_ip(address))
    underlay.ip("route", "add", "unreachable", address)
    assert not has_route(parse_ip(address))
