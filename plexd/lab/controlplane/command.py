"""`plexd lab controlplane`: serves until it is interrupted and says on stdout how to join."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plexd.errors import ConfigError, FatalError
from plexd.lab.controlplane.fleet import DEFAULT_MESH
from plexd.lab.controlplane.serving import LabControlPlane

DEFAULT_LISTEN = "127.0.0.1:8443"
DEFAULT_STUN = "127.0.0.1:3478"
DEFAULT_TLS_DIRECTORY = Path("/tmp/plexd-lab-tls")  # noqa: S108 - made with mode 0700, or refused


@dataclass(frozen=True, slots=True)
class Options:
    """`http`: no TLS. `tokens`: these bootstrap tokens instead of one made up and printed. `stun`: HOST:PORT each."""

    listen: str = DEFAULT_LISTEN
    http: bool = False
    tls_directory: Path = DEFAULT_TLS_DIRECTORY
    admin_socket: Path | None = None
    mesh_cidr: str = DEFAULT_MESH
    state_file: Path | None = None
    tokens: Sequence[str] = ()
    stun: Sequence[str] = ()


def main(options: Options) -> int:
    """Runs until SIGINT or SIGTERM; the exit code. What is wrong goes to stderr in one sentence."""
    try:
        asyncio.run(_serve(options))
    except FatalError as exc:
        print(f"plexd lab controlplane: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


async def _serve(options: Options) -> None:
    host, port = _address("--listen", options.listen, DEFAULT_LISTEN)
    plane = LabControlPlane(
        host=host,
        port=port,
        tls_directory=None if options.http else options.tls_directory,
        mesh_cidr=options.mesh_cidr,
        state_file=options.state_file,
        admin_socket=options.admin_socket,
        stun=[_address("--stun", text, DEFAULT_STUN) for text in options.stun],
    )
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    async with plane:
        for token in options.tokens:
            if token not in plane.admin.fleet.snapshot.tokens:  # a used one stays used over a restart
                plane.admin.issue_token(token)
        if not options.tokens:
            print(f"token:   {plane.admin.issue_token()}")
        plane.save()
        print(f"url:     {plane.url}")
        if plane.tls is not None:
            print(f"ca file: {plane.tls.ca_file}")
        if options.admin_socket is not None:
            print(f"admin:   {options.admin_socket}")
        for server in plane.stun_servers:
            print(f"stun:    {server}")
        print("serving until interrupted", flush=True)
        await ended.wait()


def _address(flag: str, text: str, example: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{flag} {text} is no address; give HOST:PORT, for example {example}")
    return host.removeprefix("[").removesuffix("]"), int(port)
