"""One run of chaos: numbered lines into a journal and into files that are rotated, numbered events into the audit logs
of the kernel's daemon and of Kubernetes, an agent that is killed, a control plane that answers with errors, hangs and
disappears. Everything is drawn from one seed.

Afterwards every line has arrived at least once, each source's in order, or is covered by a marker of a gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plexd.lab.controlplane import LabControlPlane
from plexd.lab.controlplane.faults import Effect, Fault
from tests.lab.test_controlplane_admin import register
from tests.telemetry.journald import Journald

WRITING_SECONDS = 4.0
SETTLE_SECONDS = 30.0
PATTERN = r"^(?P<source>[a-z]+) line (?P<number>\d+)\b"
SECRET_NAME = "node_key"
POISON = "POISON"

CONFIG = """\
api: {url}
data_dir: {data}
hostname: chaos
observe: {{enabled: false}}
audit:
  interval: 1s
  batch_interval: 1s
  batch_max_size: 100
  buffer_size: 400
  auditd: {{method: file, log_path: "{audit}/auditd.log"}}
  kubernetes: {{enabled: true, log_path: "{audit}/k8s-audit.log"}}
logs:
  interval: 1s
  batch_interval: 1s
  batch_max_size: 200
  buffer_size: 1000
  start_at: beginning
  journald: {{directory: {journal}}}
  file_patterns: ["{logs}/*.log"]
