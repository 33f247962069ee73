"""What two interfaces and two tables of one agent go through: damage, kill -9, and a failure of one of them."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from tests.two_interfaces import SECOND_TABLE, Names

DEADLINE_SECONDS = 120


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def shown(names: Names) -> str:
    """Both interfaces with their addresses and routes, and both tables, as `ip` and `nft` show them."""
    facts = []
    for name in (names.mesh, names.second):
        (link,) = json.loads(run("ip", "-json", "address", "show", "dev", name))
        addresses = [entry["local"] for entry in link["addr_info"] if entry["scope"] == "global"]
        facts.append(f"{name} {link.get('ifalias')} {link['mtu']} {'UP' in link['flags']} {addresses}")
        facts.append(run("ip", "route", "show", "dev", name, "proto", "112"))
    facts += [run("nft", "-s", "list", "table", "inet", table) for table in ("plexd", SECOND_TABLE)]
    return "\n".join(facts)


class Agent:
    """The agent in a process of its own, and the lines that it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def next_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the agent has ended"
        return line

    def until(self, wanted: Callable[[str], bool]) -> list[str]:
        """The lines up to the first wanted one."""
        lines = [self.next_line()]
        while not wanted(lines[-1]):
            lines.append(self.next_line())
        return lines

    @contextlib.contextmanager
    def halted(self) -> Iterator[None]:
        """The agent sees only the outcome of what happens meanwhile, however slow the machine is."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE_SECONDS)


@contextlib.contextmanager
def running(names: Names, backend: str) -> Iterator[Agent]:
    """An agent whose first pass has ended. A timer kills one that hangs, which ends the reading of its lines."""
    command = [sys.executable, "-m", "tests.two_interfaces", names.mesh, backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        agent, timer = Agent(process), threading.Timer(DEADLINE_SECONDS, process.kill)
        timer.start()
        try:
            agent.until(lambda line: line == "converged")
            yield agent
        finally:
            timer.cancel()
            process.kill()


def play(names: Names, backend: str) -> None:
    with running(names, backend) as agent:
        sound = shown(names)
        for name in (names.second, names.mesh):
            run("ip", "link", "delete", name)
            agent.until(lambda line, name=name: line.startswith(f"interface_repaired {name}: link"))  # type: ignore[misc]
            assert shown(names) == sound
        run("nft", "flush", "ruleset")
        repaired = {"firewall_repaired inet plexd", f"firewall_repaired inet {SECOND_TABLE}"}
        while repaired:
            repaired.discard(agent.next_line())
        assert shown(names) == sound
        agent.kill()
    assert shown(names) == sound
    run("ip", "link", "delete", names.second)
    run("nft", "flush", "ruleset")
    with running(names, backend) as agent:
        assert shown(names) == sound
        # a link of somebody else in the place of the second interface: it fails at every look
        with agent.halted():
            run("ip", "link", "delete", names.second)
            run("ip", "link", "add", names.second, "type", "veth", "peer", "name", f"{names.second}p")
        agent.until(lambda line: line == f"failed {names.second}")
        run("ip", "link", "set", names.mesh, "mtu", "1300")
        agent.until(lambda line: line == f"interface_repaired {names.mesh}: mtu")
        run("ip", "link", "delete", names.second)
        agent.until(lambda line: line.startswith(f"interface_repaired {names.second}: link"))
        assert shown(names) == sound
