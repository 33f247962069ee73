"""Traffic while policies change: what is denied never passes, what is allowed never stops."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from plexd.lab.nodes import NodeProcess
from plexd.linux.firewall import FirewallTable
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.firewall import TABLE, Ruleset, Settings, ruleset
from plexd.mesh.policy import Action, Protocol, Rule, Side
from tests.namespaces import inside, marks
from tests.policy.conftest import Mesh, allow, eventually

pytestmark = marks("nft", seconds=240)

REPLACEMENTS = 100
AMENDMENTS = 5000  # several in the time between two packets
ALLOWED, DENIED = 7001, 7002
MORE = (7101, 7102, 7103)  # with these the rules are elements, and the table is amended
# both end on TERM and say how many it were; the listener takes what has come by then
LISTEN = """
import signal, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
sock.bind(("", int(sys.argv[1])))
signal.signal(signal.SIGTERM, lambda *_: sock.setblocking(False))
print("listening", flush=True)
received = 0
try:
    while sock.recv(64):
        received += 1
except BlockingIOError:
    print(received)
"""
SEND = """
import signal, socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
print("sending", flush=True)
sent = 0
while not ended:
    for port in sys.argv[2:]:
        try:
            sock.sendto(str(sent).encode(), (sys.argv[1], int(port)))
        except OSError:
            pass  # the output chain has dropped it: that is the point
    sent += 1
    time.sleep(0.001)
print(sent)
"""


def policies(own: str, peer: str, number: int, interface: str, always: tuple[int, ...]) -> Ruleset:
    """What is allowed always, and something else each time."""
    src, dst = (Side(Prefix.host(parse_ip(address))) for address in (peer, own))
    ports = enumerate((*always, 8000 + number))
    rules = [Rule("test", n, src, dst, Protocol.UDP, port, Action.ALLOW) for n, port in ports]
    return ruleset(Settings(parse_ip(own), (interface,)), rules, visible=[parse_ip(peer)])


Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run_in() -> Iterator[Run]:
    """Starts Python in a node's namespace; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(node: NodeProcess, *arguments: str) -> subprocess.Popen[str]:
        command = node.namespace.command(sys.executable, *arguments)
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        with process:
            process.kill()


def overflowed(node: NodeProcess) -> int:
    """Packets that found a queue full: the way to WireGuard's program, or its socket, on a busy machine."""
    sockets = node.namespace.run("cat", "/proc/net/udp").splitlines()[1:]
    queue = node.namespace.run("cat", f"/sys/class/net/{node.interface}/statistics/tx_dropped")
    return int(queue) + sum(int(line.split()[-1]) for line in sockets)


def first_word(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def last_count(process: subprocess.Popen[str]) -> int:
    process.terminate()
    return int(process.communicate()[0].split()[-1])


@pytest.mark.parametrize(("more", "times"), [((), REPLACEMENTS), (MORE, AMENDMENTS)], ids=["replaced", "amended"])
def test_nothing_leaks_and_nothing_stops_while_policies_are_replaced_100_times(
    mesh: Mesh, run_in: Run, more: tuple[int, ...], times: int
) -> None:
    """On the receiving node alone: the sender, whose agent is gone, lets everything out."""
    own, peer = mesh.addresses["node-2"], mesh.addresses["node-1"]
    mesh.set_policies(allow("*", "*"))
    eventually(lambda: mesh.ping(mesh.one, own))
    for node in (mesh.one, mesh.two):
        node.kill()
    mesh.one.namespace.run("nft", "delete", "table", "inet", "plexd")

    async def replace(count: int) -> None:
        table = FirewallTable(TABLE)
        for number in range(count):
            await table.replace(policies(own, peer, number, mesh.two.interface, (ALLOWED, *more)))
        await table.close()

    with inside(mesh.two.namespace.name):
        asyncio.run(replace(1))
        listeners = {port: run_in(mesh.two, "-c", LISTEN, str(port)) for port in (ALLOWED, DENIED)}
        for listener in listeners.values():
            assert first_word(listener) == "listening"
        overflowed_before = overflowed(mesh.one) + overflowed(mesh.two)
        sender = run_in(mesh.one, "-c", SEND, own, str(ALLOWED), str(DENIED))
        assert first_word(sender) == "sending"
        asyncio.run(replace(times))
    sent = last_count(sender)
    last = eventually(lambda: mesh.two.namespace.run("nft", "list", "table", "inet", "plexd"))
    assert f"{'. ' if more else 'proto-dst '}{8000 + times - 1} " in last
    received = {port: last_count(listener) for port, listener in listeners.items()}
    assert sent > REPLACEMENTS
    assert received[DENIED] == 0
    lost = overflowed(mesh.one) + overflowed(mesh.two) - overflowed_before
    sent -= lost // 2  # the others were for the port that is denied
    assert received[ALLOWED] >= sent - 20  # what was on its way when the listener ended


@pytest.mark.parametrize("more", [(), MORE], ids=["replaced", "amended"])
def test_withdrawn_rule_ends_an_open_connection_at_once_and_answers_need_no_rule(
    mesh: Mesh, run_in: Run, more: tuple[int, ...]
) -> None:
    own = mesh.addresses["node-2"]

    def allowing(*ports: int) -> list[dict[str, Any]]:
        return [allow(mesh.ids["node-1"], mesh.ids["node-2"], port, "tcp") for port in ports]

    mesh.set_policies(*allowing(*more, 7003))
    eventually(lambda: mesh.peers_of(mesh.one) == mesh.peers_of(mesh.two) == 1)
    answering = run_in(mesh.two, "-m", "plexd.lab.conversation", "answer", "7003")
    assert first_word(answering) == "listening"

    def talk() -> subprocess.Popen[str] | None:
        process = run_in(mesh.one, "-m", "plexd.lab.conversation", "talk", own, "7003")
        return process if first_word(process) == "connected" else None

    talking = eventually(talk)
    assert talking is not None
    mesh.set_policies(allow(mesh.ids["node-1"], mesh.ids["node-2"], 7004, "tcp"))  # the peers stay visible
    assert first_word(talking).startswith("silent after ")
