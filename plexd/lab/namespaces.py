"""A small network made of namespaces: a hub with a bridge, and one namespace a node, all on one link.

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
        raise LabError(f"{command[0]} is not installed: apt-get install iproute2 iputils-ping wireguard-tools") from exc
    except subprocess.TimeoutExpired as exc:
        raise LabError(f"{' '.join(command)}: no end after 30 s") from exc
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


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
    """The hub and its nodes. `address(0)` is the hub, `address(n)` the n-th node, all in 192.0.2.0/24."""

    MAX_NODES = 200

    def __init__(self, lab: str) -> None:
        self._lab = lab
        self.hub = Namespace(f"{lab}-hub")

    def node(self, number: int) -> Namespace:
        return Namespace(f"{self._lab}-n{number}")

    @staticmethod
    def address(number: int) -> str:
        return f"192.0.2.{number + 1}"

    def namespaces(self) -> list[Namespace]:
        """Those of this lab that exist."""
        names = (line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.strip())
        return [Namespace(name) for name in names if name.startswith(f"{self._lab}-")]

    def build(self, nodes: int) -> None:
        run("ip", "netns", "add", self.hub.name)
        self.hub.run("ip", "link", "set", "lo", "up")
        self.hub.run("ip", "link", "add", "br0", "type", "bridge")
        self.hub.run("ip", "address", "add", f"{self.address(0)}/24", "dev", "br0")
        self.hub.run("ip", "link", "set", "br0", "up")
        for number in range(1, nodes + 1):
            self._add_node(number)

    def _add_node(self, number: int) -> None:
        node = self.node(number)
        run("ip", "netns", "add", node.name)
        self.hub.run("ip", "link", "add", f"n{number}", "type", "veth", "peer", "name", "eth0", "netns", node.name)
        self.hub.run("ip", "link", "set", f"n{number}", "master", "br0", "up")
        node.run("ip", "link", "set", "lo", "up")
        node.run("ip", "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        node.run("ip", "route", "add", "default", "via", self.address(0))

    def remove(self) -> None:
        """End every process of the lab's namespaces and delete them; absent is fine."""
        namespaces = self.namespaces()
        # an agent that is stopped may have started one more program meanwhile
        while pids := [pid for namespace in namespaces for pid in namespace.pids()]:
            stop_processes(pids)
        for namespace in namespaces:
            run("ip", "netns", "delete", namespace.name)


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
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
