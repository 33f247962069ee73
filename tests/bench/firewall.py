"""How long many policy rules take to be in the kernel, and what they cost the traffic through the tunnel.

The tunnel is a real `wireguard-go` between two namespaces, the rules are in one of them, and the one that lets the
traffic in is the last. `ip netns exec NAME python -m tests.bench.firewall` prints what `measure` reads of loading.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from plexd import log
from plexd.lab.namespaces import Namespace, run
from plexd.linux.nftables import Nftables
from plexd.mesh.address import format_ip, parse_ip
from plexd.mesh.desired import Peer, Policy, PolicyRule
from plexd.mesh.firewall import TABLE, Settings
from plexd.mesh.nft_commands import Json
from plexd.mesh.policy import Local, resolve
from tests.bench.figure import Figure
from tests.mesh.rendering import render
from tests.tunnel.harness import Member, Network, cable, members

NAME = "plexd-bench-fw"
ROUNDS = 5
LOADED = (100, 1000, 10_000)
FEW, MANY = 10, 10_000
SECONDS = 3  # of each transfer
PORT = 5201

OWN, OTHER = "10.100.0.1", "10.100.0.2"
LOCAL = Local("n_self", parse_ip(OWN))
NOBODY: dict[str, Peer] = {}


def measure() -> list[Figure]:
    return [*_measure_loading(), *_measure_throughput()]


def _policies(count: int) -> tuple[Policy, ...]:
    """Of the kinds that fleets have: hosts to ports, networks to ports, a few taken out; the last lets `OTHER` in."""

    def rules() -> Iterator[PolicyRule]:
        for number in range(count - 1):
            host = format_ip(bytes([10, 101 + (number >> 16), number >> 8 & 255, number & 255]))
            yield (
                PolicyRule(host, "n_self", 22 + number % 7, "tcp", "deny"),
                PolicyRule(host, "n_self", 0, "", "allow"),
                PolicyRule(f"{host}/24", "n_self", 8000 + number % 1000, "tcp", "allow"),
                PolicyRule("n_self", host, 443, "", "allow"),
            )[number % 4]
        yield PolicyRule(OTHER, OWN, PORT, "tcp", "allow")

    return (Policy("bench", tuple(rules())),)


def _document(count: int, interface: str) -> Json:
    return render(Settings(LOCAL.mesh_ip, (interface,)), resolve(_policies(count), LOCAL, NOBODY).rules)


# --- loading --------------------------------------------------------------------------------------------------------


def _measure_loading() -> list[Figure]:
    namespace = Namespace(f"{NAME}-load")
    run("ip", "netns", "add", namespace.name)
    try:
        command = namespace.command(sys.executable, "-m", "tests.bench.firewall")
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        run("ip", "netns", "delete", namespace.name)
    seconds: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return [
        Figure(f"{count} policy rules {step}, median of {ROUNDS}", statistics.median(values) * 1000, "ms")
        for key, values in seconds.items()
        for count, step in (key.split(maxsplit=1),)
    ]


async def _load() -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    door = Nftables(TABLE)
    try:
        for count in LOADED:
            for _ in range(ROUNDS):
                began = time.perf_counter()
                document = _document(count, "plexd0")
                rendered = time.perf_counter()
                await door.apply(document)
                applied = time.perf_counter()
                await door.close()  # what follows the change must not be in the next one's time
                seconds.setdefault(f"{count} read and rendered", []).append(rendered - began)
                seconds.setdefault(f"{count} put into the kernel", []).append(applied - rendered)
    finally:
        await door.close()
    return seconds


# --- throughput -----------------------------------------------------------------------------------------------------


def _measure_throughput() -> list[Figure]:
    log.set_up("error", "console")
    network = Network(NAME)
    try:
        here, there = network.namespace(), network.namespace()
        cable(here, there, "eth0", (0, 1))
        near = Member(here, "plexdbench2", OWN, "192.0.0.1:51820")
        far = Member(there, "plexdbench3", OTHER, "192.0.0.2:51820")
        rates: dict[int, list[float]] = {FEW: [], MANY: []}
        documents = {count: json.dumps(_document(count, near.interface)) for count in rates}
        with members(near, far):
            for _ in range(ROUNDS):
                for count, values in rates.items():
                    nft = here.command("nft", "-j", "-f", "-")
                    subprocess.run(nft, input=documents[count], text=True, check=True)
                    values.append(_transfer(here, there))
    finally:
        network.remove()
    few, many = (statistics.median(rates[count]) for count in (FEW, MANY))
    return [
        Figure(f"throughput of the tunnel with {FEW} policy rules, median of {ROUNDS}", few, "Mbit/s"),
        Figure(f"throughput of the tunnel with {MANY} policy rules, median of {ROUNDS}", many, "Mbit/s"),
        Figure(f"throughput with {MANY} policy rules, of that with {FEW}", many / few, "x", 0.9, at_least=True),
    ]


def _transfer(server: Namespace, client: Namespace) -> float:
    """Mbit/s that arrive in one transfer into the mesh address of `server`."""
    listen = server.command("iperf3", "--server", "--one-off", "--bind", OWN, "--port", str(PORT), "--json")
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listening:
        try:
            _wait_for_listener(server)
            send = client.command("iperf3", "--client", OWN, "--port", str(PORT), "--time", str(SECONDS), "--json")
            subprocess.run(send, check=True, capture_output=True, timeout=10 * SECONDS)
            told = json.loads(listening.communicate(timeout=10 * SECONDS)[0])
        finally:
            listening.kill()
    return float(told["end"]["sum_received"]["bits_per_second"]) / 1e6


def _wait_for_listener(namespace: Namespace) -> None:
    deadline = time.monotonic() + 10
    while not namespace.run("ss", "-Hltn", f"sport = :{PORT}"):
        if time.monotonic() > deadline:
            raise RuntimeError("iperf3 does not listen")
        time.sleep(0.02)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_load())))
