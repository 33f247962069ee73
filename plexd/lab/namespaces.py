"""A small network made of namespaces: a hub with a bridge, and one namespace a node, on one link or behind a NAT.

The host's own network is never touched. Everything carries the name of the lab, so that a later start finds and
removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from plexd.errors import PlexdError

UAPI_SOCKETS = Path("/var/run/wireguard")  # shared by all namespaces: names there must be unique
_STOP_SECONDS = 10.0


class LabError(PlexdError):
    """The lab could not do a step; the message says which and why."""


def run(*command: str) -> str:
    """Run a program to its end and return what it printed. Raises LabError with its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError as exc:
        raise LabError(
            f"{command[0]} is not installed: apt-get install iproute2 iputils-ping nftables wireguard-tools"
        ) from exc
    except subprocess.TimeoutExpired as exc:
        raise LabError(f"{' '.join(command)}: no end after 30 s") from exc
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


class Nat(StrEnum):
    """What stands between a node and the others.

    FULL_CONE keeps the port, whatever the destination; SYMMETRIC takes another for every destination. Both let in only
    what answers something that went out.
    """

    NONE = "none"
    FULL_CONE = "full-cone"
    SYMMETRIC = "symmetric"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace by name."""

    name: str

    def command(self, *command: str) -> list[str]:
        """The words that run `command` inside."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str) -> str:
        return run(*self.command(*command))

    def pids(self) -> list[int]:
        """Processes that live in it."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.name).split()]


class Network:
    """The hub and its nodes. `address(0)` is the hub, `address(n)` the n-th node or its NAT, all in 192.0.2.0/24.

    With `ipv6` they are in 2001:db8::/64 and know no IPv4; there are no NATs then.
    Behind a symmetric NAT nobody can be reached who does not know where the other is: there the first node has none.
    """

    MAX_NODES = 200
    STUN_ADDRESSES = ("192.0.2.1", "192.0.2.254")  # both the hub's

    def __init__(self, lab: str, nat: Nat = Nat.NONE, *, ipv6: bool = False) -> None:
        self.nat = nat
        self.ipv6 = ipv6
        self.hub = Namespace(f"{lab}-hub")
        self._lab = lab

    def node(self, number: int) -> Namespace:
        return Namespace(f"{self._lab}-n{number}")

    def address(self, number: int) -> str:
        return f"2001:db8::{number + 1:x}" if self.ipv6 else f"192.0.2.{number + 1}"

    def _on_link(self, number: int) -> str:
        return f"{self.address(number)}/{64 if self.ipv6 else 24}"

    def namespaces(self) -> list[Namespace]:
        """Those of this lab that exist."""
        names = (line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.strip())
        return [Namespace(name) for name in names if name.startswith(f"{self._lab}-")]

    def is_behind_nat(self, number: int) -> bool:
        return self.nat is Nat.FULL_CONE or (self.nat is Nat.SYMMETRIC and number > 1)

    def build(self, nodes: int) -> None:
        run("ip", "netns", "add", self.hub.name)
        self.hub.run("ip", "link", "set", "lo", "up")
        self.hub.run("ip", "link", "add", "br0", "type", "bridge")
        self.hub.run(*add_address(self._on_link(0), "br0"))
        if self.nat is not Nat.NONE:
            self.hub.run("ip", "address", "add", f"{self.STUN_ADDRESSES[1]}/24", "dev", "br0")
        self.hub.run("ip", "link", "set", "br0", "up")
        for number in range(1, nodes + 1):
            self.add_node(number)

    def add_node(self, number: int) -> None:
        """The n-th node with its cable to the hub; `build` does it for all."""
        node, port = self.node(number), f"n{number}"
        run("ip", "netns", "add", node.name)
        node.run("ip", "link", "set", "lo", "up")
        if not self.is_behind_nat(number):
            connect(self.hub, port, node, "eth0", self._on_link(number), self.address(0))
        else:
            gateway = Namespace(f"{self._lab}-g{number}")
            run("ip", "netns", "add", gateway.name)
            connect(self.hub, port, gateway, "wan", self._on_link(number), self.address(0))
            connect(gateway, "lan", node, "eth0", "192.168.1.2/24", "192.168.1.1")
            gateway.run("ip", "address", "add", "192.168.1.1/24", "dev", "lan")
            translate(gateway, "masquerade random" if self.nat is Nat.SYMMETRIC else "masquerade")
        self.hub.run("ip", "link", "set", port, "master", "br0")

    def remove(self) -> None:
        """End every process of the lab's namespaces and delete them; absent is fine."""
        namespaces = self.namespaces()
        # an agent that is stopped may have started one more program meanwhile
        while pids := [pid for namespace in namespaces for pid in namespace.pids()]:
            stop_processes(pids)
        for namespace in namespaces:
            run("ip", "netns", "delete", namespace.name)


def connect(near: Namespace, near_link: str, far: Namespace, far_link: str, address: str, router: str) -> None:
    """A cable from `near` to `far`, which gets the address and sends what is not for its own network to `router`."""
    near.run("ip", "link", "add", near_link, "type", "veth", "peer", "name", far_link, "netns", far.name)
    near.run("ip", "link", "set", near_link, "up")
    far.run(*add_address(address, far_link))
    far.run("ip", "link", "set", far_link, "up")
    far.run("ip", "route", "add", "default", "via", router)


def add_address(address: str, link: str) -> list[str]:
    """The words that do it; IPv6 would wait a second for somebody to object."""
    return ["ip", "address", "add", address, "dev", link, *(["nodad"] if ":" in address else [])]


def translate(gateway: Namespace, statement: str) -> None:
    """Have `gateway` forward, and translate what leaves through its link `wan` by a statement of nft; may be repeated.

    What comes in unasked is dropped before it becomes a connection, which would take the port from the node's own.
    """
    gateway.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    gateway.run(
        "nft",
        "add table ip gateway; delete table ip gateway; table ip gateway {"
        f' chain out {{ type nat hook postrouting priority srcnat; oifname "wan" {statement}; }};'
        ' chain in { type filter hook input priority filter; iifname "wan" ct state new drop; };'
        " }",
    )


def stop_processes(pids: Sequence[int]) -> None:
    """TERM, then KILL for those that stay; returns when all are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + _STOP_SECONDS
        while (pids := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not pids:
            return
    raise LabError(f"processes {', '.join(map(str, pids))} do not end")


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # ours would stay as zombies
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
