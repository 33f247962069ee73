"""The filter in the kernel that Debian has: the same packets as on the host, and many rules at once."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator

import pytest

from plexd.linux.firewall import FirewallTable
from plexd.linux.nftables import Nftables
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.firewall import TABLE, Ruleset, Settings, ruleset
from plexd.mesh.policy import Action, Protocol, Rule, Side
from plexd.mesh.table_reading import fingerprint
from tests.linux.crossings import cross
from tests.linux.wires import Wires
from tests.mesh.rendering import render


@pytest.fixture
def wires() -> Iterator[Wires]:
    made: list[str] = []

    def make() -> str:
        made.append(f"plexd-wires-{len(made)}")
        subprocess.run(["ip", "netns", "add", made[-1]], check=True)
        subprocess.run(["ip", "-n", made[-1], "link", "set", "lo", "up"], check=True)
        return made[-1]

    # the kernel would do it in the middle of the first transaction, which takes longer in here than nft may
    subprocess.run(["modprobe", "--all", "nft_ct", "nft_limit", "nft_log"], check=True)
    wires = Wires(make)
    yield wires
    wires.close()
    for name in made:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.parametrize("seed", range(5))
def test_kernel_decides_and_counts_as_the_reference_does(wires: Wires, seed: int) -> None:
    cross(wires, seed)


@pytest.mark.usefixtures("namespace")
async def test_thousand_rules_of_many_shapes_read_the_same_again_and_again() -> None:
    own = Side(Prefix.host(parse_ip("10.100.1.1")))
    hosts = (bytes([10, 1, number >> 8, number & 255]) for number in range(1000))
    shapes = itertools.product((24, 31, 32), (Protocol.TCP, Protocol.UDP, Protocol.ICMP, Protocol.ANY), Action)
    rules = [
        Rule("pol", number, Side(Prefix.of(host, length)), own, protocol, 0 if number % 2 else 22, action)
        for number, (host, (length, protocol, action)) in enumerate(zip(hosts, itertools.cycle(shapes), strict=False))
        if protocol is not Protocol.ICMP or number % 2
    ]
    door = Nftables(TABLE)
    seen = set()
    try:
        for _ in range(2):
            await door.apply(render(Settings(parse_ip("10.100.1.1"), ("plexd0",)), rules))
            table = await door.read_table()
            assert table is not None
            seen.add(fingerprint(table))
    finally:
        await door.close()
    assert len(seen) == 1


@pytest.mark.usefixtures("namespace")
async def test_table_amended_is_the_table_loaded_anew() -> None:
    own = Side(Prefix.host(parse_ip("10.100.1.1")))

    def wanted(number: int) -> Ruleset:
        hosts = [bytes([10, 100, 1, last]) for last in range(2, 8 + number)]
        protocols = ((Protocol.TCP, 22 + number), (Protocol.ICMP, 0), (Protocol.ANY, 0))
        rules = [
            Rule("pol", index, Side(Prefix.host(host)), own, protocol, port, Action.ALLOW)
            for index, (host, (protocol, port)) in enumerate(itertools.product(hosts, protocols))
        ]
        return ruleset(Settings(parse_ip("10.100.1.1"), ("plexd0",)), rules, visible=hosts)

    table, door = FirewallTable(TABLE), Nftables(TABLE)
    for number in range(4):
        await table.replace(wanted(number))
        assert await table.observe() == wanted(number).digest
    assert table.reads == 1  # the others were amendments
    amended = await door.read_table()
    await door.apply(wanted(3).document())
    whole = await door.read_table()
    assert amended is not None
    assert whole is not None
    assert fingerprint(amended) == fingerprint(whole)
    await table.close()
    await door.close()
