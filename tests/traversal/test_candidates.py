"""Peers that do not answer try their candidates in turn, while passes go on beside it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.mesh.address import Endpoint, parse_ip
from plexd.mesh.changes import AddRoute, PutPeer
from plexd.mesh.desired import EndpointSource
from plexd.mesh.events import EndpointOffered, PeerAdded, PeerRemoved
from plexd.mesh.observed import HANDSHAKE_FRESH_SECONDS
from plexd.node.health import Health
from plexd.runtime.clocks import Clocks, Reading
from plexd.traversal.candidates import Fallback
from tests.fakes import FakeKernel
from tests.node_harness import make_node, peer, public_key, settings_of, state_of, unix_time
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

E, R = EndpointSource.EVENT, EndpointSource.REPORT
DIRECT, RELAY, NEWS = "192.0.2.2:51820", "203.0.113.5:51821", "192.0.2.9:51820"
ROAMED = Endpoint(parse_ip("192.0.2.2"), 4444)


class Stage:
    """A node with one peer, whose direct path and relay are known."""

    def __init__(self) -> None:
        self.node = make_node(peer(2))
        self.node.fold(EndpointOffered("n_2", RELAY, E))
        self.node.fold(EndpointOffered("n_2", DIRECT, R))
        self.kernel = FakeKernel()
        self.unseen = 0.0  # seconds that only the wall clock and that since boot have counted
        self.mesh = build_mesh(
            self.kernel, self.kernel.table, self.node, settings_of, Health(), lambda: unix_time() + self.unseen
        )
        self.converger = Converger([self.mesh.resource], Health())
        self.seen: list[tuple[int, str]] = []  # since when, in seconds, the peer has had which endpoint

    def endpoint(self) -> str:
        return str(self.kernel.peers[public_key(2)].endpoint)

    def read_clocks(self) -> Reading:
        now = asyncio.get_running_loop().time()
        return Reading(now, now + self.unseen, unix_time() + self.unseen)

    async def run(self, seconds: int, meanwhile: Callable[[int], Awaitable[None]] | None = None) -> None:
        """With a pass and a look at the kernel every second; passes have nothing to do but what `meanwhile` caused."""
        await self.converger.converge()
        clocks = Clocks(self.read_clocks)
        clocks.on_gap.append(lambda _: self.mesh.trials.restart(asyncio.get_running_loop().time()))
        mesh = self.mesh.resource
        try_next = partial(self.converger.step, mesh, mesh.look_at_endpoints, "endpoints not changed")
        fallback = Fallback(try_next, clocks.look)
        running = [asyncio.create_task(service) for service in (fallback.run(), clocks.run())]
        for second in range(seconds):
            if meanwhile is not None:
                await meanwhile(second)
            await self.converger.converge()
            if not self.seen or self.seen[-1][1] != self.endpoint():
                self.seen.append((second, self.endpoint()))
            await asyncio.sleep(1)
        for task in running:
            task.cancel()


def run(seconds: int, meanwhile: Callable[[Stage, int], Awaitable[None]] | None = None) -> Stage:
    async def main() -> Stage:
        stage = Stage()

        async def step(second: int) -> None:
            if meanwhile is not None:
                await meanwhile(stage, second)

        await stage.run(seconds, step)
        return stage

    return run_virtual(main())


def test_peer_that_never_answers_changes_its_endpoint_every_30_seconds() -> None:
    stage = run(130)
    assert [endpoint for _, endpoint in stage.seen] == [DIRECT, RELAY, DIRECT, RELAY, DIRECT]
    changes = [at for at, _ in stage.seen]
    assert all(30 <= after - before <= 46 for before, after in itertools.pairwise(changes))


def test_peer_that_answers_over_the_relay_stays_there_and_moves_on_once_it_falls_silent() -> None:
    async def answer_over_the_relay(stage: Stage, second: int) -> None:
        if stage.endpoint() == RELAY and second < 300:
            stage.kernel.shake_hands(public_key(2), unix_time())

    stage = run(300 + HANDSHAKE_FRESH_SECONDS + 25, answer_over_the_relay)
    assert [endpoint for _, endpoint in stage.seen] == [DIRECT, RELAY, DIRECT]
    assert 300 + HANDSHAKE_FRESH_SECONDS <= stage.seen[-1][0] <= 300 + HANDSHAKE_FRESH_SECONDS + 20


def test_silent_peer_moves_on_although_the_clock_was_set_back_since_its_handshake() -> None:
    async def shake_hands_in_an_hour(stage: Stage, second: int) -> None:
        if second == 0:
            stage.kernel.shake_hands(public_key(2), unix_time() + 3600)
            status = await stage.mesh.view.status()
            assert status is not None
            assert status.fresh_peers == 0

    assert len(run(60, shake_hands_in_an_hour).seen) > 1


@pytest.mark.parametrize("second", range(60, 75))  # wherever the round stands
def test_peer_that_answered_before_a_suspend_has_time_to_answer_after_it(second: int) -> None:
    async def sleep_for_an_hour(stage: Stage, now: int) -> None:
        if now < second:
            stage.kernel.shake_hands(public_key(2), unix_time())
        elif now == second:
            stage.unseen = 3600.0

    stage = run(second + 50, sleep_for_an_hour)
    assert [endpoint for _, endpoint in stage.seen] == [DIRECT, RELAY]
    assert second + 30 <= stage.seen[1][0]


def test_news_of_an_endpoint_end_the_round() -> None:
    async def tell(stage: Stage, second: int) -> None:
        if second == 50:
            assert stage.endpoint() == RELAY
            stage.node.fold(EndpointOffered("n_2", NEWS, E))
            assert await stage.converger.apply_event()

    stage = run(150, tell)
    # the relay was what the events had named before: two candidates are left
    assert [endpoint for _, endpoint in stage.seen] == [DIRECT, RELAY, NEWS, DIRECT, NEWS]
    assert stage.seen[2][0] == 50
    assert stage.seen[3][0] - stage.seen[2][0] >= 30


def test_peer_moves_on_although_another_one_gets_new_endpoints_all_the_time() -> None:
    async def tell(stage: Stage, second: int) -> None:
        if second == 0:
            stage.node.fold(PeerAdded(peer(3, endpoint="198.51.100.3:1")))
            stage.node.fold(EndpointOffered("n_3", "198.51.100.3:2", E))
        elif second % 20 == 0:
            stage.node.fold(EndpointOffered("n_2", f"192.0.2.9:{1000 + second}", E))
        assert await stage.converger.apply_event()

    stage = run(50, tell)
    assert str(stage.kernel.peers[public_key(3)].endpoint) == "198.51.100.3:1"


def test_endpoint_that_roamed_is_left_alone_by_passes_and_rounds() -> None:
    async def roam(stage: Stage, second: int) -> None:
        if second >= 10:
            stage.kernel.roam(public_key(2), ROAMED, unix_time())

    stage = run(120, roam)
    assert [endpoint for _, endpoint in stage.seen] == [DIRECT, str(ROAMED)]


async def test_peer_that_roamed_keeps_its_endpoint_when_an_event_about_another_finds_its_name_resolved_anew() -> None:
    stage = Stage()
    name = "p2.example.org:51820"
    stage.node.fold(EndpointOffered("n_2", name, E))
    stage.mesh.wanted.resolved[name] = Endpoint(parse_ip("192.0.2.2"), 51820)
    await stage.converger.converge()
    stage.kernel.roam(public_key(2), ROAMED, unix_time())
    stage.mesh.wanted.resolved[name] = Endpoint(parse_ip("192.0.2.77"), 51820)
    stage.node.fold(PeerAdded(peer(3)))
    assert await stage.converger.apply_event()
    assert public_key(3) in stage.kernel.peers
    assert stage.endpoint() == str(ROAMED)
    await asyncio.sleep(200)  # silent by now: the new address is tried
    await stage.converger.converge()
    assert stage.endpoint() == "192.0.2.77:51820"


async def hear_of_no_endpoint(stage: Stage) -> None:
    stage.node.fold(EndpointOffered("n_2", NEWS, E))
    assert await stage.converger.apply_event()
    stage.kernel.shake_hands(public_key(2), unix_time())
    stage.node.fold(EndpointOffered("n_2", "", E))
    assert await stage.converger.apply_event()


async def pull_no_endpoint(stage: Stage) -> None:
    stage.node.replace(state_of(peer(2, endpoint=NEWS)), unix_time())
    await stage.converger.converge()
    stage.kernel.shake_hands(public_key(2), unix_time())
    stage.node.replace(state_of(peer(2)), unix_time())


@pytest.mark.parametrize("lose_endpoint", [hear_of_no_endpoint, pull_no_endpoint])
async def test_peer_that_answers_stays_where_it_is_when_its_endpoint_is_taken_back(
    lose_endpoint: Callable[[Stage], Awaitable[None]],
) -> None:
    stage = Stage()
    await stage.converger.converge()
    await lose_endpoint(stage)
    await stage.converger.converge()
    assert stage.endpoint() == NEWS
    await asyncio.sleep(HANDSHAKE_FRESH_SECONDS + 1)
    await stage.converger.converge()
    assert stage.endpoint() == DIRECT


async def test_peers_that_come_and_go_leave_nothing_in_memory() -> None:
    stage = Stage()
    await stage.converger.converge()
    for number in range(20):
        passing = peer(3, endpoint=NEWS)._replace(id=f"n_{number}00")
        stage.node.fold(PeerAdded(passing))
        assert await stage.converger.apply_event()
        stage.node.fold(PeerRemoved(passing.id))
        assert await stage.converger.apply_event()
        await asyncio.sleep(60)
    assert len(stage.mesh.trials._set_at) == 1


def test_rounds_write_nothing_but_endpoints() -> None:
    stage = run(100)
    built = [type(change) for change in stage.kernel.applied].index(PutPeer) + 1
    later = [change for change in stage.kernel.applied[built:] if not isinstance(change, AddRoute)]
    assert len(later) == len(stage.seen) - 1 > 1
    for change in later:
        assert isinstance(change, PutPeer)
        assert change.fields == ("endpoint",)
        assert (change.is_new, change.psk, change.keepalive, change.allowed_ips) == (False, None, None, None)
