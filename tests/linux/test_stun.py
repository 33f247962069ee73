"""Real sockets: the ordinary one against servers of all kinds, the raw one beside a holder of the port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from plexd.errors import NotPermitted, StunError, Unresolved
from plexd.lab.stun import StunServer
from plexd.linux.lookup import look_up
from plexd.linux.network import host_addresses, local_addresses
from plexd.linux.stun import PlainChannel, RawChannel, StunClient
from plexd.mesh.address import Endpoint, format_ip, parse_ip
from plexd.wire import stun

LOOPBACK = parse_ip("127.0.0.1")
LOOPBACK6 = parse_ip("::1")
PORT = 51820


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server(asyncio.DatagramProtocol):
    """Answers the n-th request (from 1) with `answers(n, transaction)`, datagram by datagram; notes when they came."""

    def __init__(self, answers: Callable[[int, bytes], list[bytes]]) -> None:
        self._answers = answers
        self.came: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, source: tuple[Any, ...]) -> None:
        transaction = stun.read_request(data)
        assert transaction is not None
        self.came.append((asyncio.get_running_loop().time(), transaction))
        for answer in self._answers(len(self.came), transaction):
            self._transport.sendto(answer, source)


SEEN = Endpoint(parse_ip("198.51.100.7"), 40000)


def good(transaction: bytes) -> bytes:
    return stun.binding_answer(transaction, SEEN)


def ask(answers: Callable[[int, bytes], list[bytes]], timeout: float = 5.0) -> tuple[Endpoint | StunError, Server]:
    async def main() -> tuple[Endpoint | StunError, Server]:
        server = Server(answers)
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: server, local_addr=("127.0.0.1", 0)
        )
        at = Endpoint(LOOPBACK, transport.get_extra_info("sockname")[1])
        try:
            return await StunClient(free_port(), PlainChannel).ask(at, timeout), server
        except StunError as exc:
            return exc, server
        finally:
            transport.close()

    return asyncio.run(main())


def test_request_is_repeated_on_schedule_with_the_same_transaction() -> None:
    result, server = ask(lambda number, transaction: [good(transaction)] if number == 4 else [])
    assert result == SEEN
    times = [at - server.came[0][0] for at, _ in server.came]
    assert times == pytest.approx([0.0, 0.5, 1.5, 3.5], abs=0.2)
    assert len({transaction for _, transaction in server.came}) == 1


def test_server_fails_when_its_time_is_over() -> None:
    result, server = ask(lambda _number, _transaction: [], timeout=1.0)
    assert str(result) == "no answer within 1 s"
    assert len(server.came) == 2


@pytest.mark.parametrize(
    "before",
    [b"", b"not STUN at all, but long enough for a header", stun.binding_answer(bytes(12), SEEN)],
    ids=["empty", "noise", "another transaction"],
)
def test_what_is_no_answer_is_passed_over(before: bytes) -> None:
    assert ask(lambda _, transaction: [before, good(transaction)])[0] == SEEN


def test_error_answer_ends_the_wait_at_once() -> None:
    result, server = ask(lambda _, transaction: [b"\x01\x11\x00\x00" + good(transaction)[4:20]])
    assert str(result) == "the server answered with an error"
    assert len(server.came) == 1


async def test_datagram_of_somebody_else_is_not_received() -> None:
    port = free_port()
    with PlainChannel(port, Endpoint(LOOPBACK, free_port())) as channel:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(good(bytes(12)), ("127.0.0.1", port))
        with pytest.raises(BlockingIOError):
            channel.sock.recv(100)


async def test_server_that_is_down_fails_without_a_wait() -> None:
    with pytest.raises(StunError, match="refused"):
        async with asyncio.timeout(1):
            await StunClient(free_port(), PlainChannel).ask(Endpoint(LOOPBACK, free_port()), 5.0)


def test_port_that_is_held_cannot_be_asked_from_by_an_ordinary_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        client = StunClient(holder.getsockname()[1], PlainChannel)
        with pytest.raises(StunError, match="in use"):
            asyncio.run(client.ask(Endpoint(LOOPBACK, 9), 1.0))


async def test_the_labs_server_keeps_its_port_over_a_break() -> None:
    client = StunClient(free_port(), PlainChannel)
    async with StunServer("127.0.0.1", 0) as server:
        at = Endpoint(LOOPBACK, server.port)
        assert (await client.ask(at, 5.0)).packed == LOOPBACK
        await server.stop()
        with pytest.raises(StunError):
            await client.ask(at, 0.1)
        await server.start()
        assert (await client.ask(at, 5.0)).packed == LOOPBACK


def test_name_that_does_not_exist_is_unresolved() -> None:
    with pytest.raises(Unresolved, match=r"^nowhere\.invalid does not resolve: "):
        asyncio.run(look_up("nowhere.invalid"))


# the raw socket


@contextlib.contextmanager
def held(port: int) -> Iterator[None]:
    """Both families' sockets of a WireGuard, as far as the port is concerned."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ipv4,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ipv6,
    ):
        ipv4.bind(("", port))
        ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        ipv6.bind(("", port))
        yield


