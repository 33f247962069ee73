"""The node's key is replaced: the same new key through every retry, and after a crash at any point."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import Conflict, ControlError, NotFound, Rejected, Unauthenticated, WireError
from plexd.identity.rotation import Rotation
from plexd.mesh.desired import Peer
from plexd.mesh.keys import PresharedKey, PrivateKey, PublicKey
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.store.files import DataDirectory
from plexd.store.identity import PENDING_KEY, PRIVATE_KEY, Identity, IdentityStore
from tests.fakes import FakeKernel
from tests.node_harness import EPOCH, OWN_KEY, Asked, make_node, peer, settings_of
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

PSK = PresharedKey(bytes([0xA1] * 32))
LOST = WireError("the answer was damaged")


@dataclass
class Keeper:
    """A control plane that meets rotation n (from 1) with an error or the peers' new records."""

    answers: list[Exception | Sequence[Peer]] = field(default_factory=list)
    seconds: float = 0.0
    offered: list[PublicKey] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    async def rotate_key(self, new_key: PublicKey) -> Sequence[Peer]:
        self.offered.append(new_key)
        self.times.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.seconds)
        answer = self.answers.pop(0) if self.answers else ()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Stage:
    """A registered node with its files, a kernel in memory, and the rotation at work."""

    def __init__(self, directory: Path, keeper: Keeper, identity: Identity | None = None) -> None:
        self.opened = DataDirectory(directory)
        self.store = IdentityStore(self.opened)
        self.health = Health()
        self.node: Node = make_node(peer(2), peer(3), health=self.health, identity=identity)
        self.kernel = FakeKernel()
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings_of, self.health, lambda: EPOCH)
        self.converger = Converger([self.mesh.resource], self.health)
        self.pulls = Asked()
        self.rotation = Rotation(keeper, self.store, self.node, self.converger.apply_event, self.pulls)
        self.heartbeats = 0
        self.rotation.on_rotated.append(self._count)

    def _count(self) -> None:
        self.heartbeats += 1

    async def run(self, seconds: float, *requests: float) -> None:
        await self.converger.converge()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(self.rotation.run())
        for when in requests:
            loop.call_at(when, self.rotation.request, "test")
        await asyncio.sleep(seconds)
        assert not task.done(), task
        task.cancel()
        await asyncio.wait({task})
        self.opened.close()


def rotate(directory: Path, keeper: Keeper, *requests: float, seconds: float = 1000) -> Stage:
    async def main() -> Stage:
        stage = Stage(directory, keeper)
        await stage.run(seconds, *requests)
        return stage

    (directory / PRIVATE_KEY).write_text(OWN_KEY.reveal())
    return run_virtual(main())


def key_in(path: Path) -> PublicKey:
    return PrivateKey.parse(path.read_text().strip()).public()


def test_nothing_is_rotated_unasked(tmp_path: Path) -> None:
    keeper = Keeper()
    rotate(tmp_path, keeper)
    assert keeper.offered == []


def test_rotation_ends_with_the_new_key_on_disk_and_in_the_kernel(tmp_path: Path) -> None:
    keeper = Keeper([[peer(2)._replace(psk=PSK)]])
    stage = rotate(tmp_path, keeper, 1)
    new = keeper.offered[0]
    assert new == key_in(tmp_path / PRIVATE_KEY)
    assert not (tmp_path / PENDING_KEY).exists()
    assert stage.node.identity.private_key is not None
    assert stage.node.identity.private_key.public() == new
    assert stage.kernel.private_key == stage.node.identity.private_key
    assert stage.kernel.peers[peer(2).public_key].psk == bytes(PSK)
    assert stage.kernel.peers[peer(3).public_key].psk != bytes(PSK)
    assert stage.pulls.reasons == ["key rotation"]
    assert stage.heartbeats == 1
    assert stage.node.generation >= 1


