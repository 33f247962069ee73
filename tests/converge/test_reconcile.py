"""The reconcile loop: when it runs, what it pulls, what it reports, and what no answer can make it do."""

from __future__ import annotations

import asyncio
import errno
import gzip
import itertools
import json
import ssl
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from plexd.control import ControlPlane
from plexd.converge.assembly import build_mesh
from plexd.converge.drift_reports import DriftReports
from plexd.converge.passes import Converger
from plexd.converge.reconcile import Reconcile
from plexd.converge.results import PassResult
from plexd.errors import (
    ControlError,
    Forbidden,
    KernelError,
    NotFound,
    RateLimited,
    Rejected,
    Transient,
    Unauthenticated,
    WireError,
)
from plexd.mesh.changes import Change, CreateLink, PutPeer
from plexd.mesh.desired import Desired, EndpointSource, FullState, SigningKeys
from plexd.mesh.drift import Correction
from plexd.mesh.events import EndpointOffered, PeerAdded, PeerRemoved
from plexd.node.control_calls import ControlCalls, SelfDescription
from plexd.node.health import Condition, Health
from plexd.node.persist import Persist
from plexd.node.state import Node
from plexd.runtime.clocks import Clocks, Reading
from plexd.store.files import DataDirectory
from plexd.store.identity import IdentityStore
from plexd.store.snapshot import SnapshotStore
from tests.fakes import FakeKernel
from tests.node_harness import (
    EPOCH,
    NEW_KEY,
    NODE_ID,
    OLD_KEY,
    highest,
    make_identity,
    make_node,
    middle,
    peer,
    public,
    settings_of,
    state_of,
    unix_time,
    wire_peer,
)
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

Answer = FullState | Exception


@dataclass
class Pulled:
    """A control plane that answers pull n (from 1) with `script(n)` after `seconds`."""

    script: Callable[[int], Answer]
    seconds: float = 0.0
    meanwhile: Callable[[int], None] = lambda _: None
    pulls: list[float] = field(default_factory=list)
    reports: list[tuple[float, list[Correction]]] = field(default_factory=list)
    report_errors: list[ControlError] = field(default_factory=list)
    reported_at: list[float] = field(default_factory=list)

    async def fetch_state(self) -> FullState:
        self.pulls.append(asyncio.get_running_loop().time())
        number = len(self.pulls)
        await asyncio.sleep(self.seconds)
        self.meanwhile(number)
        answer = self.script(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def report_drift(self, timestamp: float, corrections: Sequence[Correction]) -> None:
        self.reported_at.append(unix_time())
        self.reports.append((timestamp, list(corrections)))
        if self.report_errors:
            raise self.report_errors.pop(0)

    @property
    def reported(self) -> list[list[str]]:
        return [[f"{c.type} {c.detail}" for c in corrections] for _, corrections in self.reports]


@dataclass
class Passes:
    """A converger that changes nothing, or fails as often as it is told."""

    failing: int = 0
    times: list[float] = field(default_factory=list)

    async def converge(self) -> PassResult:
        self.times.append(asyncio.get_running_loop().time())
        failed = len(self.times) <= self.failing
        return PassResult(changed=0, failed=int(failed), corrections=())


class Loop:
    """A reconcile loop between a scripted control plane and a kernel in memory, with real files."""

    def __init__(
        self,
        directory: Path,
        control: Pulled,
        *,
        converger: Passes | None = None,
        node: Node | None = None,
        interval: float = 60.0,
        uniform: Callable[[float, float], float] = middle,
    ) -> None:
        self.control = control
        self.health = Health()
        self.node = node or make_node(peer(2), peer(3), health=self.health)
        self.kernel = FakeKernel()
        self.directory = DataDirectory(directory)
        self.snapshots = SnapshotStore(self.directory)
        self.persist = Persist(self.node, self.snapshots, IdentityStore(self.directory))
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings_of, self.health, unix_time)
        self.converger = converger or Converger([self.mesh.resource], self.health)
        self.drift = DriftReports(control, self.node, self.snapshots, unix_time, uniform)
        self.reconcile = Reconcile(
            control, self.converger, self.node, self.drift.cycle_ended, self.persist.save_signing_keys, self.health,
            interval, unix_time, uniform,
        )  # fmt: skip

    async def run(self, seconds: float, meanwhile: Awaitable[None] | None = None) -> None:
        task = asyncio.create_task(self.reconcile.run())
        reports = asyncio.create_task(self.drift.run())
        try:
            if meanwhile is not None:
                await meanwhile
            await asyncio.sleep(seconds)
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait({task})
            reports.cancel()
            await asyncio.wait({reports})
            await self.drift.save()
            self.directory.close()

    @property
    def peers(self) -> set[str]:
        """Of the kernel."""
        return {name.id for name in (peer(2), peer(3), peer(4)) if name.public_key in self.kernel.peers}

    @property
    def conditions(self) -> set[Condition]:
        return {finding.condition for finding in self.health.findings()}


