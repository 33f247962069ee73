"""Log lines end to end: the agent's engine on one core, a server that only counts on the other; and a shipper of
Debian, syslog-ng, that does the same job side by side (its version there does not compress).

The shipper process of the chaos tests is used, which is the real engine with real sources and client, and no mesh.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.figure import Figure
from tests.telemetry.journald import Journald

LINES = 200_000
TEXT = "numbered line {} with some text as lines have it, about a hundred bytes long altogether, and no more"
PATIENCE_SECONDS = 180.0
OUTAGE_SECONDS = 600.0
OUTAGE_LINES_A_SECOND = 50
TICKS = os.sysconf("SC_CLK_TCK")

CONFIG = """\
api: http://127.0.0.1:{port}
data_dir: {root}/data
hostname: bench
observe: {{enabled: false}}
audit: {{enabled: false}}
logs:
  interval: 1s
  batch_interval: 1s
  initial_lookback: 24h
  start_at: beginning
"""
JOURNAL = "  journald: {{directory: {directory}}}\n"
FILES = "  journald: {{enabled: false}}\n  file_patterns: [{path}]\n"
SYSLOG_NG = """\
@version: 3.38
options {{ stats-freq(0); flush-lines(1000); }};
source s {{ file("{path}" flags(no-parse) follow-freq(0.05) log-fetch-limit(10000) log-iw-size(100000)); }};
destination d {{ http(url("http://127.0.0.1:{port}/") method("POST") batch-lines(1000) batch-bytes(1048576)
  batch-timeout(1000) delimiter("\\n") body-suffix("\\n") headers("Content-Type: text/plain")
  body('$(format-json timestamp=$ISODATE source="app.log" unit="" message=$MESSAGE severity=info hostname=$HOST)')); }};
log {{ source(s); destination(d); flags(flow-control); }};
"""


def measure() -> list[Figure]:
    root = Path(tempfile.mkdtemp(prefix="plexd-bench-logs-"))
    try:
        return [*_journal(root / "journal"), *_file(root / "file"), *_syslog_ng(root / "ng"), *_outage(root / "outage")]
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _journal(root: Path) -> list[Figure]:
    root.mkdir()
    with Journald(root / "journald") as journald:
        for number in range(LINES):
            journald.write(TEXT.format(number), PRIORITY="6")
        journald.control("--sync")
        return _ship(root, JOURNAL.format(directory=journald.directory), "journal")


def _file(root: Path) -> list[Figure]:
    root.mkdir()
    return _ship(root, FILES.format(path=_lines(root)), "file")


def _lines(root: Path) -> Path:
    path = root / "app.log"
    with path.open("w") as file:
        file.writelines(TEXT.format(number) + "\n" for number in range(LINES))
    return path


def _ship(root: Path, sources: str, name: str) -> list[Figure]:
    with _sink("json") as port, _shipper(root, port, sources) as process:
        rate = _wait(port)
        seconds = _cpu_seconds(process.pid)
    return [
        Figure(f"log lines from a {name} into the control plane, one core", rate, "lines/s", 20_000, at_least=True),
        Figure(f"CPU of 10 000 lines from a {name}, children included", seconds / LINES * 10_000, "s"),
    ]


def _syslog_ng(root: Path) -> list[Figure]:
    if shutil.which("syslog-ng") is None:
        print("no syslog-ng here (apt-get install syslog-ng-core syslog-ng-mod-http): nothing to compare with")
        return []
    root.mkdir()
    with _sink("lines") as port:
        (root / "syslog-ng.conf").write_text(SYSLOG_NG.format(path=_lines(root), port=port))
        command = [
            "taskset", "-c", "0", "syslog-ng", "-F", "--no-caps", "-f", str(root / "syslog-ng.conf"), "-R",
            str(root / "persist"), "-p", str(root / "pid"), "-c", str(root / "ctl"),
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            rate = _wait(port)
            seconds = _cpu_seconds(process.pid)
        finally:
            process.terminate()
            process.wait(20)
    return [
        Figure("the same lines from a file by syslog-ng, one core", rate, "lines/s"),
        Figure("CPU of 10 000 lines by syslog-ng", seconds / LINES * 10_000, "s"),
    ]


def _outage(root: Path) -> list[Figure]:
    """Nobody listens: reading waits for room, and the memory with it."""
    root.mkdir()
    path = root / "app.log"
    path.touch()
    sizes: list[float] = []
    with _shipper(root, _free_port(), FILES.format(path=path)) as process, path.open("a") as file:
        number = 0
        started = time.monotonic()
        while (passed := time.monotonic() - started) < OUTAGE_SECONDS:
            while number < passed * OUTAGE_LINES_A_SECOND:
                file.write(TEXT.format(number) + "\n")
                number += 1
            file.flush()
            time.sleep(1)
            sizes.append(_resident(process.pid))
    third = len(sizes) // 3
    return [
        Figure(f"RSS after {OUTAGE_SECONDS / 3:.0f} s without a control plane", sizes[third], "MiB"),
        Figure(f"RSS after {OUTAGE_SECONDS:.0f} s without a control plane", sizes[-1], "MiB"),
    ]


@contextmanager
def _shipper(root: Path, port: int, sources: str) -> Iterator[subprocess.Popen[bytes]]:
    (root / "data").mkdir()
    (root / "key").write_text("A" * 43 + "=")
    (root / "config.yaml").write_text(CONFIG.format(port=port, root=root) + sources)
    command = ["taskset", "-c", "0", sys.executable, "-m", "tests.chaos.shipper", str(root / "config.yaml"), "n_1"]
    with (root / "log").open("wb") as output:
        process = subprocess.Popen([*command, str(root / "key")], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


@contextmanager
def _sink(form: str) -> Iterator[int]:
    port = _free_port()
    process = subprocess.Popen(["taskset", "-c", "1", sys.executable, "-m", "tests.bench.sink", str(port), form])
    try:
        yield port
    finally:
        process.kill()
        process.wait(20)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait(port: int) -> float:
    """Lines a second between the first batch and the last."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.25)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                lines, first, last = json.load(answer)
        except OSError:
            continue
        if lines >= LINES:
            return float(lines / (last - first))
    raise TimeoutError("not all lines arrived")


def _cpu_seconds(pid: int) -> float:
    """Of the process and of the children it has or had."""
    total = 0.0
    for task in [pid, *_children(pid)]:
        fields = Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / TICKS
    return total


def _children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def _resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