"""


@dataclass
class Report:
    """What came of it. `problems` are broken promises, none of them is good.

    `aside` lines were put aside on the node, with others that the control plane refuses.
    """

    seed: int
    lines: int = 0
    kills: int = 0
    repeated: int = 0
    aside: int = 0
    gaps: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) or "nothing lost"
        return (
            f"seed {self.seed}: {self.lines} lines, {self.kills} kills, {self.repeated} repeated,"
            f" {self.aside} put aside, {len(self.gaps)} gaps, {self.seconds:.1f} s: {verdict}"
        )


class Chaos:
    def __init__(
        self, seed: int, root: Path, plane: LabControlPlane, identity: dict[str, Any], journald: Journald
    ) -> None:
        self.report = Report(seed)
        self._dice = random.Random(seed)
        self._root = root
        self._plane = plane
        self._identity = identity
        self._journald = journald
        self._logs = root / "log"
        self._audit = root / "audit"
        self._written = {"journal": 0, "app": 0, "web": 0, "cut": 0}
        self._events = {"auditd": 0, "k8s-audit": 0}
        self._process: asyncio.subprocess.Process | None = None
        self._is_storming = False

    # the agent

    async def _start(self) -> None:
        with (self._root / "agent.log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.chaos.shipper", str(self._root / "config.yaml"),
                self._identity["node_id"], str(self._root / "key"), stdout=asyncio.subprocess.PIPE, stderr=output,
            )  # fmt: skip
        assert self._process.stdout is not None
        assert await self._process.stdout.readline() == b"ready\n", (self._root / "agent.log").read_text()

    async def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        await self._process.communicate()

    async def _keep_killing(self) -> None:
        while self._is_storming:
            await asyncio.sleep(self._dice.random())
            await self._end(self._dice.choice([signal.SIGKILL] * 7 + [signal.SIGTERM]))
            self.report.kills += 1
            await asyncio.sleep(self._dice.choice([0.0, 0.0, 0.3]))
            await self._start()

    # the sources

    def _line(self, source: str) -> str:
        number = self._written[source]
        self._written[source] += 1
        return f"{source} line {number} {'x' * self._dice.choice([5, 60, 400])}"

    async def _write_journal(self) -> None:
        while self._is_storming:
            for _ in range(self._dice.choice([1, 5, 40])):
                self._journald.write(self._line("journal"))
            if self._dice.random() < 0.01:
                for _ in range(self._dice.choice([1, 1, 5])):  # five are more than the requests for one batch can find
                    self._journald.write(f"journal {POISON}")
                    self._journald.write(self._line("journal"))
            if self._dice.random() < 0.02:
                await asyncio.to_thread(self._journald.control, "--rotate")
            await asyncio.sleep(self._dice.random() * 0.05)

    async def _write_file(self, source: str) -> None:
        path = self._logs / f"{source}.log"
        while self._is_storming:
            with path.open("a") as file:
                for _ in range(self._dice.choice([1, 5, 40])):
                    file.write(self._line(source) + "\n")
                    if self._dice.random() < 0.1:
                        file.flush()
                        await asyncio.sleep(0)
                if self._dice.random() < 0.1:
                    rotate(path)
                    if self._dice.random() < 0.5:  # the writer has not noticed yet
                        file.write(self._line(source) + "\n")
            await asyncio.sleep(self._dice.random() * 0.1)

    async def _write_emptied_file(self) -> None:
        """It is emptied once the agent has seen what is in it; of what it never saw, nobody could tell."""
        path = self._logs / "cut.log"
        since = 0
        while self._is_storming:
            with path.open("a") as file:
                for _ in range(self._dice.choice([1, 5, 20])):
                    file.write(self._line("cut") + "\n")
            if self._dice.random() < 0.2 and self._followed()["sources"]["cut"]["arrived"] > since:
                os.truncate(path, 0)
                since = self._written["cut"]
            await asyncio.sleep(self._dice.random() * 0.2)

    async def _write_audit(self, source: str) -> None:
        path = self._audit / f"{source}.log"
        while self._is_storming:
            with path.open("a") as file:
                for _ in range(self._dice.choice([1, 5, 20])):
                    for line in audit_lines(source, self._events[source]):
                        file.write(line + "\n")
                        if self._dice.random() < 0.1:
                            file.flush()
                            await asyncio.sleep(0)
                    self._events[source] += 1
            if self._dice.random() < 0.1:
                rotate(path)
            await asyncio.sleep(self._dice.random() * 0.2)

    # the control plane

    async def _misbehave(self) -> None:
        admin = self._plane.admin
        faults = [
            Fault(effect=Effect.STATUS, status=500, count=3), Fault(effect=Effect.STATUS, status=503, count=2),
            Fault(effect=Effect.STATUS, status=429, headers={"retry-after": "1"}),
            Fault(effect=Effect.STATUS, status=413, larger_than=20_000, count=20),
            Fault(effect=Effect.STATUS, status=401), Fault(effect=Effect.STATUS, status=408),
            Fault(effect=Effect.STATUS, status=302, headers={"location": "/elsewhere"}),
            Fault(effect=Effect.DISCONNECT, count=2), Fault(effect=Effect.CUT), Fault(delay_seconds=1.0),
            Fault(effect=Effect.DISCONNECT, delay_seconds=0.5),
        ]  # fmt: skip
        while self._is_storming:
            await asyncio.sleep(self._dice.random() * 0.4)
            if self._dice.random() < 0.15:
                await admin.stop_listening()
                await asyncio.sleep(self._dice.random())
                await admin.start_listening()
            else:
                where = self._dice.choice(["logs", "audit"])
                admin.inject(self._dice.choice(faults).model_copy(update={"endpoint": where}))

    # the run

    async def run(self) -> Report:
        started = time.monotonic()
        self._logs.mkdir()
        self._audit.mkdir()
        (self._root / "key").write_text(self._identity["node_secret_key"])
        (self._root / "config.yaml").write_text(
            CONFIG.format(
                url=self._plane.url,
                data=self._root / "data",
                journal=self._journald.directory,
                logs=self._logs,
                audit=self._audit,
            )
        )
        (self._root / "data").mkdir()
        self._plane.admin.inject(Fault(endpoint="logs", effect=Effect.STATUS, status=400, contains=POISON, count=None))
        self._journald.write(f"the key is {self._identity['node_secret_key']}.")
        for source in ("app", "web", "cut"):
            (self._logs / f"{source}.log").touch()
        for source in self._events:
            (self._audit / f"{source}.log").touch()
        await self._start()
        await self._until_files_are_known()
        storms = [self._keep_killing(), self._write_journal(), self._write_file("app"), self._write_file("web"),
                  self._write_emptied_file(), self._write_audit("auditd"), self._write_audit("k8s-audit"),
                  self._misbehave()]  # fmt: skip
        await self._storm(WRITING_SECONDS, *storms)
        await self._end(signal.SIGKILL)
        await self._settle()
        self._judge()
        self.report.seconds = time.monotonic() - started
        return self.report

    async def _storm(self, seconds: float, *work: Coroutine[Any, Any, None]) -> None:
        """Each comes to its own end: what is cancelled may leave a rotation or the start of an agent half done."""
        self._is_storming = True
        async with asyncio.TaskGroup() as tasks:
            for coroutine in work:
                tasks.create_task(coroutine)
            await asyncio.sleep(seconds)
            self._is_storming = False

    async def _until_files_are_known(self) -> None:
        """A file that comes and goes between two looks of the agent was never there for it."""
        async with asyncio.timeout(SETTLE_SECONDS):
            while True:
                with contextlib.suppress(OSError, ValueError, KeyError):
                    known = json.loads((self._root / "data/telemetry/cursors.json").read_text())
                    if len(known["files"]) == 3 and "inode" in known["k8s_audit"] and "inode" in known["auditd_log"]:
                        return
                await asyncio.sleep(0.02)

    async def _settle(self) -> None:
        """The weather clears: everything has time to arrive."""
        admin = self._plane.admin
        admin.clear_faults()
        admin.inject(Fault(endpoint="logs", effect=Effect.STATUS, status=400, contains=POISON, count=None))
        await admin.start_listening()
        await asyncio.to_thread(self._journald.control, "--sync")
        await self._start()
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            await asyncio.sleep(0.2)
            if self._is_complete() or time.monotonic() > deadline:
                break
        await asyncio.sleep(1.0)  # markers that were held back follow
        await self._end(signal.SIGTERM)

    def _followed(self) -> dict[str, Any]:
        return self._plane.admin.follow_logs(self._identity["node_id"], PATTERN, self._written)

    def _is_complete(self) -> bool:
        """All lines, or of a file that was emptied the last one, if it is not empty."""
        found, aside = self._followed()["sources"], self._put_aside()
        lost = found.pop("cut")["missing"]
        if any(set(numbers) != set(range(self._events[source])) for source, numbers in self._audited().items()):
            return False
        missing = {(source, number) for source, sequence in found.items() for number in sequence["missing"]}
        is_empty = not (self._logs / "cut.log").stat().st_size
        return missing <= aside and (is_empty or not lost or lost[-1] < self._written["cut"] - 1)

    def _audited(self) -> dict[str, list[int]]:
        """The numbers of audit events that arrived, by source."""
        found: dict[str, list[int]] = {source: [] for source in self._events}
        for entry in self._plane.admin.telemetry(self._identity["node_id"], "audit"):
            if entry["source"] == "auditd":
                found["auditd"].append(entry["object"]["exit"])
            elif entry["source"] == "k8s-audit":
                found["k8s-audit"].append(int(entry["object"]["uri"][1:]))
        return found

    def _judge_audit(self) -> None:
        for source, numbers in self._audited().items():
            first = list(dict.fromkeys(numbers))
            self.report.lines += self._events[source]
            self.report.repeated += len(numbers) - len(first)
            missing = sorted(set(range(self._events[source])) - set(first))
            if missing:
                self.report.problems.append(f"{source}: {len(missing)} lost, first {missing[:5]}")
            if first != sorted(first):
                self.report.problems.append(f"{source}: out of order")

    def _judge(self) -> None:
        report, found = self.report, self._followed()
        report.lines = sum(self._written.values())
        self._judge_audit()
        report.gaps = found["gaps"]
        aside = self._put_aside()
        report.aside = len(aside)
        for source, sequence in found["sources"].items():
            report.repeated += sequence["repeated"]
            # what was put aside may come once more after a kill, behind what had followed it
            disordered = [number for number in sequence["disordered"] if (source, number) not in aside]
            if disordered:
                report.problems.append(f"{source}: out of order {disordered[:5]}")
            missing = [number for number in sequence["missing"] if (source, number) not in aside]
            if source == "journal":
                unstored = set(missing) - self._stored_by_journald()
                if unstored:
                    report.problems.append(f"journald itself did not keep {len(unstored)} of {len(missing)} lines")
            if missing and not self._is_covered(source, len(missing)):
                report.problems.append(f"{source}: {len(missing)} lost without a marker, {ranges(missing)}")
        entries = self._plane.admin.telemetry(self._identity["node_id"], "logs")
        texts = [entry["message"] for entry in entries] + self._in_quarantine()
        if any(self._identity["node_secret_key"] in text for text in texts):
            report.problems.append("the node key was forwarded")
        if "the key is [redacted]." not in texts:
            report.problems.append("the line with the redacted key did not arrive")

    def _in_quarantine(self) -> list[str]:
        """The messages that the agent put aside."""
        files = (self._root / "data/telemetry/quarantine").glob("logs-*.json.gz")
        return [entry["message"] for file in files for entry in json.loads(gzip.decompress(file.read_bytes()))]

    def _put_aside(self) -> set[tuple[str, int]]:
        found = [re.search(PATTERN, message) for message in self._in_quarantine()]
        return {(match["source"], int(match["number"])) for match in found if match is not None}

    def _stored_by_journald(self) -> set[int]:
        """The numbers that are in the journal, whatever became of them later."""
        words = ["journalctl", "--merge", "--quiet", "--output=cat", f"--directory={self._journald.directory}"]
        text = subprocess.run(words, check=True, capture_output=True).stdout.decode()
        return {int(match["number"]) for match in re.finditer(PATTERN, text, re.MULTILINE)}

    def _is_covered(self, source: str, missing: int) -> bool:
        name = "journald" if source == "journal" else str(self._logs / f"{source}.log")
        markers = [gap for gap in self.report.gaps if gap["source"] == name]
        return any(gap["lost"] is None for gap in markers) or sum(gap["lost"] for gap in markers) >= missing > 0


def ranges(numbers: list[int]) -> str:
    """`3-7 9`: where they lie."""
    starts = [number for index, number in enumerate(numbers) if not index or numbers[index - 1] != number - 1]
    ends = [number for index, number in enumerate(numbers) if numbers[index + 1 : index + 2] != [number + 1]]
    return " ".join(f"{start}-{end}" if start != end else f"{start}" for start, end in zip(starts, ends, strict=True))


def audit_lines(source: str, number: int) -> list[str]:
    if source == "k8s-audit":
        event = {"stage": "ResponseComplete", "verb": "get", "requestURI": f"/{number}"}
        return [json.dumps(event)]
    stamp = f"audit({1_795_629_645 + number // 1000}.{number % 1000:03d}:{number})"
    return [
        f"type=SYSCALL msg={stamp}: arch=c000003e syscall=257 success=yes exit={number} pid=7 uid=0",
        f'type=CWD msg={stamp}: cwd="/{number}"',
    ]


def rotate(path: Path, keep: int = 50) -> None:
    for number in range(keep, 0, -1):
        old = path.with_name(f"{path.name}.{number}")
        if old.exists():
            old.rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))
    path.touch()


async def chaos(seed: int, root: Path) -> Report:
    with Journald(root / "journald") as journald:
        async with LabControlPlane() as plane:
            identity = await register(plane.url, plane.admin.issue_token(), f"chaos-{seed}")
            return await Chaos(seed, root, plane, identity, journald).run()


def run(seed: int, root: Path) -> Report:
    root.mkdir(exist_ok=True)
    return asyncio.run(chaos(seed, root))


def run_and_clear(seed: int) -> bool:
    """Whether nothing was lost; if it was, what there is to look at stays. Runs side by side share nothing."""
    root = Path(tempfile.mkdtemp(prefix=f"plexd-chaos-{seed}-"))
    report = run(seed, root)
    if not report.problems:
        shutil.rmtree(root)
    print(report, *([f"  kept: {root}"] if report.problems else []), sep="\n", flush=True)
    return not report.problems