BOTH = state_of(peer(2), peer(3))


def same(_: int) -> Answer:
    return BOTH


async def at(seconds: float, *steps: Callable[[], object]) -> None:
    """Each step, with so many seconds before it."""
    for step in steps:
        await asyncio.sleep(seconds)
        step()


# --- when


async def test_first_pull_is_at_once_and_the_timer_counts_from_the_end_of_a_cycle(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same, seconds=5.0))
    await loop.run(200)
    assert loop.control.pulls == pytest.approx([0, 65, 130, 195])


@pytest.mark.parametrize(("uniform", "interval"), [(lambda low, _: low, 54), (highest, 66)])
async def test_timer_is_spread_by_a_tenth(
    tmp_path: Path, uniform: Callable[[float, float], float], interval: float
) -> None:
    loop = Loop(tmp_path, Pulled(same), uniform=uniform)
    await loop.run(130)
    assert loop.control.pulls == pytest.approx([0, interval, 2 * interval][: len(loop.control.pulls)])


async def test_requests_during_a_cycle_earn_exactly_one_more(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same, seconds=10.0))
    ask = lambda: loop.reconcile.request("test")  # noqa: E731
    await loop.run(40, at(1, ask, ask, ask, ask))
    assert loop.control.pulls == pytest.approx([0, 10])


async def test_cycles_start_at_least_a_second_apart(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))
    await loop.run(0, at(0.1, *[lambda: loop.reconcile.request("test")] * 100))
    gaps = [later - earlier for earlier, later in itertools.pairwise(loop.control.pulls)]
    assert len(gaps) >= 8
    assert min(gaps) == pytest.approx(1.0)


async def test_requested_cycle_starts_the_timer_anew(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))
    await loop.run(70, at(40, lambda: loop.reconcile.request("test")))
    assert loop.control.pulls == pytest.approx([0, 40, 100])


async def test_pass_does_not_pull(tmp_path: Path) -> None:
    passes = Passes()
    loop = Loop(tmp_path, Pulled(same), converger=passes)
    await loop.run(10, at(20, lambda: loop.reconcile.request_pass("test")))
    assert passes.times == pytest.approx([0, 0, 20])  # before the first pull, after it, and the one asked for
    assert loop.control.pulls == pytest.approx([0])


async def test_passes_do_not_put_the_pull_off(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))
    await loop.run(0, at(20, *[lambda: loop.reconcile.request_pass("test")] * 16))
    assert loop.control.pulls == pytest.approx([0, 60, 120, 180, 240, 300], abs=1.1)


async def test_retry_after_postpones_the_next_pull_but_not_the_pass(tmp_path: Path) -> None:
    passes = Passes()
    limited = RateLimited("429", status=429, retry_after=150.0)
    control = Pulled(lambda n: limited if n == 1 else BOTH)
    loop = Loop(tmp_path, control, converger=passes, uniform=lambda low, _: low)
    await loop.run(200, at(10, lambda: loop.reconcile.request("test")))
    assert passes.times[:5] == pytest.approx([0, 0, 10, 64, 118])
    assert control.pulls[1] == pytest.approx(150)


async def test_postponed_pulls_of_a_fleet_are_spread(tmp_path: Path) -> None:
    limited = RateLimited("429", status=429, retry_after=20.0)
    loop = Loop(tmp_path, Pulled(lambda n: limited if n == 1 else BOTH), uniform=highest)
    await loop.run(30, at(5, lambda: loop.reconcile.request("test")))
    assert loop.control.pulls == pytest.approx([0, 25])


async def test_request_during_a_retry_after_wait_stays_pending(tmp_path: Path) -> None:
    limited = RateLimited("429", status=429, retry_after=20.0)
    control = Pulled(lambda n: limited if n == 1 else BOTH)
    loop = Loop(tmp_path, control, uniform=lambda low, _: low)
    await loop.run(30, at(5, lambda: loop.reconcile.request("test")))
    assert control.pulls == pytest.approx([0, 20])


async def test_failed_pull_waits_for_the_timer(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(lambda _: Transient("503")))
    await loop.run(125)
    assert loop.control.pulls == pytest.approx([0, 60, 120])