async def test_new_key_is_told_once_it_is_accepted_and_before_it_is_committed(tmp_path: Path) -> None:
    (tmp_path / PRIVATE_KEY).write_text(OWN_KEY.reveal())
    keeper = Keeper([LOST, ()])
    stage = Stage(tmp_path, keeper)
    told: list[PublicKey] = []

    async def tell(key: PublicKey) -> None:
        assert len(keeper.offered) == 2
        assert key_in(tmp_path / PENDING_KEY) == key
        assert key_in(tmp_path / PRIVATE_KEY) == OWN_KEY.public()
        told.append(key)

    stage.rotation.on_accepted.append(tell)
    await stage.run(1000, 1)
    assert told == [keeper.offered[0]] == [key_in(tmp_path / PRIVATE_KEY)]


def test_old_key_stays_on_the_interface_until_the_answer(tmp_path: Path) -> None:
    stage = rotate(tmp_path, Keeper(seconds=5000.0), 1)
    assert stage.kernel.private_key == OWN_KEY
    assert key_in(tmp_path / PRIVATE_KEY) == OWN_KEY.public()
    assert (tmp_path / PENDING_KEY).exists()


def test_lost_answers_are_followed_by_the_same_key(tmp_path: Path) -> None:
    keeper = Keeper([LOST, Unauthenticated("401", status=401), LOST, ()])
    rotate(tmp_path, keeper, 1)
    assert len(keeper.offered) == 4
    assert set(keeper.offered) == {key_in(tmp_path / PRIVATE_KEY)}


def test_401_does_not_make_a_busy_loop(tmp_path: Path) -> None:
    keeper = Keeper([Unauthenticated("401", status=401) for _ in range(1000)])
    rotate(tmp_path, keeper, 1, seconds=3600)
    assert len(keeper.offered) <= 61
    assert len(set(keeper.offered)) == 1


async def test_rotation_waits_while_the_identity_is_refused(tmp_path: Path) -> None:
    keeper = Keeper()
    stage = Stage(tmp_path, keeper)
    stage.node.refuse()
    asyncio.get_running_loop().call_at(500, stage.node.accept, stage.node.credential())
    await stage.run(1000, 1)
    assert keeper.times == [500]


def test_request_during_a_rotation_is_absorbed(tmp_path: Path) -> None:
    keeper = Keeper(seconds=10.0)
    rotate(tmp_path, keeper, 1, 2, 3, 10)
    assert len(keeper.offered) == 1


def test_request_after_a_rotation_makes_another_key(tmp_path: Path) -> None:
    keeper = Keeper()
    rotate(tmp_path, keeper, 1, 100)
    assert len(set(keeper.offered)) == 2


@pytest.mark.parametrize(
    "error",
    [Conflict("409", status=409), Rejected("400", status=400), Rejected("422", status=422)]
    + [NotFound(str(status), status=status) for status in (404, 405, 501)],
    ids=str,
)
def test_refused_rotation_drops_the_new_key_and_keeps_the_old(tmp_path: Path, error: ControlError) -> None:
    keeper = Keeper([error, ()])
    stage = rotate(tmp_path, keeper, 1)
    assert len(keeper.offered) == 1
    assert not (tmp_path / PENDING_KEY).exists()
    assert key_in(tmp_path / PRIVATE_KEY) == OWN_KEY.public()
    assert stage.kernel.private_key == OWN_KEY
    assert stage.heartbeats == 0


def test_stop_after_the_rename_leaves_one_key_in_memory_and_on_disk(tmp_path: Path) -> None:
    """A pause, for another identity, must not find the node with a key that the disk has given up."""

    async def main() -> None:
        stage = Stage(tmp_path, Keeper())
        renamed = asyncio.Event()
        loop, commit = asyncio.get_running_loop(), stage.store.commit_pending_key

        def commit_and_tell() -> None:
            commit()
            loop.call_soon_threadsafe(renamed.set)

        stage.store.commit_pending_key = commit_and_tell  # type: ignore[method-assign]
        stage.rotation.request("test")
        task = asyncio.create_task(stage.rotation.run())
        await renamed.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert stage.node.identity.private_key is not None
        assert stage.node.identity.private_key.public() == key_in(tmp_path / PRIVATE_KEY) != OWN_KEY.public()
        stage.opened.close()

    (tmp_path / PRIVATE_KEY).write_text(OWN_KEY.reveal())
    run_virtual(main())


