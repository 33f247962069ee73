"""The tour of the lab as a newcomer sees it: the real command, its output, and what it leaves behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces import marks

pytestmark = marks(seconds=300)

COMMAND = [sys.executable, "-m", "plexd", "lab", "up", "--nodes", "3"]


def lab_namespaces() -> list[str]:
    out = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in out.splitlines() if line.startswith("plexd-lab-")]


def lab_processes() -> list[str]:
    found = []
    ours = Path("/proc/self/ns/pid").readlink()  # a lab in a container on this host is another lab
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().split(b"\0")
            if cmdline.with_name("ns").joinpath("pid").readlink() != ours:
                continue
        except OSError:  # gone meanwhile, or none of our business
            continue
        if any(b"/run/plexd-lab/" in word or word.startswith(b"plexd-lab") for word in words):
            found.append(b" ".join(words).decode())
    return found


def assert_nothing_left() -> None:
    assert lab_namespaces() == []
    assert lab_processes() == []
    assert not Path("/run/plexd-lab").exists()
    assert list(Path("/var/run/wireguard").glob("plexd-lab*")) == []


@pytest.fixture
def lab() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:  # what still runs has not been waited for: its test has failed, and the next one starts from nothing
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    pytest.fail(f"the lab ended without saying {text!r}:\n{seen}")


def test_tour_shows_mesh_sabotage_healing_and_a_killed_agent_and_leaves_nothing(lab: subprocess.Popen[str]) -> None:
    output, _ = lab.communicate(timeout=240)
    assert lab.returncode == 0, output
    assert len(re.findall(r"node-\d registered as \S+, mesh address 10\.100\.", output)) == 3
    assert len(re.findall(r"node-\d -> node-\d .* ms, handshake \d+ s ago", output)) == 6
    assert re.search(r"healed after [0-9.]+ s", output)
    assert re.search(r"drift reported to the control plane: peer_added: peer \S+", output)
    assert re.search(r"drift reported to the control plane: peer_removed: peer key \S{8}", output)
    assert re.search(r"pings sent [1-9]\d+, lost 0", output)
    assert "nothing left behind" in output
    assert_nothing_left()


def test_tour_goes_over_ipv6_alone_too() -> None:
    done = subprocess.run([*COMMAND[:-1], "2", "--ipv6"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "control plane at https://[2001:db8::1]:" in done.stdout
    assert len(re.findall(r"node-\d registered as \S+, mesh address fd00:100::", done.stdout)) == 2
    assert len(re.findall(r"node-\d -> node-\d fd00:100::\d +[0-9.]+ ms, handshake \d+ s ago", done.stdout)) == 2
    assert re.search(r"pings sent [1-9]\d+, lost 0", done.stdout)
    assert_nothing_left()


def test_ipv6_and_nats_do_not_go_together() -> None:
    command = [*COMMAND, "--ipv6", "--nat", "symmetric"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "--ipv6 and --nat do not go together" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_lab_takes_everything_down(lab: subprocess.Popen[str]) -> None:
    read_until(lab, "agents started")
    lab.send_signal(signal.SIGINT)
    output, _ = lab.communicate(timeout=60)
    assert lab.returncode == 1
    assert "nothing left behind" in output
    assert_nothing_left()


def test_lab_killed_with_9_is_cleaned_by_the_next(lab: subprocess.Popen[str]) -> None:
    read_until(lab, "all registered")
    lab.kill()
    lab.wait()
    assert lab_namespaces() != []  # the killed one really left something
    second = subprocess.run(COMMAND, capture_output=True, text=True, timeout=240, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "an earlier lab left" in second.stdout
    assert_nothing_left()


def test_second_lab_on_a_host_is_refused(lab: subprocess.Popen[str]) -> None:
    read_until(lab, "building")
    second = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert "another lab is running" in second.stdout + second.stderr
    lab.send_signal(signal.SIGINT)
    lab.communicate(timeout=60)