async def test_failed_changes_are_tried_again_after_5_seconds_doubling_to_the_interval(tmp_path: Path) -> None:
    passes = Passes(failing=7)  # the first of them is the one before any call
    loop = Loop(tmp_path, Pulled(same), converger=passes)
    await loop.run(400)
    gaps = [later - earlier for earlier, later in itertools.pairwise(passes.times)]
    assert gaps == pytest.approx([0, 5, 10, 20, 40, 60, 60, 60, 60, 60], abs=0.1)


async def test_failed_changes_are_tried_again_although_the_control_plane_takes_long_to_answer(tmp_path: Path) -> None:
    passes = Passes(failing=4)
    await Loop(tmp_path, Pulled(same, seconds=30.0), converger=passes).run(80)
    assert passes.times == pytest.approx([0, 1, 6, 16, 30], abs=0.1)


async def test_failed_changes_wait_for_no_pull_that_somebody_asks_for_meanwhile(tmp_path: Path) -> None:
    passes = Passes(failing=3)
    loop = Loop(tmp_path, Pulled(same), converger=passes)

    async def ask_a_slow_control_plane() -> None:
        await asyncio.sleep(2)
        loop.control.seconds = 30.0
        loop.reconcile.request("somebody")

    await loop.run(40, ask_a_slow_control_plane())
    assert passes.times == pytest.approx([0, 0, 3, 13, 32], abs=0.1)


async def test_clean_cycle_makes_the_next_failure_start_at_5_seconds(tmp_path: Path) -> None:
    passes = Passes(failing=4)
    loop = Loop(tmp_path, Pulled(same), converger=passes)

    async def fail_again() -> None:
        await asyncio.sleep(90)
        passes.failing = len(passes.times) + 1

    await loop.run(20, fail_again())
    assert passes.times == pytest.approx([0, 0, 5, 15, 35, 95, 100], abs=0.1)


# --- the generation


async def test_event_during_a_fetch_is_not_undone(tmp_path: Path) -> None:
    """The answer was written before the control plane knew of the new peer."""

    def add_peer_4(number: int) -> None:
        if number == 1:
            loop.node.fold(PeerAdded(peer(4)))

    newer = state_of(peer(2), peer(3), peer(4))
    control = Pulled(lambda n: BOTH if n == 1 else newer, seconds=0.5, meanwhile=add_peer_4)
    loop = Loop(tmp_path, control)
    await loop.run(5)
    assert loop.peers == {"n_2", "n_3", "n_4"}
    assert control.pulls == pytest.approx([0, 0.5])


async def test_third_fetch_is_used_whatever_happens(tmp_path: Path) -> None:
    def add_somebody(number: int) -> None:
        loop.node.fold(PeerAdded(peer(10 + number)))

    control = Pulled(same, seconds=0.5, meanwhile=add_somebody)
    loop = Loop(tmp_path, control)
    await loop.run(5)
    assert len(control.pulls) == 3
    assert loop.peers == {"n_2", "n_3"} == set(loop.node.desired.peers)


async def test_peer_removed_before_it_was_known_is_not_brought_by_a_fetch_under_way(tmp_path: Path) -> None:
    """The answer has a peer that we have not seen yet, and the event that takes it away overtakes it."""

    def remove_peer_4(number: int) -> None:
        if number == 1:
            assert not loop.node.fold(PeerRemoved("n_4"))

    older = state_of(peer(2), peer(3), peer(4))
    control = Pulled(lambda n: older if n == 1 else BOTH, seconds=0.5, meanwhile=remove_peer_4)
    loop = Loop(tmp_path, control)
    await loop.run(5)
    assert loop.peers == {"n_2", "n_3"}
    assert control.pulls == pytest.approx([0, 0.5])


async def test_endpoints_that_a_report_repeats_outdate_no_fetch(tmp_path: Path) -> None:
    offer = EndpointOffered("n_2", "203.0.113.8:51820", EndpointSource.REPORT)

    def repeat(_: int) -> None:
        assert not loop.node.fold(offer)

    control = Pulled(lambda _: BOTH, seconds=0.5, meanwhile=repeat)
    loop = Loop(tmp_path, control)
    loop.node.fold(offer)
    await loop.run(5)
    assert control.pulls == [0]


async def test_event_while_new_signing_keys_are_saved_is_not_undone(tmp_path: Path) -> None:
    rotated = replace(BOTH, signing_keys=SigningKeys(public(NEW_KEY)))
    newer = replace(state_of(peer(2), peer(3), peer(4)), signing_keys=SigningKeys(public(NEW_KEY)))
    loop = Loop(tmp_path, Pulled(lambda n: rotated if n == 1 else newer))

    async def save(keys: SigningKeys) -> None:
        if not loop.node.generation:
            loop.node.fold(PeerAdded(peer(4)))
        await loop.persist.save_signing_keys(keys)

    loop.reconcile._save_signing_keys = save
    await loop.run(5)
    assert loop.peers == {"n_2", "n_3", "n_4"}
    assert loop.node.desired.signing_keys == SigningKeys(public(NEW_KEY))