def test_crash_before_the_rename_goes_on_with_the_pending_key(tmp_path: Path) -> None:
    rotate(tmp_path, Keeper(seconds=5000.0), 1)
    pending = key_in(tmp_path / PENDING_KEY)
    keeper = Keeper()
    stage = rotate(tmp_path, keeper)
    assert keeper.offered == [pending] == [key_in(tmp_path / PRIVATE_KEY)]
    assert stage.kernel.private_key is not None
    assert stage.kernel.private_key.public() == pending


def test_crash_after_the_rename_starts_with_the_new_key(tmp_path: Path) -> None:
    class Killed(BaseException):
        """Nothing runs after it."""

    async def main() -> None:
        stage = Stage(tmp_path, Keeper())
        commit = stage.store.commit_pending_key

        def commit_and_die() -> None:
            commit()
            raise Killed

        stage.store.commit_pending_key = commit_and_die  # type: ignore[method-assign]
        stage.rotation.request("test")
        with pytest.raises(Killed):
            await stage.rotation.run()
        stage.opened.close()

    run_virtual(main())
    new = key_in(tmp_path / PRIVATE_KEY)
    assert new != OWN_KEY.public()

    async def restart() -> None:
        keeper = Keeper()
        opened = DataDirectory(tmp_path)
        identity = replace(make_node().identity, private_key=PrivateKey.parse((tmp_path / PRIVATE_KEY).read_text()))
        opened.close()
        stage = Stage(tmp_path, keeper, identity)
        await stage.run(100)
        assert keeper.offered == []
        assert stage.kernel.private_key is not None
        assert stage.kernel.private_key.public() == new

    run_virtual(restart())


async def test_lost_private_key_is_replaced_at_start(tmp_path: Path) -> None:
    keeper = Keeper()
    stage = Stage(tmp_path, keeper, replace(make_node().identity, private_key=None))
    await stage.run(100)
    assert len(keeper.offered) == 1
    assert stage.node.identity.private_key is not None
    assert stage.pulls.reasons == ["key rotation"]


def test_kernel_that_refuses_the_new_key_does_not_bring_the_old_one_back(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = Keeper()
        stage = Stage(tmp_path, keeper)
        asyncio.get_running_loop().call_at(1, setattr, stage.kernel, "refuse", lambda _: "no")
        await stage.run(100, 2)
        assert key_in(tmp_path / PRIVATE_KEY) == keeper.offered[0]
        stage.kernel.refuse = lambda _: None
        await stage.converger.converge()
        assert stage.kernel.private_key == stage.node.identity.private_key

    (tmp_path / PRIVATE_KEY).write_text(OWN_KEY.reveal())
    run_virtual(main())


def test_invalid_updated_peer_costs_only_itself(tmp_path: Path) -> None:
    taken = peer(4, key=peer(3).public_key)
    stage = rotate(tmp_path, Keeper([[taken, peer(2)._replace(psk=PSK)]]), 1)
    assert stage.kernel.peers[peer(2).public_key].psk == bytes(PSK)
    assert set(stage.node.desired.peers) == {"n_2", "n_3"}


async def test_rotation_asked_of_the_old_node_is_not_done_by_the_new_one(tmp_path: Path) -> None:
    keeper = Keeper()
    stage = Stage(tmp_path, keeper)
    stage.rotation.request("test")
    stage.node.renew(replace(stage.node.identity, node_id="n_new"), stage.node.desired, 0.0)
    await stage.run(100)
    assert keeper.offered == []
