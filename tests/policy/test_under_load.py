"""Traffic while policies change: what is denied never passes, what is allowed never stops."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plexd.lab.nodes import NodeProcess
from plexd.linux.firewall import FirewallTable
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.firewall import Ruleset, Settings, ruleset
from plexd.mesh.policy import Action, Protocol, Rule, Side
from tests.namespaces import inside
from tests.policy.conftest import Mesh, allow, eventually

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="wireguard-go needs /dev/net/tun"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
]

REPLACEMENTS = 100
ALLOWED, DENIED = 7001, 7002
LISTEN = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", int(sys.argv[1])))
print("listening", flush=True)
while True:
    print(sock.recv(64).decode(), flush=True)
"""
SEND = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sent = 0
while True:
    for port in sys.argv[2:]:
        try:
            sock.sendto(str(sent).encode(), (sys.argv[1], int(port)))
        except OSError:
            pass  # the output chain has dropped it: that is the point
    sent += 1
    print(sent, flush=True)
    time.sleep(0.001)
"""


def policies(own: str, peer: str, number: int, interface: str) -> Ruleset:
    """What is allowed always, and something else each time."""
    src, dst = (Side(Prefix.host(parse_ip(address))) for address in (peer, own))
    ports = enumerate((ALLOWED, 8000 + number))
    rules = [Rule("test", n, src, dst, Protocol.UDP, port, Action.ALLOW) for n, port in ports]
    return ruleset(Settings(parse_ip(own), (interface,)), rules, visible=[parse_ip(peer)])


def run_in(node: NodeProcess, program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        node.namespace.command(sys.executable, "-c", program, *arguments), stdout=subprocess.PIPE, text=True
    )


def test_nothing_leaks_and_nothing_stops_while_policies_are_replaced_100_times(mesh: Mesh) -> None:
    """On the receiving node alone: the sender, whose agent is gone, lets everything out."""
    own, peer = mesh.addresses["node-2"], mesh.addresses["node-1"]
    mesh.set_policies(allow("*", "*"))
    eventually(lambda: mesh.ping(mesh.one, own))
    for node in (mesh.one, mesh.two):
        node.kill()
    mesh.one.namespace.run("nft", "delete", "table", "inet", "plexd")

    async def replace(count: int) -> None:
        table = FirewallTable()
        for number in range(count):
            await table.replace(policies(own, peer, number, mesh.two.interface))
        await table.close()

    with inside(mesh.two.namespace.name):
        asyncio.run(replace(1))
        listeners = {port: run_in(mesh.two, LISTEN, str(port)) for port in (ALLOWED, DENIED)}
        for listener in listeners.values():
            assert listener.stdout is not None
            assert listener.stdout.readline().strip() == "listening"
        sender = run_in(mesh.one, SEND, own, str(ALLOWED), str(DENIED))
        asyncio.run(replace(REPLACEMENTS))
    sender.kill()
    sent = int(sender.communicate()[0].split()[-1])
    last = eventually(lambda: mesh.two.namespace.run("nft", "list", "table", "inet", "plexd"))
    assert f"proto-dst {8000 + REPLACEMENTS - 1} " in last
    received = {}
    for port, listener in listeners.items():
        listener.kill()
        received[port] = listener.communicate()[0].split()
    assert sent > REPLACEMENTS
    assert received[DENIED] == []
    assert len(received[ALLOWED]) >= sent - 20  # what was on its way when the listener ended


def test_withdrawn_rule_ends_an_open_connection_at_once_and_answers_need_no_rule(mesh: Mesh) -> None:
    own = mesh.addresses["node-2"]
    mesh.set_policies(allow(mesh.ids["node-1"], mesh.ids["node-2"], 7003, "tcp"))
    eventually(lambda: mesh.peers_of(mesh.one) == mesh.peers_of(mesh.two) == 1)
    command = (sys.executable, "-m", "plexd.lab.conversation")
    answering = subprocess.Popen(
        mesh.two.namespace.command(*command, "answer", "7003"), stdout=subprocess.PIPE, text=True
    )
    assert answering.stdout is not None
    assert answering.stdout.readline().strip() == "listening"

    def talk() -> subprocess.Popen[str] | None:
        process = subprocess.Popen(
            mesh.one.namespace.command(*command, "talk", own, "7003"), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() == "connected":
            return process
        process.communicate()
        return None

    talking = eventually(talk)
    assert talking is not None
    mesh.set_policies(allow(mesh.ids["node-1"], mesh.ids["node-2"], 7004, "tcp"))  # the peers stay visible
    assert talking.stdout is not None
    assert talking.stdout.readline().startswith("silent after ")
    for process in (talking, answering):
        process.kill()
        process.communicate()
