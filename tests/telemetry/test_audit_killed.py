"""Real audit records, and an agent that is killed while it takes them down."""

from __future__ import annotations

import itertools
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plexd.audit.records import parse_datagram
from plexd.audit.types import EOE
from plexd.linux.audit import NETLINK_AUDIT
from tests.faults.plane import Plane
from tests.faults.world import PLEXD, wait_until
from tests.linux.audit_kernel import AuditKernel, audit_kernel, can_listen

pytestmark = pytest.mark.timeout(240)

CONFIG = """\
api: {api}
data_dir: {directory}/data
hostname: audited
log_level: info
policy: {{enabled: false}}
token: {{file: {directory}/token}}
observe: {{enabled: false}}
audit:
  batch_interval: 1s
  auditd: {{method: netlink, log_path: {directory}/audit.log}}
  kubernetes: {{enabled: false}}
"""


@pytest.fixture
def kernel() -> Iterator[AuditKernel]:
    if reason := can_listen():
        pytest.skip(reason)
    with audit_kernel() as made:
        yield made


class Auditd:
    """Writes down what the kernel says, as auditd does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT)
        self._socket.settimeout(0.2)
        self._socket.bind((0, 1))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Auditd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def _write(self) -> None:
        with self._path.open("a", buffering=1) as log:
            while not self._ended.is_set():
                try:
                    record = parse_datagram(self._socket.recv(1 << 16))
                except TimeoutError:
                    continue
                if record is not None and record.type != EOE:
                    log.write(record.line + "\n")


class Agent:
    """Registered with `plexd join`, then only its audit side runs."""

    def __init__(self, directory: Path, plane: Plane) -> None:
        self._directory = directory
        self._plane = plane
        self._config = directory / "config.yaml"
        self._config.write_text(CONFIG.format(api=plane.url, directory=directory))
        (directory / "token").write_text(plane.issue_token())
        subprocess.run([*PLEXD, "join", "--config", str(self._config)], check=True, capture_output=True)
        self.node_id = plane.nodes()[0]["id"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._directory / "agent.log").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.telemetry.audit_agent", str(self._config)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={"PATH": os.environ["PATH"]},
            )  # fmt: skip

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)

    def told(self) -> list[str]:
        """What arrived: numbers, and gaps."""
        entries: list[dict[str, Any]] = self._plane.ask("GET", f"/nodes/{self.node_id}/telemetry/audit")
        return [
            f"gap {entry['object']['reason']}" if entry["event_type"] == "TELEMETRY_GAP" else entry["object"]["n"]
            for entry in entries
            if entry["event_type"] == "TELEMETRY_GAP" or "n" in entry["object"]
        ]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with Plane(tmp_path) as plane:
        agent = Agent(tmp_path, plane)
        try:
            yield agent
        finally:
            agent.kill()


def kill_and_start(agent: Agent, kernel: AuditKernel, chance: random.Random) -> int:
    """Records without a pause, an agent that dies now and then; how many records."""
    numbers = itertools.count()

    def say(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            kernel.say(f"n={next(numbers)}")
            time.sleep(chance.uniform(0.0, 0.02))

    def wait_until_heard() -> None:
        said: set[str] = set()

        def is_heard() -> bool:
            said.add(str(number := next(numbers)))
            kernel.say(f"n={number}")
            return not said.isdisjoint(agent.told())

        wait_until("the agent listens", is_heard)

    agent.start()
    wait_until_heard()
    for _ in range(4):
        say(chance.uniform(0.1, 2.5))
        agent.kill()
        say(chance.uniform(0.0, 0.5))
        agent.start()
    wait_until_heard()
    last = next(numbers)
    kernel.say(f"n={last}")
    wait_until("the last record arrived", lambda: str(last) in agent.told())
    return last + 1


@pytest.mark.parametrize("seed", range(2))
def test_with_the_log_of_auditd_nothing_is_lost(kernel: AuditKernel, agent: Agent, tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    with Auditd(tmp_path / "audit.log"):
        count = kill_and_start(agent, kernel, random.Random(seed))
    told = agent.told()
    first = int(told[0])  # from when on the agent listened
    assert list(dict.fromkeys(told)) == [str(number) for number in range(first, count)]


@pytest.mark.parametrize("seed", range(2))
def test_without_it_every_hole_is_marked_where_it_is(kernel: AuditKernel, agent: Agent, seed: int) -> None:
    print(f"seed {seed}")
    kill_and_start(agent, kernel, random.Random(seed))
    told = agent.told()
    assert "gap agent_down" in told
    highest = None
    is_marked = True
    for text in told:
        if text.startswith("gap"):
            assert text == "gap agent_down"
            is_marked = True
        elif highest is None or int(text) > highest:
            assert is_marked or highest is None or int(text) == highest + 1
            highest, is_marked = int(text), False
