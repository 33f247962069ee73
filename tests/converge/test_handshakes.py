"""Peers that do not answer are tried again sooner than WireGuard does it, and not for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from plexd.converge.assembly import build_mesh
from plexd.converge.handshakes import Handshakes
from plexd.converge.passes import Converger
from plexd.mesh.address import Endpoint, parse_ip
from plexd.mesh.changes import Change, PutPeer, RemovePeer, SetDevice
from plexd.mesh.desired import EndpointSource, Peer
from plexd.mesh.events import EndpointOffered, PeerAdded
from plexd.mesh.keys import PrivateKey, PublicKey
from plexd.mesh.observed import Backend
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.store.identity import Identity
from tests.fakes import FakeKernel
from tests.node_harness import OWN_KEY, Asked, make_node, peer, public_key, settings_of, unix_time
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

OWN = OWN_KEY.public()
NEXT_KEY = PrivateKey(bytes([9] * 32))
# towards the first this node is the eager one, also under its next key, towards the second the patient one
AFTER, BEFORE = PublicKey(bytes([0xFF] * 32)), PublicKey(bytes(31) + b"\1")
ROAMED = Endpoint(parse_ip("198.51.100.7"), 4444)
EAGER_AT, PATIENT_AT = [0.4, 1.0, 3.0], [1.8]


def near(number: int, key: PublicKey = AFTER, endpoint: str = "192.0.2.2:51820") -> Peer:
    return peer(number, endpoint=endpoint, key=key)


class Stage:
    def __init__(
        self,
        *peers: Peer,
        settings: Callable[[Identity], Settings | None] = settings_of,
        backend: Backend = Backend.KERNEL,
    ) -> None:
        self.node = make_node()
        for each in peers:
            self.node.fold(PeerAdded(each))
        self.kernel = FakeKernel(backend=backend)
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings, Health(), unix_time)
        self.converger = Converger([self.mesh.resource], Health())
        self.passes = Asked()
        self.handshakes = Handshakes(self.kernel, self.mesh.resource, self.mesh.retries, self.converger, self.passes)
        self.begun: list[tuple[float, str]] = []
        self.kernel.refuse = self._note

    def _note(self, change: Change) -> str | None:
        if isinstance(change, PutPeer) and change.is_new and self.converger.clean.is_set():
            self.begun.append((round(asyncio.get_running_loop().time(), 3), change.peer_id))
        return None

    async def run(self, seconds: float) -> None:
        running = asyncio.create_task(self.handshakes.run())
        await asyncio.sleep(seconds)
        assert not running.done(), running
        running.cancel()
        await asyncio.wait({running})

    def times(self, peer_id: str) -> list[float]:
        return [at for at, begun in self.begun if begun == peer_id]


def tried(*peers: Peer, settings: Callable[[Identity], Settings | None] = settings_of) -> Stage:
    """A start from nothing, and an hour in which nobody answers."""

    async def main() -> Stage:
        stage = Stage(*peers, settings=settings)
        await stage.converger.converge()
        await stage.run(3600)
        assert (await stage.converger.converge()).changed == 0
        return stage

    return run_virtual(main())


def test_eager_node_tries_three_times_the_patient_one_once_and_then_it_is_up_to_wireguard() -> None:
    stage = tried(near(2), near(3, BEFORE))
    assert OWN < AFTER
    assert OWN > BEFORE
    assert stage.times("n_2") == EAGER_AT
    assert stage.times("n_3") == PATIENT_AT
    assert not stage.mesh.retries.awaiting.is_set()
    assert stage.passes.reasons == []


def test_peer_without_endpoint_or_keepalive_is_left_alone() -> None:
    assert tried(near(2, endpoint="")).begun == []

    def silent(identity: Identity) -> Settings | None:
        settings = settings_of(identity)
        return settings and replace(settings, keepalive=0)

    assert tried(near(2), settings=silent).begun == []


async def test_peer_is_put_back_as_it_was_where_it_was_last_heard() -> None:
    stage = Stage(near(2))
    await stage.converger.converge()
    held = stage.kernel.peers[AFTER]
    stage.kernel.roam(AFTER, ROAMED, handshake=0.0)
    stage.kernel.applied.clear()
    await stage.run(0.5)
    assert [type(change) for change in stage.kernel.applied] == [RemovePeer, PutPeer]
    assert stage.kernel.peers[AFTER] == held._replace(endpoint=ROAMED)


async def test_peer_that_has_shaken_hands_is_not_touched() -> None:
    stage = Stage(near(2))
    await stage.converger.converge()
    stage.kernel.shake_hands(AFTER, unix_time())
    looks = stage.kernel.device_looks
    await stage.run(3600)
    assert stage.begun == []
    assert stage.kernel.device_looks == looks + 1


@pytest.mark.parametrize(("backend", "begun"), [(Backend.KERNEL, []), (Backend.USERSPACE, [1.0])])
async def test_peer_that_shook_hands_and_is_not_heard_is_begun_anew_where_that_may_be_deafness(
    backend: Backend, begun: list[float]
) -> None:
    stage = Stage(near(2), backend=backend)
    await stage.converger.converge()
    loop = asyncio.get_running_loop()
    for at, received, sent in ((0.1, 92, 276), (0.8, 92, 1000), (1.5, 220, 404)):
        loop.call_later(at, stage.kernel.shake_hands, AFTER, unix_time() + at)
        loop.call_later(at, stage.kernel.carry, AFTER, received, sent)
    await stage.run(3600)
    assert not stage.mesh.retries.awaiting.is_set()
    assert stage.times("n_2") == begun


async def test_peer_that_is_heard_after_its_handshake_is_looked_at_no_more() -> None:
    stage = Stage(near(2), backend=Backend.USERSPACE)
    await stage.converger.converge()
    stage.kernel.shake_hands(AFTER, unix_time())
    looks = stage.kernel.device_looks
    asyncio.get_running_loop().call_later(0.5, stage.kernel.carry, AFTER, 128, 1000)
    await stage.run(3600)
    assert stage.begun == []
    assert stage.kernel.device_looks == looks + 2


async def test_peer_that_answers_the_second_try_is_not_tried_a_third_time() -> None:
    stage = Stage(near(2))
    await stage.converger.converge()
    asyncio.get_running_loop().call_later(1.1, lambda: stage.kernel.shake_hands(AFTER, unix_time()))
    await stage.run(3600)
    assert stage.times("n_2") == EAGER_AT[:2]


async def test_peer_that_comes_with_an_event_gets_its_own_tries_and_those_before_it_no_more() -> None:
    stage = Stage(near(2))
    await stage.converger.converge()

    async def add() -> None:
        await asyncio.sleep(100)
        stage.node.fold(PeerAdded(near(4, public_key(0xF0))))
        assert await stage.converger.apply_event()
        stage.begun.clear()

    adding = asyncio.create_task(add())
    await stage.run(3600)
    await adding
    assert stage.begun == [(100.4, "n_4"), (101.0, "n_4"), (103.0, "n_4")]


async def test_event_during_the_look_is_not_undone() -> None:
    stage = Stage(near(2))
    await stage.converger.converge()
    observe = stage.kernel.observe

    async def look_while_it_moves(*args: object, **kwargs: object) -> object:
        seen = await observe()
        stage.kernel.observe = observe  # type: ignore[method-assign]
        stage.node.fold(EndpointOffered("n_2", "192.0.2.9:51820", EndpointSource.EVENT))
        assert await stage.converger.apply_event()
        return seen

    stage.kernel.observe = look_while_it_moves  # type: ignore[method-assign, assignment]
    await stage.run(3600)
    assert str(stage.kernel.peers[AFTER].endpoint) == "192.0.2.9:51820"
    assert stage.times("n_2") == EAGER_AT[1:]


def rotated(handshake: float) -> Stage:
    """A new key of ours, and a peer that shook hands `handshake` seconds before it, and not again."""

    async def main() -> Stage:
        stage = Stage(near(2))
        await stage.converger.converge()
        await stage.run(1000)
        stage.begun.clear()
        stage.kernel.shake_hands(AFTER, unix_time() - handshake)
        stage.node.rotate(replace(stage.node.identity, private_key=NEXT_KEY))
        await stage.converger.apply_event()
        await stage.run(3600)
        return stage

    assert NEXT_KEY.public() < AFTER
    return run_virtual(main())


def test_peer_out_of_touch_after_a_new_key_of_ours_is_tried_again() -> None:
    assert rotated(10.0).times("n_2") == [1000 + at for at in EAGER_AT]


def test_peer_out_of_touch_before_a_new_key_of_ours_is_left_to_wireguard() -> None:
    assert rotated(200.0).begun == []


async def test_sessions_outlive_a_new_key_that_was_refused_until_it_is_taken() -> None:
    stage = Stage(near(2))
    await stage.converger.converge()
    await stage.run(1000)
    stage.kernel.shake_hands(AFTER, unix_time() - 10)
    stage.node.rotate(replace(stage.node.identity, private_key=NEXT_KEY))
    stage.kernel.applied.clear()
    stage.kernel.refuse = lambda change: "no" if isinstance(change, SetDevice) else None
    assert not await stage.converger.apply_event()
    await stage.run(10)
    assert RemovePeer("n_2", AFTER) not in stage.kernel.applied
    stage.kernel.refuse = lambda change: None
    await stage.converger.converge()
    await stage.run(10)
    assert stage.kernel.applied.count(RemovePeer("n_2", AFTER)) == len(EAGER_AT)


async def test_key_set_once_more_ends_no_session() -> None:
    """An event failed beside the new key, and the next one says all of it again."""
    stage = Stage(near(2))
    await stage.converger.converge()
    stage.kernel.shake_hands(AFTER, unix_time())
    await stage.run(1000)
    stage.kernel.shake_hands(AFTER, unix_time() - 10)
    refused = public_key(0xF0)
    stage.kernel.refuse = lambda change: "no" if isinstance(change, PutPeer) and change[1] == refused else None
    stage.node.rotate(replace(stage.node.identity, private_key=NEXT_KEY))
    stage.node.fold(PeerAdded(near(4, refused)))
    assert not await stage.converger.apply_event()
    stage.kernel.shake_hands(AFTER, unix_time() + 0.1)
    await stage.run(10)
    assert not await stage.converger.apply_event()
    stage.kernel.refuse = lambda change: None
    await stage.converger.converge()
    stage.kernel.applied.clear()
    await stage.run(10)
    assert RemovePeer("n_2", AFTER) not in stage.kernel.applied
    assert RemovePeer("n_4", refused) in stage.kernel.applied


async def test_pass_is_asked_for_when_a_peer_may_be_missing() -> None:
    stage = Stage(near(2))
    await stage.converger.converge()
    stage.kernel.refuse = lambda change: "no" if isinstance(change, PutPeer) else None
    await stage.run(0.5)
    assert stage.passes.reasons == ["handshakes not tried again"]
    assert not stage.converger.clean.is_set()
    stage.kernel.refuse = lambda change: None
    await stage.converger.converge()
    assert AFTER in stage.kernel.peers
