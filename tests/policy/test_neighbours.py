"""Firewalls of others on the same host: they stay as they are to the byte, and the host's own traffic with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from plexd.lab.namespaces import Namespace
from plexd.lab.nodes import NodeProcess
from tests.namespaces import marks
from tests.policy.conftest import Mesh, allow, eventually

pytestmark = marks("nft", seconds=240)

DOCKER = """
table ip nat {
  chain DOCKER { }
  chain PREROUTING {
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local jump DOCKER
  }
  chain POSTROUTING {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 172.17.0.0/16 oifname != "docker0" masquerade
  }
}
table ip filter {
  chain DOCKER { }
  chain DOCKER-USER {
    return
  }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    jump DOCKER-USER
    oifname "docker0" ct state related,established accept
    oifname "docker0" jump DOCKER
    iifname "docker0" accept
  }
}
"""
UFW = """
table ip filter {
  chain ufw-user-input {
    tcp dport 22 accept
    udp dport 51820 accept
  }
  chain INPUT {
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state related,established accept
    ip protocol icmp accept
    iifname "plx*" accept
    jump ufw-user-input
  }
}
table ip6 filter {
  chain INPUT {
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    meta l4proto ipv6-icmp accept
  }
}
"""
FIREWALLD = """
table inet firewalld {
  flags owner
  chain filter_INPUT_ZONES {
    udp dport 51820 accept
    meta l4proto { icmp, ipv6-icmp } accept
    iifname "plx*" accept
  }
  chain filter_INPUT {
    type filter hook input priority filter + 10; policy accept;
    ct state { established, related } accept
    iifname "lo" accept
    ct state invalid drop
    jump filter_INPUT_ZONES
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state invalid drop
  }
}
"""
NEIGHBOURS = {"docker": DOCKER, "ufw": UFW, "firewalld": FIREWALLD}


class Neighbour:
    """Its ruleset in a namespace. A table with an owner lasts as long as the program that made it."""

    def __init__(self, namespace: Namespace, ruleset: str, directory: Path) -> None:
        file = directory / "neighbour.nft"
        file.write_text(ruleset)
        self._program = subprocess.Popen(
            namespace.command("nft", "-i"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert self._program.stdin is not None
        self._program.stdin.write(f'include "{file}"\n')
        self._program.stdin.flush()
        last = _tables(ruleset)[-1]
        eventually(lambda: last in namespace.run("nft", "list", "tables"))

    def end(self) -> None:
        self._program.kill()
        self._program.communicate()


def _tables(ruleset: str) -> list[str]:
    return [line.removesuffix(" {") for line in ruleset.splitlines() if line.startswith("table ")]


def others(node: NodeProcess, ruleset: str) -> str:
    """What nft tells of the neighbour's tables."""
    return "".join(node.namespace.run("nft", "-s", "list", *table.split()) for table in _tables(ruleset))


@pytest.fixture
def neighbours() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("ruleset", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("comes", ["before", "after"])
def test_neighbour_is_the_same_to_the_byte_whatever_plexd_does(
    prepared: Mesh, neighbours: ExitStack, tmp_path: Path, ruleset: str, comes: str
) -> None:
    mesh = prepared
    if comes == "after":
        mesh.start()
    neighbour = Neighbour(mesh.one.namespace, ruleset, tmp_path)
    neighbours.callback(neighbour.end)
    before = others(mesh.one, ruleset)
    if comes == "before":
        mesh.start()

    for policy in (allow("*", "*"), allow("10.100.0.0/16", "10.100.0.0/16", 80, "tcp"), allow("*", "*")):
        mesh.set_policies(policy)
        eventually(lambda: mesh.peers_of(mesh.one) == 1)
    eventually(lambda: mesh.ping(mesh.two, mesh.addresses["node-1"]))
    assert others(mesh.one, ruleset) == before

    mesh.one.namespace.run("nft", "delete", "table", "inet", "plexd")
    eventually(lambda: mesh.one.namespace.run("nft", "list", "table", "inet", "plexd"))
    assert others(mesh.one, ruleset) == before

    mesh.one.kill()
    mesh.one.start()
    eventually(lambda: mesh.told(mesh.one, "status"))
    assert others(mesh.one, ruleset) == before

    mesh.one.kill()
    subprocess.run(
        mesh.one.namespace.command(
            sys.executable, "-m", "plexd", "down", "--config", str(mesh.one.directory / "config.yaml")
        ),
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert others(mesh.one, ruleset) == before
    assert "inet plexd" not in mesh.one.namespace.run("nft", "list", "tables")


def test_traffic_of_the_host_itself_is_never_affected(mesh: Mesh) -> None:
    """Under default deny, and while the table is replaced over and over: not one ping over the underlay is lost."""
    underlay = mesh.network.address(2)
    number = 0
    with subprocess.Popen(
        mesh.one.namespace.command("ping", "-n", "-i", "0.01", "-c", "300", underlay), stdout=subprocess.PIPE, text=True
    ) as pinging:
        while pinging.poll() is None:
            number += 1
            mesh.set_policies(allow("*", "*", number, "tcp"))
            if number % 10 == 0:
                mesh.one.namespace.run("nft", "flush", "ruleset")
        assert "300 received" in pinging.communicate()[0]