async def test_new_signing_keys_are_on_disk(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(lambda _: replace(BOTH, signing_keys=SigningKeys(public(NEW_KEY)))))
    await loop.run(5)
    assert loop.control.reported[-1:] == [["signing_keys_updated signing keys rotated"]]
    directory = DataDirectory(tmp_path)
    assert IdentityStore(directory).load_signing_keys() == SigningKeys(public(NEW_KEY))
    directory.close()


# --- drift


async def damage(loop: Loop) -> None:
    """Let the loop settle, then take a peer out of the kernel by hand."""
    await asyncio.sleep(10)
    loop.kernel.remove_peer(peer(2).public_key)
    loop.reconcile.request("test")


def stored_drift(directory: Path) -> list[str]:
    path = directory / "state/drift.json"
    return [c["detail"] for c in json.loads(path.read_bytes())["corrections"]] if path.exists() else []


async def test_repair_is_reported_and_leaves_the_disk_once_it_arrived(tmp_path: Path) -> None:
    on_disk: list[list[str]] = []

    class Looking(Pulled):
        async def report_drift(self, timestamp: float, corrections: Sequence[Correction]) -> None:
            on_disk.append(stored_drift(tmp_path))
            await super().report_drift(timestamp, corrections)

    loop = Loop(tmp_path, Looking(same))
    await loop.run(5, damage(loop))
    assert loop.control.reported == [["peer_added peer n_2"]]
    assert loop.control.reports[0][0] == pytest.approx(EPOCH + 10)
    assert on_disk == [["peer n_2"]]
    assert stored_drift(tmp_path) == []


async def test_cycle_without_repairs_reports_nothing(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))
    await loop.run(600)
    assert loop.control.reports == []


@pytest.mark.parametrize(
    "error", [Transient("503"), RateLimited("429", retry_after=5.0), Unauthenticated("401", status=401)]
)
async def test_report_that_failed_is_put_in_front_of_the_next(tmp_path: Path, error: ControlError) -> None:
    loop = Loop(tmp_path, Pulled(same, report_errors=[error]))

    async def twice() -> None:
        await damage(loop)
        await asyncio.sleep(1)
        assert stored_drift(tmp_path) == ["peer n_2"]
        loop.kernel.remove_peer(peer(3).public_key)
        loop.reconcile.request("test")

    await loop.run(5, twice())
    assert loop.control.reported == [["peer_added peer n_2"], ["peer_added peer n_2", "peer_added peer n_3"]]
    assert stored_drift(tmp_path) == []


@pytest.mark.parametrize("error", [Rejected("400", status=400), Forbidden("403", status=403)])
async def test_report_that_the_control_plane_does_not_want_is_dropped(tmp_path: Path, error: ControlError) -> None:
    loop = Loop(tmp_path, Pulled(same, report_errors=[error]))
    await loop.run(200, damage(loop))
    assert len(loop.control.reports) == 1
    assert stored_drift(tmp_path) == []


async def test_drift_of_a_whole_mesh_is_not_a_line_for_each_peer(tmp_path: Path) -> None:
    drift = Loop(tmp_path, Pulled(same)).drift
    with capture_logs() as lines:
        drift.cycle_ended([Correction("peer_added", f"peer n_{number}") for number in range(10_000)])
    assert [line["detail"] for line in lines[:-1]] == [f"peer n_{number}" for number in range(20)]
    assert (lines[-1]["event"], lines[-1]["count"]) == ("more drift corrected", 9980)


async def test_drift_of_an_earlier_run_is_delivered(tmp_path: Path) -> None:
    before = Loop(tmp_path, Pulled(same, report_errors=[Transient("503")] * 9))
    await before.run(5, damage(before))
    after = Loop(tmp_path, Pulled(same))
    await after.run(5)
    assert after.control.reported == [["peer_added peer n_2"]]


async def test_refused_identity_is_not_asked_for_its_state(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))

    async def refuse_then_accept() -> None:
        await asyncio.sleep(5)
        loop.node.refuse()
        loop.reconcile.request("test")
        await asyncio.sleep(595)
        loop.node.accept(loop.node.credential())

    await loop.run(100, refuse_then_accept())
    assert [at for at in loop.control.pulls if 5 < at < 600] == []
    assert loop.control.pulls[-1] > 600