@pytest.mark.namespaces
@pytest.mark.usefixtures("namespace")
@pytest.mark.parametrize("loopback", [LOOPBACK, LOOPBACK6], ids=["IPv4", "IPv6"])
async def test_held_port_is_asked_from_by_a_raw_socket(loopback: bytes) -> None:
    async with StunServer(format_ip(loopback), 3478):
        with held(PORT):
            assert await StunClient(PORT).ask(Endpoint(loopback, 3478), 1.0) == Endpoint(loopback, PORT)


@pytest.mark.namespaces
@pytest.mark.usefixtures("namespace")
@pytest.mark.parametrize("loopback", [LOOPBACK, LOOPBACK6], ids=["IPv4", "IPv6"])
def test_raw_socket_receives_answers_and_nothing_else(loopback: bytes) -> None:
    """The filter stands in the kernel: of a busy WireGuard's traffic nothing wakes the agent."""
    family = socket.AF_INET if loopback is LOOPBACK else socket.AF_INET6
    text = format_ip(loopback)
    answer = good(bytes(12))
    with (
        held(PORT),
        RawChannel(PORT, Endpoint(loopback, 3478)) as channel,
        socket.socket(family, socket.SOCK_DGRAM) as server,
        socket.socket(family, socket.SOCK_DGRAM) as stranger,
        socket.socket(family, socket.SOCK_DGRAM) as other,
    ):
        server.bind((text, 3478))
        other.bind((text, 51821))
        server.sendto(b"\x04\x00\x00\x00" + bytes(28), (text, PORT))  # a packet of WireGuard
        server.sendto(b"", (text, PORT))
        server.sendto(answer, (text, 51821))
        with pytest.raises(BlockingIOError):
            channel.sock.recv(2048)
        stranger.sendto(answer, (text, PORT))  # passes the filter, but comes from another port
        data, source = channel.sock.recvfrom(2048)
        assert channel.payload(data, source[0]) is None
        server.sendto(answer + b"and more", (text, PORT))
        data, source = channel.sock.recvfrom(2048)
        assert channel.payload(data, source[0]) == answer + b"and more"
        assert channel.payload(data, "192.0.2.9") is None
        assert channel.payload(data[:30], source[0]) != answer


@pytest.mark.namespaces
@pytest.mark.usefixtures("namespace")
def test_host_without_a_way_to_the_server_says_so() -> None:
    with pytest.raises(StunError, match="unreachable"):
        asyncio.run(StunClient(PORT).ask(Endpoint(parse_ip("203.0.113.1"), 3478), 1.0))


@pytest.mark.namespaces
def test_addresses_of_every_link_are_local(namespace: str) -> None:
    del namespace
    subprocess.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"], check=True)
    subprocess.run(["ip", "address", "add", "192.0.2.1/32", "peer", "192.0.2.2/32", "dev", "v0"], check=True)
    subprocess.run(["ip", "address", "add", "2001:db8::1/64", "dev", "v1", "nodad"], check=True)
    found = asyncio.run(local_addresses())
    assert {format_ip(packed) for packed in found} == {"127.0.0.1", "::1", "192.0.2.1", "2001:db8::1"}


@pytest.mark.namespaces
@pytest.mark.usefixtures("namespace")
def test_addresses_that_reach_beyond_their_link_are_the_hosts() -> None:
    for one, other in (("v0", "v1"), ("plexd0", "v2")):
        subprocess.run(["ip", "link", "add", one, "type", "veth", "peer", "name", other], check=True)
        subprocess.run(["ip", "link", "set", one, "up"], check=True)  # which gives it fe80::
    for address, link in (("192.0.2.1/24", "v0"), ("2001:db8::1/64", "v1"), ("10.100.0.1/32", "plexd0")):
        subprocess.run(["ip", "address", "add", address, "dev", link], check=True)
    subprocess.run(["ip", "address", "add", "169.254.7.7/16", "dev", "v0", "scope", "link"], check=True)
    found = asyncio.run(host_addresses(["plexd0"]))
    assert {format_ip(packed) for packed in found} == {"192.0.2.1", "2001:db8::1"}


@pytest.mark.namespaces
@pytest.mark.usefixtures("namespace")
def test_missing_capability_is_an_error_of_its_own() -> None:
    program = (
        "import asyncio\n"
        "from plexd.errors import NotPermitted\n"
        "from plexd.linux.stun import StunClient\n"
        "from plexd.mesh.address import Endpoint\n"
        "try: asyncio.run(StunClient(51820).ask(Endpoint(bytes((127, 0, 0, 1)), 3478), 1.0))\n"
        "except NotPermitted as exc: print(exc)\n"
    )
    command = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout == f"{NotPermitted('no permission for a raw socket: run as root or grant CAP_NET_RAW')}\n"
