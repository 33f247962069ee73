"""What a test behind NATs needs: the internet, a control plane in it, STUN servers, agents."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from plexd.lab.controlplane import LabControlPlane
from plexd.lab.controlplane.fleet import DEFAULT_MESH
from plexd.lab.stun import StunServer
from tests.namespaces import inside, why_not
from tests.nat.internet import SERVERS, STUN_PORT, Agent, Host, Internet, until


class World:
    """One test's internet; everything in it lives in this process, in namespaces, or in processes that it ends."""

    def __init__(self, internet: Internet, plane: LabControlPlane, directory: Path) -> None:
        self.internet = internet
        self.plane = plane
        self._directory = directory
        self._agents: list[Agent] = []

    def agent(self, *nats: str) -> Agent:
        agent = Agent(self.internet.add_host(*nats), self.plane, self._directory)
        self._agents.append(agent)
        return agent

    @contextlib.asynccontextmanager
    async def responder(self, *addresses: str, port: int = STUN_PORT) -> AsyncIterator[list[str]]:
        """The lab's own STUN server; how an agent names it."""
        async with contextlib.AsyncExitStack() as running:
            servers = [StunServer(address, port) for address in addresses or SERVERS]
            for server in servers:
                with inside(self.internet.public.name):
                    await server.start()
                running.push_async_callback(server.stop)
            yield [str(server) for server in servers]

    @contextlib.asynccontextmanager
    async def coturn(self) -> AsyncIterator[list[str]]:
        """The same by a program that others wrote."""
        listens = [word for address in SERVERS for word in ("-L", address)]
        program = await asyncio.create_subprocess_exec(
            *self.internet.public.command(
                "turnserver", "-n", "--no-auth", "--no-tls", "--no-dtls", "--no-cli", "--stun-only",
                "--log-file=stdout", "-p", str(STUN_PORT), *listens,
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )  # fmt: skip
        try:
            await until(self._listens)
            yield [f"{address}:{STUN_PORT}" for address in SERVERS]
        finally:
            program.terminate()
            await program.wait()

    def _listens(self) -> bool:
        sockets = self.internet.public.run("cat", "/proc/net/udp")
        return all(f"{_as_the_kernel_writes(address)}:{STUN_PORT:04X} " in sockets for address in SERVERS)

    def servers(self, kind: str) -> AbstractAsyncContextManager[list[str]]:
        return self.coturn() if kind == "coturn" else self.responder()

    def stop(self) -> None:
        for agent in self._agents:
            agent.stop()


def _as_the_kernel_writes(address: str) -> str:
    return "".join(f"{int(part):02X}" for part in reversed(address.split(".")))


@pytest.fixture
def run_world(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs a test in a world of its own; `host` is the control plane's address, `mesh` the network it gives away."""
    if reason := why_not("nft", "wg", "ping", "turnserver", "setpriv", routers=True):
        pytest.skip(reason)
    internet = Internet()

    async def main(test: Callable[[World], Awaitable[None]], host: str = SERVERS[0], mesh: str = DEFAULT_MESH) -> None:
        plane = LabControlPlane(host=host, port=8080, mesh_cidr=mesh)
        world = World(internet, plane, tmp_path)
        with inside(internet.public.name):
            await plane.start()
        try:
            await test(world)
        finally:
            await asyncio.to_thread(world.stop)
            await plane.stop()

    try:
        yield lambda test, **plane: asyncio.run(main(test, **plane))
    finally:
        internet.remove()


__all__ = ["Host", "World"]