async def test_refused_identity_keeps_drift_on_disk(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))

    async def refuse_then_accept() -> None:
        await asyncio.sleep(5)
        loop.node.refuse()
        await damage(loop)
        await asyncio.sleep(5)
        assert loop.peers == {"n_2", "n_3"}
        assert loop.control.reports == []
        assert stored_drift(tmp_path) == ["peer n_2"]
        loop.node.accept(loop.node.credential())

    await loop.run(120, refuse_then_accept())
    assert loop.control.reported == [["peer_added peer n_2"]]


async def test_change_that_failed_is_not_reported(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))

    def refuse(change: Change) -> str | None:
        return "no" if isinstance(change, PutPeer) and 10 <= unix_time() - EPOCH < 20 else None

    loop.kernel.refuse = refuse

    async def look() -> None:
        await damage(loop)
        await asyncio.sleep(4)
        assert loop.control.reports == []
        assert loop.conditions == {Condition.CHANGES_FAILED}

    await loop.run(60, look())
    assert loop.control.reported == [["peer_added peer n_2"]]
    assert loop.peers == {"n_2", "n_3"}
    assert loop.conditions == set()


# --- without an answer


async def test_damage_is_repaired_without_a_control_plane(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(lambda _: Transient("gone")))
    await loop.run(5, damage(loop))
    assert loop.peers == {"n_2", "n_3"}


@pytest.mark.parametrize("jump", [Reading(0, 3600, 3600), Reading(0, 0, 3600), Reading(0, 0, -3600)])
async def test_suspended_machine_and_set_clock_do_not_wait_for_the_timer(tmp_path: Path, jump: Reading) -> None:
    """A peer went meanwhile, of which nothing tells; the control plane does not answer yet."""
    control = Pulled(lambda n: BOTH if n == 1 else Transient("the network is not back yet"))
    loop = Loop(tmp_path, control)
    unseen = Reading(0, 0, 0)

    def read() -> Reading:
        now = asyncio.get_running_loop().time()
        return Reading(*(now + more for more in unseen))

    clocks = Clocks(read)
    clocks.on_gap.append(loop.reconcile.request)
    looking = asyncio.create_task(clocks.run())

    async def sleep_and_wake() -> None:
        nonlocal unseen
        await asyncio.sleep(9)
        loop.kernel.remove_peer(peer(2).public_key)
        unseen = jump
        await asyncio.sleep(3)
        assert loop.peers == {"n_2", "n_3"}

    await loop.run(0, sleep_and_wake())
    assert loop.control.pulls == pytest.approx([0, 10])
    looking.cancel()


async def test_state_is_stale_after_three_intervals_and_fresh_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(lambda n: BOTH if n in {1, 8} else Transient("gone")))

    async def look() -> None:
        await asyncio.sleep(170)
        assert Condition.STATE_STALE not in loop.conditions
        await asyncio.sleep(140)
        assert Condition.STATE_STALE in loop.conditions

    await loop.run(140, look())
    assert loop.control.pulls[7] < 450
    assert Condition.STATE_STALE not in loop.conditions


async def test_kernel_that_fails_is_tried_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))
    loop.kernel.failure = KernelError("busy")

    def recover() -> None:
        loop.kernel.failure = None

    await loop.run(10, at(12, recover))
    assert loop.peers == {"n_2", "n_3"}
    assert loop.conditions == set()


@pytest.mark.virtual_time
async def test_same_failure_is_one_warning(tmp_path: Path) -> None:
    with capture_logs() as lines:
        loop = Loop(tmp_path, Pulled(lambda n: Transient("a") if n < 10 else WireError("b")))
        await loop.run(1200)
    told = [line["kind"] for line in lines if line["event"] == "state not fetched" and line["log_level"] == "warning"]
    assert told == ["Transient", "WireError"]


def reasons(lines: Sequence[MutableMapping[str, Any]]) -> list[str]:
    """Those that an operator sees."""
    return [line["error"] for line in lines if line["event"] == "state not fetched" and line["log_level"] != "debug"]


