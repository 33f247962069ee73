"""Names of peers and of the control plane: how often each is looked up, how many at once, and what comes of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import Unresolved
from plexd.linux.lookup import MAX_LOOKUPS
from plexd.mesh.address import Endpoint, format_ip, parse_ip
from plexd.mesh.events import PeerAdded, PeerRemoved
from plexd.node.health import Health
from plexd.traversal import name_resolution
from plexd.traversal.name_resolution import Resolve
from tests.fakes import FakeKernel
from tests.node_harness import Asked, make_node, peer, settings_of, unix_time
from tests.virtual_time import run_virtual

CONTROL_PLANE = "cp.example.org"
HUNG_THREAD_SECONDS = 30.0  # three name servers, each asked twice with a limit of 5 s


class Names:
    """A resolver that takes its time; names that begin with "dead" hang until the lookup is given up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.2) -> None:
        self.seconds = seconds
        self.asked: list[tuple[float, str]] = []
        self.addresses: dict[str, str] = {}
        self.threads = self.most_threads = 0
        self.unreachable: set[str] = set()
        monkeypatch.setattr(name_resolution, "look_up", self.look_up)
        monkeypatch.setattr(name_resolution, "has_route", lambda address: format_ip(address) not in self.unreachable)

    async def look_up(self, name: str) -> list[bytes]:
        loop = asyncio.get_running_loop()
        self.asked.append((loop.time(), name))
        if self.threads == MAX_LOOKUPS:
            raise Unresolved(f"{name} does not resolve: too many name lookups")
        self.threads += 1
        self.most_threads = max(self.threads, self.most_threads)
        loop.call_later(HUNG_THREAD_SECONDS if name.startswith("dead") else self.seconds, self._thread_ended)
        if name.startswith("dead"):
            await asyncio.sleep(5)
            raise Unresolved(f"{name} does not resolve")
        await asyncio.sleep(self.seconds)
        found = self.addresses.get(name, "192.0.2.7").split()
        return [parse_ip(address) for address in sorted(found, key=self.unreachable.__contains__)]

    def _thread_ended(self) -> None:
        self.threads -= 1

    def times(self, name: str) -> list[float]:
        return [at for at, asked in self.asked if asked == name]


class Stage:
    def __init__(self, *names: str) -> None:
        self.node = make_node()
        for number, name in enumerate(names, 2):
            self.node.fold(PeerAdded(peer(number, endpoint=f"{name}:51820")))
        self.kernel = FakeKernel()
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings_of, Health(), unix_time)
        self.converger = Converger([self.mesh.resource], Health())
        self.resolved = self.mesh.wanted.resolved
        self.asked = Asked()
        self.resolve = Resolve(self.node, self.resolved, CONTROL_PLANE, self.asked)
        self.mesh.wanted.on_unresolved = self.resolve.names_changed.set


def play(stage_names: tuple[str, ...], story: Callable[[Stage], Awaitable[None]]) -> None:
    """Run the service while `story` lasts."""

    async def main() -> None:
        stage = Stage(*stage_names)
        task = asyncio.create_task(stage.resolve.run())
        await stage.converger.converge()
        await story(stage)
        task.cancel()
        await asyncio.wait({task})

    run_virtual(main())


def many(kind: str) -> tuple[str, ...]:
    return tuple(f"{kind}{number}.example.org" for number in range(100))


def test_more_names_than_there_are_threads_all_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)

    async def story(stage: Stage) -> None:
        await asyncio.sleep(10)
        assert len(stage.resolved) == 100
        assert stage.resolve.control_plane == {parse_ip("192.0.2.7")}

    play(many("p"), story)
    assert Counter(name for _, name in names.asked) == dict.fromkeys((CONTROL_PLANE, *many("p")), 1)


def test_names_without_an_answer_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)

    async def story(_: Stage) -> None:
        await asyncio.sleep(600)

    play(many("dead"), story)
    assert {name for _, name in names.asked} == {CONTROL_PLANE, *many("dead")}
    assert names.most_threads <= 0.8 * MAX_LOOKUPS
    assert names.times(CONTROL_PLANE)[:3] == pytest.approx([0, 60.2, 120.4])


def test_new_name_comes_before_dead_ones_that_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)

    async def story(stage: Stage) -> None:
        await asyncio.sleep(601)
        stage.node.fold(PeerAdded(peer(200, endpoint="new.example.org:51820")))
        await stage.converger.apply_event()
        await asyncio.sleep(10)
        assert stage.resolved == {"new.example.org:51820": Endpoint(parse_ip("192.0.2.7"), 51820)}

    play(many("dead"), story)
    assert len(names.times("new.example.org")) == 1


def test_dead_name_is_looked_up_once_a_minute_whatever_else_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)

    async def story(stage: Stage) -> None:
        for number in range(200):  # in 20 s
            stage.node.fold(PeerAdded(peer(3, endpoint=f"192.0.2.{number + 1}:51820")))
            await stage.converger.apply_event()
            await asyncio.sleep(0.1)
        await asyncio.sleep(130)

    play(("dead.example.org",), story)
    assert names.times("dead.example.org") == pytest.approx([0, 60, 120], abs=0.5)
    assert names.times(CONTROL_PLANE) == pytest.approx([0, 60.2, 120.4])


def test_news_of_a_name_ask_for_a_pass_and_the_same_answer_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    text = "p.example.org:51820"

    async def story(stage: Stage) -> None:
        await asyncio.sleep(150)
        assert stage.asked.times("endpoint names resolved") == pytest.approx([0.2], abs=0.1)
        names.addresses["p.example.org"] = "192.0.2.8"
        await asyncio.sleep(60)
        assert stage.resolved == {text: Endpoint(parse_ip("192.0.2.8"), 51820)}
        assert len(stage.asked.times("endpoint names resolved")) == 2

    play(("p.example.org",), story)


def test_address_in_use_gives_way_once_only_another_one_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    text, ipv4, ipv6 = "p.example.org:51820", "203.0.113.9", "2001:db8::9"
    names.addresses["p.example.org"] = f"{ipv4} {ipv6}"

    async def story(stage: Stage) -> None:
        await asyncio.sleep(1)
        for unreachable, expected in (
            (set(), ipv4),
            ({ipv4, ipv6}, ipv4),
            ({ipv4}, ipv6),
            ({ipv4, ipv6}, ipv6),
            (set(), ipv6),  # good enough: a change would only cost packets
        ):
            names.unreachable = unreachable
            await asyncio.sleep(60)
            assert stage.resolved == {text: Endpoint(parse_ip(expected), 51820)}
        assert len(stage.asked.times("endpoint names resolved")) == 2

    play(("p.example.org",), story)


def test_name_that_nobody_has_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, seconds=2.0)

    async def story(stage: Stage) -> None:
        await asyncio.sleep(1)
        stage.node.fold(PeerRemoved("n_2"))  # while it is looked up
        await stage.converger.apply_event()
        await asyncio.sleep(130)
        assert stage.resolved == {}

    play(("p.example.org",), story)
    assert len(names.times("p.example.org")) == 1
