"""The control plane answers STUN beside its own work, in process and as a command."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys

import pytest

from plexd.errors import ConfigError
from plexd.lab.controlplane import LabControlPlane
from plexd.mesh.address import Endpoint, parse_ip
from plexd.wire.stun import binding_request, read_answer

TRANSACTION = bytes(range(12))


def ask(host: str, port: int) -> tuple[Endpoint | None, int]:
    """What the server sees, and from which port it was asked."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((host, port))
        sock.send(b"noise that is passed over")
        sock.send(binding_request(TRANSACTION))
        return read_answer(sock.recv(2048), TRANSACTION), sock.getsockname()[1]


async def test_control_plane_answers_on_every_address_it_was_given() -> None:
    async with LabControlPlane(stun=[("127.0.0.1", 0), ("127.0.0.2", 0), ("::1", 0)]) as plane:
        for server in plane.stun_servers:
            seen, own_port = await asyncio.to_thread(ask, server.host, server.port)
            own = "::1" if server.host == "::1" else "127.0.0.1"
            # on the loopback network the answering address is also the asking one
            assert seen in {Endpoint(parse_ip(own), own_port), Endpoint(parse_ip(server.host), own_port)}
        assert str(plane.stun_servers[2]) == f"[::1]:{plane.stun_servers[2].port}"
        again = plane.stun_servers[0]
    async with LabControlPlane(stun=[("127.0.0.1", again.port)]):  # the port is free again
        pass


async def test_address_that_is_taken_is_said_and_nothing_keeps_listening() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", 0))
        plane = LabControlPlane(stun=[("127.0.0.1", holder.getsockname()[1])])
        with pytest.raises(ConfigError, match=r"cannot answer STUN on 127\.0\.0\.1:"):
            async with plane:
                pass
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", int(plane.url.rpartition(":")[2]))


def test_command_says_where_it_answers() -> None:
    command = [sys.executable, "-m", "plexd", "lab", "controlplane", "--http", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--stun", "127.0.0.1:0", "--stun", "127.0.0.2:0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        servers = []
        for line in process.stdout:
            if line.startswith("stun:"):
                servers.append(line.split()[1])
            if line.startswith("serving"):
                break
        assert [server.partition(":")[0] for server in servers] == ["127.0.0.1", "127.0.0.2"]
        for server in servers:
            host, _, port = server.partition(":")
            seen, own_port = ask(host, int(port))
            assert seen is not None
            assert seen.port == own_port
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 0


def test_address_that_is_none_is_refused_with_an_example() -> None:
    command = [sys.executable, "-m", "plexd", "lab", "controlplane", "--http", "--listen", "127.0.0.1:0", "--stun", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == ConfigError.exit_code
    assert "--stun x is no address; give HOST:PORT, for example 127.0.0.1:3478" in done.stderr
