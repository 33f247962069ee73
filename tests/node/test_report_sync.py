"""How reports reach the control plane: gathered, in batches, one at a time, and nobody waits for a refused one."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from plexd.errors import (
    Conflict,
    ControlError,
    Forbidden,
    NotFound,
    RateLimited,
    Rejected,
    TooLarge,
    Transient,
    Unauthenticated,
)
from plexd.mesh.desired import DataEntry
from plexd.node.report_sync import BATCH_BYTES, ReportSync
from plexd.node.reports import Reports
from plexd.node.state import Node
from plexd.store.files import DataDirectory
from plexd.store.reports import Operation, ReportStore
from tests.node_harness import make_node, middle, unix_time
from tests.virtual_time import run_virtual

DEBOUNCE = 5.0


@dataclass
class Plane:
    """A control plane that notes what arrives and answers as `judge` says, after `delay` seconds."""

    judge: Callable[[dict[str, int | None]], ControlError | None] = lambda _: None
    delay: float = 0.0
    requests: list[tuple[float, dict[str, int | None]]] = field(default_factory=list)
    open: int = 0

    async def sync_reports(self, entries: Sequence[DataEntry], deleted: Sequence[str]) -> None:
        assert not {entry.key for entry in entries} & set(deleted)
        asked: dict[str, int | None] = {entry.key: entry.version for entry in entries} | dict.fromkeys(deleted)
        assert len(asked) == len(entries) + len(deleted)
        self.requests.append((asyncio.get_running_loop().time(), asked))
        self.open += 1
        assert self.open == 1, "one at a time"
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.open -= 1
        if error := self.judge(asked):
            raise error

    @property
    def asked(self) -> list[dict[str, int | None]]:
        return [asked for _, asked in self.requests]

    @property
    def times(self) -> list[float]:
        return [at for at, _ in self.requests]


class World:
    def __init__(self, path: Path, plane: Plane) -> None:
        self.path = path
        self.plane = plane
        self.node: Node = make_node()
        self.directory = DataDirectory(path)
        self.reports = Reports(ReportStore(self.directory), unix_time)
        self.sync = ReportSync(plane, self.node, self.reports, DEBOUNCE, unix_time, middle)
        self.running = asyncio.create_task(self.sync.run())

    async def put(self, key: str, payload: str = "1") -> None:
        await self.reports.put(key, "a/b", payload, lambda _: True)

    async def delete(self, key: str) -> None:
        await self.reports.delete(key, lambda _: True)

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])
        assert self.running.cancelled(), "the service failed"
        self.directory.close()

    def on_disk(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.path / "state" / "report_sync.json").read_text())
        return document


def play(path: Path, scene: Callable[[World], Coroutine[Any, Any, None]], plane: Plane | None = None) -> Plane:
    async def main() -> Plane:
        world = World(path, plane or Plane())
        await scene(world)
        await world.end()
        return world.plane

    return run_virtual(main())


def refusing(error: Callable[[], ControlError], *keys: str) -> Callable[[dict[str, int | None]], ControlError | None]:
    return lambda asked: error() if set(asked) & set(keys) else None


def test_first_change_starts_the_timer_and_later_ones_do_not_extend_it(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await asyncio.sleep(100)
        for _ in range(6):
            await world.put("a")
            await asyncio.sleep(1)
        await world.put("b")
        await asyncio.sleep(20)
        assert not world.reports.pending
        assert world.on_disk()["pending"] == {}

    plane = play(tmp_path, scene)
    assert plane.requests == [(105.0, {"a": 5}), (110.0, {"a": 6, "b": 1})]


def test_last_operation_of_a_key_wins(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.put("a")
        await world.delete("a")
        await world.put("a")
        await world.put("b")
        await world.delete("b")
        await asyncio.sleep(10)

    assert play(tmp_path, scene).asked == [{"a": 2, "b": None}]


def test_what_is_written_while_it_is_sent_is_sent_again(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.put("a")
        await world.put("b")
        await asyncio.sleep(6)
        await world.put("a")
        await world.delete("b")
        await asyncio.sleep(20)

    assert play(tmp_path, scene, Plane(delay=3)).asked == [{"a": 1, "b": 1}, {"a": 2, "b": None}]


@pytest.mark.parametrize("deleted", [False, True])
def test_what_was_not_sent_before_a_restart_goes_at_once_after_it(tmp_path: Path, deleted: bool) -> None:
    async def first(world: World) -> None:
        await world.put("a")
        if deleted:
            await asyncio.sleep(10)
            await world.delete("a")

    async def second(world: World) -> None:
        await asyncio.sleep(0.1)
        assert world.plane.requests == [(0.0, {"a": None if deleted else 1})]
        await world.put("b")
        await asyncio.sleep(10)
        assert world.plane.times == [0.0, 0.1 + DEBOUNCE]

    play(tmp_path, first)
    play(tmp_path, second)


def test_batches_are_sorted_and_bounded_by_number_and_size(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        for number in reversed(range(150)):
            await world.put(f"k{number:03}")
        for key in ("large-1", "large-2", "large-3"):
            await world.put(key, '"' + "x" * (BATCH_BYTES // 2) + '"')
        await asyncio.sleep(60)

    asked = play(tmp_path, scene).asked
    assert [len(each) for each in asked] == [100, 51, 1, 1]
    assert list(asked[0]) == sorted(asked[0])
    assert [key for each in asked for key in each] == sorted({key for each in asked for key in each})


@pytest.mark.parametrize("error", [Transient("no answer"), Transient("", status=503), Unauthenticated("", status=401)])
def test_passing_failure_is_tried_again_later_and_later(tmp_path: Path, error: ControlError) -> None:
    async def scene(world: World) -> None:
        await world.put("a")
        await asyncio.sleep(2000)
        world.plane.judge = lambda _: None
        await asyncio.sleep(400)
        assert not world.reports.pending

    plane = play(tmp_path, scene, Plane(lambda _: error))
    waits = [after - before for before, after in itertools.pairwise(plane.times)]
    assert waits[:7] == [5, 10, 20, 40, 80, 160, 300]
    assert set(waits[7:]) == {300}


def test_retry_after_is_a_lower_bound(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.put("a")
        await asyncio.sleep(100)

    plane = play(tmp_path, scene, Plane(lambda _: RateLimited("", status=429, retry_after=60)))
    assert plane.times == [5.0, 5 + 60 * 1.125]


def test_stream_that_is_back_wakes_the_delivery(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.put("a")
        await asyncio.sleep(300)
        world.plane.judge = lambda _: None
        before = len(world.plane.requests)
        world.sync.retry()
        await asyncio.sleep(0.1)
        assert len(world.plane.requests) == before + 1
        assert not world.reports.pending

    play(tmp_path, scene, Plane(lambda _: Transient("away")))


def test_refused_identity_waits_until_it_is_accepted(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.node.refuse()
        await world.put("a")
        await asyncio.sleep(5000)
        assert world.plane.requests == []
        world.node.accept(world.node.credential())
        await asyncio.sleep(1)
        assert world.plane.asked == [{"a": 1}]

    play(tmp_path, scene)


@pytest.mark.parametrize("error", [Forbidden("", status=403), NotFound("", status=404)])
def test_node_that_may_not_report_asks_every_five_minutes(tmp_path: Path, error: ControlError) -> None:
    async def scene(world: World) -> None:
        await world.put("a")
        await world.put("b")
        await asyncio.sleep(1000)
        assert set(world.reports.pending) == {"a", "b"}
        world.plane.judge = lambda _: None
        await asyncio.sleep(300)
        assert not world.reports.pending

    plane = play(tmp_path, scene, Plane(lambda _: error))
    rounds = sorted(set(plane.times))
    assert [after - before for before, after in itertools.pairwise(rounds)] == [300] * (len(rounds) - 1)


@pytest.mark.parametrize(
    "error",
    [Rejected("", status=400), Rejected("", status=422), TooLarge("", status=413), NotFound("", status=404)],
    ids=lambda error: str(error.status),
)
def test_refused_entry_is_parked_until_it_is_written_again(tmp_path: Path, error: ControlError) -> None:
    async def scene(world: World) -> None:
        for key in ("a", "bad", "c"):
            await world.put(key)
        await asyncio.sleep(100)
        assert world.reports.sync_of("a") == world.reports.sync_of("c") == "synced"
        assert world.reports.sync_of("bad") == "rejected"
        assert world.on_disk()["parked"] == {"bad": {"op": "put", "version": 1}}
        assert world.plane.asked == [{"a": 1, "bad": 1, "c": 1}, {"a": 1}, {"bad": 1}, {"c": 1}]
        world.plane.judge = lambda _: None
        await world.put("bad")
        assert world.reports.sync_of("bad") == "pending"
        await asyncio.sleep(10)
        assert world.reports.sync_of("bad") == "synced"
        assert world.on_disk()["parked"] == {}

    play(tmp_path, scene, Plane(refusing(lambda: error, "bad")))


def test_refused_delete_is_parked_as_well(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.put("bad")
        await world.delete("bad")
        await asyncio.sleep(100)
        assert world.reports.parked == {"bad": Operation("delete", 1)}
        await world.put("bad")
        assert not world.reports.parked

    play(tmp_path, scene, Plane(refusing(lambda: Conflict("", status=409), "bad")))


def test_conflict_is_settled_with_the_version_that_the_answer_names(tmp_path: Path) -> None:
    def judge(asked: dict[str, int | None]) -> ControlError | None:
        if (version := asked.get("k")) is not None and version <= 41:
            body = json.dumps({"conflicts": [{"key": "other", "version": 1}, {"key": "k", "version": 41}]})
            return Conflict("", status=409, body=body)
        return None

    async def scene(world: World) -> None:
        await world.put("a")
        await world.put("k")
        await asyncio.sleep(10)
        assert world.reports.entries["k"].version == 42
        assert not world.reports.pending
        await world.put("k")
        assert world.reports.entries["k"].version == 43

    asked = play(tmp_path, scene, Plane(judge)).asked
    assert asked == [{"a": 1, "k": 1}, {"a": 1}, {"k": 1}, {"k": 42}]


@pytest.mark.parametrize(
    "body", ["", "x", "[]", "{}", '{"conflicts":[{"key":"k","version":9223372036854775807}]}', '{"conflicts":3}']
)
def test_conflict_without_a_usable_version_takes_the_time_and_gives_up_after_three(tmp_path: Path, body: str) -> None:
    async def scene(world: World) -> None:
        await world.put("k")
        await asyncio.sleep(5.5)
        assert world.reports.sync_of("k") == "rejected"
        versions = [asked["k"] for asked in world.plane.asked]
        now = int(unix_time())
        assert versions == [1, now, now + 1]
        await asyncio.sleep(1000)
        assert len(world.plane.requests) == 3

    play(tmp_path, scene, Plane(lambda _: Conflict("", status=409, body=body)))


def test_local_write_during_a_conflict_is_not_lost(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.put("k", "1")
        await asyncio.sleep(5.5)
        world.plane.judge = lambda _: None
        await world.put("k", "2")
        await asyncio.sleep(30)
        assert world.reports.entries["k"].payload == "2"
        assert not world.reports.pending
        assert world.plane.asked[-1] == {"k": world.reports.entries["k"].version}

    play(tmp_path, scene, Plane(lambda _: Conflict("", status=409), delay=1))


def test_last_attempt_at_the_end_sends_what_is_due(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.put("a")
        world.running.cancel()
        await asyncio.wait([world.running])
        await world.sync.flush()
        assert world.plane.asked == [{"a": 1}]
        await world.sync.flush()
        assert world.plane.asked == [{"a": 1}]

    play(tmp_path, scene)


def test_disk_that_refuses_keeps_no_report_from_being_sent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(world: World) -> None:
        await world.put("a")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr("os.fsync", full)
            await asyncio.sleep(1000)
            assert world.plane.asked == [{"a": 1}]
        await world.put("b")
        await asyncio.sleep(10)
        assert world.on_disk()["pending"] == {}

    play(tmp_path, scene)


@pytest.mark.parametrize("is_broken_for_good", [False, True], ids=["for a while", "until the restart"])
def test_deleted_report_stays_deleted_although_its_file_could_not_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_broken_for_good: bool
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    async def scene(world: World) -> None:
        await world.put("a")
        await asyncio.sleep(10)
        with monkeypatch.context() as broken:
            broken.setattr("plexd.store.reports.remove_durably", refuse)
            await world.reports.delete("a", lambda _: True)
            if is_broken_for_good:
                await asyncio.sleep(10)
        await asyncio.sleep(10)
        assert world.plane.asked == [{"a": 1}, {"a": None}]
        again = Reports(ReportStore(world.directory), unix_time)
        assert "a" not in again.entries
        assert again.pending == {}

    play(tmp_path, scene)