@pytest.mark.virtual_time
async def test_another_reason_for_the_same_kind_of_failure_is_told(tmp_path: Path) -> None:
    unresolved = "state: connection to the control plane failed: [Errno -3] Temporary failure in name resolution"
    refused = "state: connection to the control plane failed: [Errno 111] Connect call failed ('192.0.2.1', 443)"
    unreachable = "state: connection to the control plane failed: [Errno 113] Connect call failed ('192.0.2.1', 443)"
    untrusted = "state: the control plane's certificate is not trusted: certificate has expired"
    unavailable = "state: the control plane answered 521"
    other = "state: the control plane answered 522"
    outage = [unresolved, refused, unreachable, untrusted, unavailable, other]
    with capture_logs() as lines:
        loop = Loop(tmp_path, Pulled(lambda n: Transient(outage[min(n // 4, 5)])))
        await loop.run(1800)
    assert reasons(lines) == outage


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    "text",
    [
        "state: the control plane's answer is damaged: document is not JSON: Expecting value at character {0}",
        "state: connection to the control plane failed: [Errno 111] Connect call failed ('192.0.2.{0}', 443)",
        "state: connection to the control plane failed: [Errno 111] Connect call failed ('2001:db8::{0}a', 443, 0, 0)",
        'state: the control plane answered 503 Service Unavailable: {{"request_id":"7f1c-{0}-e0aa","at":"12:00:{0}Z"}}',
    ],
)
async def test_reason_that_differs_in_its_particulars_is_the_same(tmp_path: Path, text: str) -> None:
    with capture_logs() as lines:
        await Loop(tmp_path, Pulled(lambda n: Transient(text.format(n)))).run(1800)
    assert reasons(lines) == [text.format(1)]


@pytest.mark.virtual_time
async def test_reasons_that_take_turns_are_told_once_a_minute(tmp_path: Path) -> None:
    with capture_logs() as lines:
        loop = Loop(tmp_path, Pulled(lambda n: Transient("ab"[n % 2])))
        await loop.run(0, at(2, *(lambda: loop.reconcile.request("test"),) * 150))
    assert "".join(reasons(lines)) == "babab"  # of 150 in five minutes


# --- bodies nobody can use

GOOD = json.dumps({"peers": [wire_peer(2), wire_peer(3)], "policies": []}).encode()
USELESS = {
    "nothing": b"",
    "half a body": GOOD[: len(GOOD) // 2],
    "no JSON": b"<html>",
    "an empty object": b"{}",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"peers"',
    "peers of a wrong type": b'{"peers":{},"policies":[]}',
    "policies of a wrong type": b'{"peers":[],"policies":7}',
    "NaN": b'{"peers":[],"policies":[],"x":NaN}',
    "text behind the end": b'{"peers":[],"policies":[]}]',
    "a BOM": b"\xef\xbb\xbf" + b'{"peers":[],"policies":[]}',
    "invalid UTF-8": b'{"peers":[],"policies":["\xff"]}',
    "deep nesting": b'{"peers":' + b"[" * 100_000,
}


def uplink_answering(body: bytes, node: Node, health: Health, headers: dict[str, str]) -> ControlCalls:
    """The real client; only the wire is missing."""
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body, headers=headers))
    control = ControlPlane("http://127.0.0.1:1", ssl.create_default_context(), transport=transport)
    control.use_identity(lambda: NODE_ID, node.credential, node.suspect)

    async def no_status() -> None:
        return None

    return ControlCalls(control, node, health, SelfDescription("stage", {}, "0", ""), no_status, 0.0)


def pull_once(directory: Path, body: bytes, headers: dict[str, str] | None = None) -> Loop:
    """One cycle that is answered with `body`, by a node with two peers; its files are written."""

    async def main() -> Loop:
        loop = Loop(directory, Pulled(same))
        loop.reconcile._control = uplink_answering(body, loop.node, loop.health, headers or {})
        loop.node.unsaved.set()
        await loop.converger.converge()
        await loop.persist.flush()

        async def one_cycle() -> None:
            await asyncio.sleep(2)
            await loop.persist.flush()

        await loop.run(0, one_cycle())
        return loop

    return run_virtual(main())


def peers_on_disk(directory: Path) -> set[str]:
    opened = DataDirectory(directory)
    cached = SnapshotStore(opened).load(NODE_ID)
    opened.close()
    return set(cached.desired.peers)


@pytest.mark.parametrize("body", USELESS.values(), ids=USELESS)
def test_useless_answer_removes_no_peer(tmp_path: Path, body: bytes) -> None:
    loop = pull_once(tmp_path, body)
    assert loop.peers == {"n_2", "n_3"} == set(loop.node.desired.peers)
    assert peers_on_disk(tmp_path) == {"n_2", "n_3"}


@pytest.mark.parametrize(
    "body",
    [gzip.compress(GOOD)[:-9], gzip.compress(b'{"peers":[],"policies":[]}') + b"x", gzip.compress(b" " * (11 << 20))],
    ids=["cut", "followed by something", "a bomb"],
)
def test_broken_compression_removes_no_peer(tmp_path: Path, body: bytes) -> None:
    loop = pull_once(tmp_path, body, {"content-encoding": "gzip"})
    assert loop.peers == {"n_2", "n_3"}


def test_honest_empty_list_does_remove_the_peers(tmp_path: Path) -> None:
    """The other way round, so that the tests above mean something."""
    loop = pull_once(tmp_path, b'{"peers":[],"policies":[]}')
    assert loop.peers == set()
    assert peers_on_disk(tmp_path) == set()


def test_one_bad_peer_does_not_cost_the_others(tmp_path: Path) -> None:
    bad = wire_peer(4) | {"public_key": "AAAA"}
    loop = pull_once(tmp_path, json.dumps({"peers": [wire_peer(2), bad, wire_peer(3)], "policies": []}).encode())
    assert loop.peers == {"n_2", "n_3"}
    assert [rejection.peer_id for rejection in loop.node.desired.rejected] == ["n_4"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version":9}', b"\xff\xfe"])
def test_damaged_cache_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    pull_once(tmp_path, GOOD)
    (tmp_path / "state/desired.json").write_bytes(content)
    assert peers_on_disk(tmp_path) == set()
    assert [path.read_bytes() for path in (tmp_path / "state").glob("desired.json.corrupt-*")] == [content]


async def test_previous_signing_key_is_dropped_on_time(tmp_path: Path) -> None:
    both = SigningKeys(public(NEW_KEY), public(OLD_KEY), EPOCH + 100)
    node = Node(make_identity(), Desired(signing_keys=both), 0.0, Health())
    loop = Loop(tmp_path, Pulled(lambda _: Transient("gone")), node=node)
    await loop.run(130)
    assert node.desired.signing_keys == SigningKeys(public(NEW_KEY))


# --- a control plane or a disk that does not answer


async def test_cached_mesh_stands_before_a_hanging_control_plane_answers(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same, seconds=30.0))
    await loop.run(1, at(0.5, lambda: None))
    assert loop.peers == {"n_2", "n_3"}


async def test_damage_is_repaired_while_a_pull_hangs(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same, seconds=30.0))

    def damage() -> None:
        loop.kernel.delete_link()
        loop.reconcile.request_pass("test")

    await loop.run(1, at(10, damage))
    assert loop.peers == {"n_2", "n_3"}
    assert loop.control.pulls == [0]


async def test_full_disk_keeps_no_drift_from_being_reported(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))

    def refuse(_corrections: Sequence[Correction]) -> tuple[Correction, ...]:
        raise OSError(errno.ENOSPC, "No space left on device")

    loop.snapshots.save_unsent_corrections = refuse  # type: ignore[method-assign, assignment]

    def damage() -> None:
        loop.kernel.delete_link()
        loop.reconcile.request_pass("test")

    await loop.run(5, at(10, damage))
    assert loop.control.reported == [["interface_repaired plexd0: link, 2 peers, 2 routes"]]


async def test_repair_under_way_at_a_stop_is_on_disk(tmp_path: Path) -> None:
    class Slow(Passes):
        async def converge(self) -> PassResult:
            await asyncio.sleep(2)
            return PassResult(changed=1, failed=0, corrections=(Correction("route_added", "10.100.0.2/32"),))

    loop = Loop(tmp_path, Pulled(same), converger=Slow())
    await loop.run(1)
    directory = DataDirectory(tmp_path)
    assert SnapshotStore(directory).load_unsent_corrections() == (Correction("route_added", "10.100.0.2/32"),)
    directory.close()


async def test_event_does_not_say_that_a_missing_mesh_is_well(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(same))
    converger = loop.converger
    assert isinstance(converger, Converger)

    async def break_and_fold() -> None:
        await asyncio.sleep(10)
        loop.kernel.delete_link()
        loop.kernel.refuse = lambda change: "port in use" if isinstance(change, CreateLink) else None
        loop.reconcile.request_pass("test")
        await asyncio.sleep(2)
        assert Condition.MESH_DOWN in loop.conditions
        loop.node.fold(PeerAdded(peer(4)))
        await converger.apply_event()
        assert Condition.MESH_DOWN in loop.conditions

    await loop.run(0, break_and_fold())


# --- what status tells


async def test_contact_knows_the_last_good_pull_and_why_the_later_one_failed(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Pulled(lambda n: Transient("no route to host") if n == 2 else BOTH))
    contact = loop.node.connection
    seen: list[tuple[bool, str]] = []

    async def look() -> None:
        for wait in (1, 60, 60):
            await asyncio.sleep(wait)
            seen.append((contact.last_pull_at is not None, contact.last_pull_error))

    await loop.run(0, look())
    assert seen == [(True, ""), (True, "no route to host"), (True, "")]


async def test_correction_saved_while_a_report_is_under_way_stays_on_disk_when_that_arrives(tmp_path: Path) -> None:
    """As at a stop, which saves what the last pass corrected beside a report that has not been answered yet."""

    class Late(Pulled):
        async def report_drift(self, timestamp: float, corrections: Sequence[Correction]) -> None:
            await asyncio.sleep(3)
            await super().report_drift(timestamp, corrections)

    loop = Loop(tmp_path, Late(same))

    def last_pass() -> None:
        loop.drift.cycle_ended([Correction("route_added", "late")])

    async def stop_beside_a_report() -> None:
        await damage(loop)
        await at(1, last_pass)
        await loop.drift.save()
        assert stored_drift(tmp_path) == ["peer n_2", "late"]
        await asyncio.sleep(2.5)
        assert loop.control.reported == [["peer_added peer n_2"]]
        assert stored_drift(tmp_path) == ["late"]

    await loop.run(5, stop_beside_a_report())
    assert loop.control.reported[1:] == [["route_added late"]]
    assert stored_drift(tmp_path) == []


async def test_drift_is_reported_again_when_the_wait_is_over_that_the_control_plane_asked_for(tmp_path: Path) -> None:
    """Whatever is corrected meanwhile is saved and goes with it."""
    limited = RateLimited("429", status=429, retry_after=300.0)
    loop = Loop(tmp_path, Pulled(same, report_errors=[limited]))

    async def pass_by_pass() -> None:
        await damage(loop)
        for _ in range(60):
            await asyncio.sleep(1)
            loop.reconcile.request_pass("test")
        loop.drift.cycle_ended([Correction("route_added", "late")])
        await asyncio.sleep(1)
        assert stored_drift(tmp_path) == ["peer n_2", "late"]

    await loop.run(500, pass_by_pass())
    first, second = (timestamp - EPOCH for timestamp in loop.control.reported_at)
    assert 300 <= second - first <= 376
    assert loop.control.reported == [["peer_added peer n_2"], ["peer_added peer n_2", "route_added late"]]


async def test_postponed_drift_reports_of_a_fleet_are_spread(tmp_path: Path) -> None:
    loop = Loop(
        tmp_path, Pulled(same, report_errors=[RateLimited("429", status=429, retry_after=300.0)]), uniform=highest
    )

    async def pass_by_pass() -> None:
        await damage(loop)
        for _ in range(500):
            await asyncio.sleep(1)
            loop.drift.cycle_ended([])

    await loop.run(500, pass_by_pass())
    first, second = (timestamp - EPOCH for timestamp in loop.control.reported_at)
    assert second - first == pytest.approx(375, abs=2)


async def test_late_answer_to_the_former_node_does_not_make_the_drift_of_the_new_one_wait(tmp_path: Path) -> None:
    class Overtaken(Pulled):
        async def report_drift(self, timestamp: float, corrections: Sequence[Correction]) -> None:
            if not self.reports:
                loop.node.renew(replace(loop.node.identity, node_id="n_new"), loop.node.desired, 0.0)
            await super().report_drift(timestamp, corrections)

    limited = RateLimited("429", status=429, retry_after=3600.0)
    loop = Loop(tmp_path, Overtaken(same, report_errors=[limited]))

    async def pass_by_pass() -> None:
        await damage(loop)
        for _ in range(5):
            await asyncio.sleep(1)
            loop.drift.cycle_ended([])

    await loop.run(10, pass_by_pass())
    assert len(loop.control.reported) == 2


async def test_new_node_is_asked_for_its_state_whatever_the_old_one_was_to_wait_for(tmp_path: Path) -> None:
    limited = RateLimited("429", status=429, retry_after=3600.0)
    loop = Loop(tmp_path, Pulled(lambda n: limited if n == 1 else BOTH))

    def renew() -> None:
        loop.node.renew(replace(loop.node.identity, node_id="n_new"), loop.node.desired, 0.0)

    await loop.run(5, at(10, renew))
    assert loop.control.pulls == pytest.approx([0, 10], abs=0.1)


@pytest.mark.virtual_time
@pytest.mark.parametrize("error", [Forbidden("403", status=403), NotFound("404", status=404)])
async def test_refused_state_is_an_error_once(tmp_path: Path, error: ControlError) -> None:
    with capture_logs() as lines:
        await Loop(tmp_path, Pulled(lambda _: error)).run(200)
    levels = [line["log_level"] for line in lines if line["event"] == "state not fetched"]
    assert levels == ["error", "debug", "debug", "debug"]
