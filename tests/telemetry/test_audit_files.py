"""Audit logs that are read: the Kubernetes API server's and auditd's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plexd.audit.kubernetes import Selection
from plexd.errors import KernelError
from plexd.linux.audit import AuditStream
from plexd.store.cursors import Cursors
from plexd.telemetry.audit_encoder import AuditEncoder
from plexd.telemetry.auditd import Events, LinuxAudit, LogAudit
from plexd.telemetry.counters import Dropped
from plexd.telemetry.kubernetes import KubernetesAudit, find_log
from plexd.telemetry.pipeline import Source
from plexd.telemetry.window import Limits
from tests.node_harness import unix_time
from tests.telemetry.harness import Plane, Stage, error

pytestmark = pytest.mark.virtual_time

LIMITS = Limits(100, 1 << 20, 10.0, 1000, 16 << 20)


def request(n: int, **changes: Any) -> str:
    event = {"stage": "ResponseComplete", "verb": "get", "requestURI": f"/{n}", "responseStatus": {"code": 200}}
    return json.dumps(event | changes) + "\n"


def record(n: int) -> str:
    return f"type=USER msg=audit({n}.000:{n}): pid=7 uid=0 msg='n={n} res=success'\n"


class Life:
    """One life of the agent over `directory`."""

    def __init__(self, directory: Path, plane: Plane | None = None, limits: Limits = LIMITS) -> None:
        self.cursors = Cursors(directory / "telemetry")
        self.cursors.load()
        self.plane = plane or Plane()
        self.stage = Stage(self.plane, limits)
        self.pipeline = self.stage.pipeline
        self.form = AuditEncoder("host", 65536, unix_time)
        self.pipeline._form = self.form
        self.directory = directory

    def kubernetes(self, selection: Selection = Selection(), path: str = "audit.log") -> KubernetesAudit:  # noqa: B008
        locate: Callable[[], Path] = lambda: self.directory / path  # noqa: E731
        return KubernetesAudit(self.pipeline, self.cursors, self.form, selection, locate, 5.0)

    def auditd(self) -> LinuxAudit:
        events = Events(self.form, self.directory, frozenset({1124}))
        written = LogAudit(self.pipeline, self.cursors, events, self.directory / "audit.log", 5.0)
        return LinuxAudit(self.pipeline.row("auditd"), None, written)

    @property
    def told(self) -> list[str]:
        return [
            f"gap {entry['object']['reason']}" if entry["event_type"] == "TELEMETRY_GAP" else
            entry["object"].get("n") or entry["object"].get("uri", "?").removeprefix("/")
            for entry in self.plane.taken
        ]  # fmt: skip

    async def run(self, source: Source, *steps: float | Callable[[], object]) -> None:
        """Collect while the steps are taken: a number is how long to wait."""
        self.pipeline.sources[:] = [source]
        async with self.stage:
            for step in steps:
                if callable(step):
                    step()
                    assert self.pipeline.imbalance() == 0
                else:
                    await asyncio.sleep(step)
            await self.cursors.save()


def add(path: Path, text: str) -> Callable[[], object]:
    def step() -> None:
        with path.open("a") as file:
            file.write(text)

    return step


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


# Kubernetes


async def test_half_a_line_completed_later_is_one_entry(tmp_path: Path, log: Path) -> None:
    log.touch()
    line = request(1)
    life = Life(tmp_path)
    await life.run(life.kubernetes(), 1.0, add(log, line[:30]), 10.0, add(log, line[30:]), 30.0)
    assert life.told == ["1"]
    assert +life.pipeline.counters.dropped == {}


async def test_long_lines_do_not_stop_the_reader(tmp_path: Path, log: Path) -> None:
    log.touch()
    bodies = request(1, requestObject={"x": "y" * 300_000}, userAgent="z" * 300_000)
    endless = request(2, userAgent="z" * (5 << 20))
    life = Life(tmp_path)
    await life.run(life.kubernetes(), 1.0, add(log, bodies + endless + request(3)), 60.0)
    assert life.told == ["1", "3"]
    assert len(life.plane.taken[0]["raw"].encode()) == 65536
    assert +life.pipeline.counters.dropped == {Dropped.OVERSIZE: 1}
    assert life.pipeline.counters.truncated == 1


async def test_lines_that_are_none_and_stages_nobody_wants_are_counted(tmp_path: Path, log: Path) -> None:
    log.touch()
    text = "nonsense\n" + request(1, stage="RequestReceived") + "\n" + request(2)
    life = Life(tmp_path)
    await life.run(life.kubernetes(), 1.0, add(log, text), 20.0)
    counters = life.pipeline.counters
    assert life.told == ["2"]
    assert +counters.dropped == {Dropped.MALFORMED: 1}
    assert (counters.filtered, counters.empty, counters.collected) == (1, 1, 4)


async def test_reading_begins_at_the_end_and_goes_on_where_it_was(tmp_path: Path, log: Path) -> None:
    log.write_text(request(0))
    first = Life(tmp_path)
    await first.run(first.kubernetes(), 7.0)
    add(log, request(1))()
    second = Life(tmp_path)
    await second.run(second.kubernetes(), 20.0, add(log, request(2)), 20.0)
    third = Life(tmp_path)
    await third.run(third.kubernetes(), 1.0, add(log, request(3)), 20.0)
    assert [first.told, second.told, third.told] == [[], ["1", "2"], ["3"]]


async def test_a_log_that_appears_later_is_read_as_a_whole(tmp_path: Path, log: Path) -> None:
    first = Life(tmp_path)
    await first.run(first.kubernetes(), 7.0)
    assert first.pipeline.row("k8s-audit").state == "absent"
    add(log, request(1))()
    second = Life(tmp_path)
    await second.run(second.kubernetes(), 20.0)
    assert second.told == ["1"]
    assert second.pipeline.row("k8s-audit").state == "reading"


async def test_nothing_is_passed_over_that_was_not_delivered(tmp_path: Path, log: Path) -> None:
    log.touch()
    down = Plane(judge=lambda batch: error(503))
    first = Life(tmp_path, down)
    await first.run(first.kubernetes(), 1.0, add(log, request(1) + request(2)), 30.0)
    second = Life(tmp_path)
    await second.run(second.kubernetes(), 20.0)
    assert second.told == ["1", "2"]


async def test_a_full_window_pauses_reading_and_loses_nothing(tmp_path: Path, log: Path) -> None:
    log.touch()
    down = Plane(judge=lambda batch: error(503) if asyncio.get_running_loop().time() < 300 else None)
    life = Life(tmp_path, down, Limits(10, 1 << 20, 1.0, 20, 16 << 20))
    text = "".join(request(n) for n in range(100))
    await life.run(life.kubernetes(), 1.0, add(log, text), 600.0)
    assert life.told == [str(n) for n in range(100)]
    assert +life.pipeline.counters.dropped == {}


async def test_a_rotated_log_is_read_to_its_end(tmp_path: Path, log: Path) -> None:
    log.touch()

    def rotate() -> None:
        log.rename(tmp_path / "audit-2026-03-04T10-20-30.123.log")
        log.write_text(request(2))

    life = Life(tmp_path)
    await life.run(life.kubernetes(), 6.0, add(log, request(1)), rotate, 30.0)
    assert life.told == ["1", "2"]


async def test_a_log_that_was_cut_shows_the_hole(tmp_path: Path, log: Path) -> None:
    log.write_text("\n" * 100)
    life = Life(tmp_path)
    await life.run(life.kubernetes(), 6.0, lambda: log.write_text(request(1)), 30.0)
    assert life.told == ["gap truncated_file", "1"]


async def test_positions_that_cannot_be_read_are_a_gap(tmp_path: Path, log: Path) -> None:
    log.touch()
    (tmp_path / "telemetry").mkdir()
    (tmp_path / "telemetry" / "cursors.json").write_text("[]")
    life = Life(tmp_path)
    await life.run(life.kubernetes(), 1.0, add(log, request(1)), 30.0)
    assert life.told == ["gap corrupt_state", "1"]


@pytest.mark.parametrize(
    ("manifest", "path"),
    [
        (None, "/var/log/kubernetes/audit/audit.log"),
        ("spec: {}", "/var/log/kubernetes/audit/audit.log"),
        ("    - --audit-log-path=/srv/k8s audit.log\n", "/srv/k8s"),
        ("    - --audit-log-path=/srv/k8s/audit.log\n    - --x", "/srv/k8s/audit.log"),
        ("    - '--audit-log-path=/srv/k8s/audit.log'\n", "/srv/k8s/audit.log"),
        ("    - --audit-log-path=-\n", "/var/log/kubernetes/audit/audit.log"),
    ],
)
def test_where_the_api_server_writes(tmp_path: Path, manifest: str | None, path: str) -> None:
    if manifest is not None:
        (tmp_path / "kube-apiserver.yaml").write_text(manifest)
    assert find_log(tmp_path / "kube-apiserver.yaml") == Path(path)


# auditd's log


async def test_events_are_read_from_the_log_of_auditd(tmp_path: Path, log: Path) -> None:
    log.write_text(record(0))
    open_event = (
        "type=SYSCALL msg=audit(3.000:3): arch=c000003e syscall=1 success=yes\n"
        'type=CWD msg=audit(3.000:3): cwd="/"\n'
    )  # fmt: skip
    life = Life(tmp_path)
    await life.run(life.auditd(), 1.0, add(log, record(1) + record(2) + open_event + record(4)), 30.0)
    assert life.told == ["1", "2", "?", "4"]
    assert life.plane.taken[2]["raw"].count("\n") == 1
    row = life.pipeline.row("auditd")
    assert (row.state, row.detail, row.entries) == ("reading", "file", 4)


async def test_an_event_whose_records_were_still_coming_is_read_again_as_a_whole(tmp_path: Path, log: Path) -> None:
    log.touch()
    first = "type=SYSCALL msg=audit(2.000:2): arch=c000003e syscall=1 success=yes\n"
    life = Life(tmp_path, limits=Limits(1, 1 << 20, 1.0, 1000, 16 << 20))
    await life.run(life.auditd(), 1.0, add(log, record(1) + first + record(3)), 5.0)
    assert life.told == ["1"]  # the third waits for the second
    after = Life(tmp_path)
    await after.run(after.auditd(), 0.5, add(log, 'type=CWD msg=audit(2.000:2): cwd="/"\n'), 30.0)
    assert after.told == ["?", "3"]
    assert after.plane.taken[0]["raw"].count("\n") == 1


async def test_what_is_excluded_or_malformed_in_the_log_is_counted(tmp_path: Path, log: Path) -> None:
    log.touch()
    text = "type=USER_TTY msg=audit(1.000:1): pid=7 msg='data=61'\nnonsense\n" + record(2)
    life = Life(tmp_path)
    await life.run(life.auditd(), 1.0, add(log, text), 30.0)
    assert life.told == ["2"]
    assert life.pipeline.counters.filtered == 1
    assert +life.pipeline.counters.dropped == {Dropped.MALFORMED: 1}


async def test_without_stream_and_log_the_source_is_unavailable(tmp_path: Path) -> None:
    def refuse() -> AuditStream:
        raise KernelError("audit records are sent in the host's network namespace only")

    life = Life(tmp_path)
    source = life.auditd()
    source._kernel = object()  # type: ignore[assignment]
    source._open_stream = refuse
    await life.run(source, 30.0)
    row = life.pipeline.row("auditd")
    assert row.state == "unavailable"
    assert "network namespace" in row.detail
    assert "No such file" in row.detail
    assert life.pipeline.counters.source_errors == 0
