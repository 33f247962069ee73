"""A running node becomes another one: in one step, on disk and in the kernel, and a crash leaves either of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import Conflict, ControlError, Rejected, Transient, Unauthenticated, WireError
from plexd.identity.reenrolment import Reenrolment
from plexd.identity.registration import Granted, Registrar
from plexd.mesh.address import format_ip, parse_ip
from plexd.mesh.desired import DataEntry, Desired, Peer, SigningKeys
from plexd.mesh.keys import PublicKey
from plexd.node.health import Condition, Health
from plexd.node.persist import Persist
from plexd.node.state import Node
from plexd.runtime.supervisor import Supervisor
from plexd.store.files import DataDirectory
from plexd.store.identity import Identity, IdentityStore
from plexd.store.snapshot import SnapshotStore
from plexd.store.token import BootstrapToken, NoToken
from plexd.wire.mapping import Registered
from tests.fakes import FakeKernel
from tests.node_harness import NEW_KEY, OLD_KEY, make_identity, peer, public, settings_of, unix_time
from tests.store.crash import crashes
from tests.virtual_time import run_virtual

T = TypeVar("T")

NEW_NODE_KEY = SecretStr("node-key-of-the-new-node")
NEW_IP = parse_ip("10.100.0.77")
OLD_ENTRY = DataEntry("k", "application/json", "1", 1, "2026-01-01T00:00:00Z")
OLD_DESIRED = Desired(
    peers={p.id: p for p in (peer(2), peer(3))},
    signing_keys=SigningKeys(public(OLD_KEY)),
    metadata=MappingProxyType({"zone": "a"}),
    data=MappingProxyType({"k": OLD_ENTRY}),
    secret_refs=MappingProxyType({"db": 3}),
)
REFUSALS = [
    Unauthenticated("401", status=401),
    Conflict("409", status=409),
    Rejected("422", status=422),
    WireError("?"),
]


def token(text: str, file: Path | None = None) -> BootstrapToken:
    return BootstrapToken(SecretStr(text), file)


@dataclass
class Tokens:
    """What the sources hold."""

    held: list[BootstrapToken] = field(default_factory=list)
    forgotten: list[BootstrapToken] = field(default_factory=list)

    async def find(self, refused: Collection[SecretStr]) -> BootstrapToken:
        for candidate in self.held:
            if candidate.value not in refused:
                return candidate
        raise NoToken("no bootstrap token: looked everywhere")

    def forget(self, used: BootstrapToken) -> None:
        self.forgotten.append(used)


@dataclass
class Registry:
    """A control plane that meets each registration with the next error, or with the new node."""

    errors: list[ControlError | WireError] = field(default_factory=list)
    peers: tuple[Peer, ...] = (peer(3), peer(4))
    node_id: str = "n_new"
    asked: list[tuple[str, PublicKey]] = field(default_factory=list)

    async def register(self, bootstrap: SecretStr, public_key: PublicKey) -> Registered:
        self.asked.append((bootstrap.get_secret_value(), public_key))
        await asyncio.sleep(1)
        if self.errors:
            raise self.errors.pop(0)
        return Registered(self.node_id, NEW_IP, NEW_NODE_KEY, SigningKeys(public(NEW_KEY)), self.peers, ())


class Work:
    """A service; the node ids it was started for, and how often it was ended."""

    name = "work"

    def __init__(self, node: Node) -> None:
        self._node = node
        self.started: list[str] = []
        self.ended = 0
        self.has_ended = asyncio.Event()

    async def run(self) -> None:
        self.started.append(self._node.identity.node_id)
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1
            self.has_ended.set()


class Stage:
    """A registered node with its files, a kernel in memory, and a service at work."""

    def __init__(self, directory: Path, registry: Registry, tokens: Tokens) -> None:
        self.directory = DataDirectory(directory)
        self.identities = IdentityStore(self.directory)
        self.snapshots = SnapshotStore(self.directory)
        identity = self.identities.load()
        assert identity is not None
        self.health = Health()
        self.node = Node(identity, OLD_DESIRED, unix_time(), self.health)
        self.kernel = FakeKernel()
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings_of, self.health, unix_time)
        self.converger = Converger([self.mesh.resource], self.health)
        self.persist = Persist(self.node, self.snapshots, self.identities)
        self.work = Work(self.node)
        self.supervisor = Supervisor(lambda _: None)
        self.registrar = Registrar(registry, self.identities, self.snapshots)
        self.renewal = Reenrolment(
            self.node,
            self.identities,
            self.snapshots,
            self.registrar,
            tokens,
            self.supervisor.paused,
            self.persist.writing,
            self.converger.converge,
        )

    async def run(self, test: Callable[[Stage], Awaitable[T]]) -> T:
        await self.converger.converge()
        tasks = [asyncio.create_task(self.supervisor.run([self.work])), asyncio.create_task(self.persist.run())]
        await asyncio.sleep(0)
        self.node.refuse()
        try:
            return await test(self)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self.directory.close()

    def refused(self) -> bool:
        return any(finding.condition is Condition.IDENTITY_REFUSED for finding in self.health.findings())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data directory of a registered node."""
    directory = tmp_path / "data"
    write_old_node(directory)
    return directory


def write_old_node(path: Path) -> None:
    directory = DataDirectory(path)
    store = IdentityStore(directory)
    identity = replace(make_identity(), private_key=store.make_registration_key())
    store.commit_registration(identity, OLD_DESIRED.signing_keys)
    SnapshotStore(directory).save(identity.node_id, OLD_DESIRED, 1.0)
    store.commit_mark(identity, OLD_DESIRED.signing_keys)
    directory.close()


def on_stage(
    data: Path, test: Callable[[Stage], Awaitable[T]], *, registry: Registry | None = None, tokens: Tokens | None = None
) -> T:
    async def main() -> T:
        return await Stage(data, registry or Registry(), tokens or Tokens([token("new")])).run(test)

    return run_virtual(main())


def read(data: Path) -> tuple[Identity | None, Desired, SigningKeys | None]:
    """What the next start would find."""
    directory = DataDirectory(data)
    try:
        return look_into(directory)
    finally:
        directory.close()


def look_into(directory: DataDirectory) -> tuple[Identity | None, Desired, SigningKeys | None]:
    identity = IdentityStore(directory).load()
    node_id = identity.node_id if identity is not None else ""
    return identity, SnapshotStore(directory).load(node_id).desired, IdentityStore(directory).load_signing_keys()


# --- a new registration


def test_new_node_is_on_disk_in_memory_and_in_the_kernel(data: Path) -> None:
    registry = Registry()

    async def test(stage: Stage) -> None:
        before = stage.node.generation
        assert await stage.renewal.register()
        identity = stage.node.identity
        assert (identity.node_id, identity.mesh_ip, identity.node_key) == ("n_new", NEW_IP, NEW_NODE_KEY)
        assert identity.private_key is not None
        assert identity.private_key.public() == registry.asked[0][1]
        assert stage.node.generation > before
        assert stage.node.accepted.is_set()
        assert not stage.refused()
        assert set(stage.node.desired.peers) == {"n_3", "n_4"}
        # the kernel is the new node's, and nothing is left to do
        assert stage.kernel.private_key == identity.private_key
        assert [format_ip(address.packed) for address in stage.kernel.addresses] == ["10.100.0.77"]
        assert set(stage.kernel.peers) == {bytes(peer(n).public_key) for n in (3, 4)}
        assert {route.source for route in stage.kernel.routes.values()} == {NEW_IP}
        assert (await stage.converger.converge()).changed == 0

    on_stage(data, test, registry=registry)
    identity, desired, keys = read(data)
    assert identity is not None
    assert (identity.node_id, identity.node_key) == ("n_new", NEW_NODE_KEY)
    assert set(desired.peers) == {"n_3", "n_4"}
    assert keys == SigningKeys(public(NEW_KEY))
    assert not (data / "private_key.pending").exists()


def test_nothing_the_control_plane_said_of_the_old_node_is_kept(data: Path) -> None:
    async def test(stage: Stage) -> Desired:
        await stage.renewal.register()
        return stage.node.desired

    held = on_stage(data, test)
    _, desired, _ = read(data)
    for snapshot in (held, desired):
        assert (dict(snapshot.metadata), dict(snapshot.data), dict(snapshot.secret_refs)) == ({}, {}, {})
    assert list((data / "state/data").iterdir()) == []


def test_key_pair_is_a_new_one(data: Path) -> None:
    registry = Registry()
    old, _, _ = read(data)
    on_stage(data, lambda stage: stage.renewal.register(), registry=registry)
    assert old is not None
    assert old.private_key is not None
    assert registry.asked[0][1] != old.private_key.public()


def test_services_end_before_and_start_after_the_change(data: Path) -> None:
    async def test(stage: Stage) -> None:
        seen: list[tuple[int, int]] = []
        stage.node.on_renewed.append(lambda: seen.append((len(stage.work.started), stage.work.ended)))
        await stage.renewal.register()
        await asyncio.sleep(0.001)
        assert seen == [(1, 1)]
        assert stage.work.started == ["n_self", "n_new"]

    on_stage(data, test)


def test_services_are_at_work_while_the_answer_is_awaited(data: Path) -> None:
    async def test(stage: Stage) -> None:
        task = asyncio.create_task(stage.renewal.register())
        await asyncio.sleep(0.5)
        assert stage.work.ended == 0
        await task

    on_stage(data, test)


def test_mesh_stays_until_the_answer_is_there(data: Path) -> None:
    async def test(stage: Stage) -> None:
        before = str(stage.kernel)
        writes = stage.kernel.netlink_writes
        for _ in range(2):
            assert not await stage.renewal.register()
        assert str(stage.kernel) == before
        assert stage.kernel.netlink_writes == writes

    on_stage(data, test, registry=Registry([Transient("gone"), Conflict("409", status=409)]))


def test_change_of_the_interface_is_no_drift(data: Path) -> None:
    """The pass after it has nothing to correct, and so nothing to report."""

    async def test(stage: Stage) -> None:
        await stage.renewal.register()
        result = await stage.converger.converge()
        assert (result.changed, result.corrections) == (0, ())

    on_stage(data, test)


def test_token_file_is_removed_once_the_new_identity_is_on_disk(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(0o600)
    tokens = Tokens([token("new", path)])

    async def test(stage: Stage) -> None:
        stage.node.on_renewed.append(lambda: seen.append(read_id(data)))
        await stage.renewal.register()

    seen: list[str] = []
    on_stage(data, test, tokens=tokens)
    assert not path.exists()
    assert tokens.forgotten == tokens.held
    assert seen == ["n_new"]


def read_id(data: Path) -> str:
    return str(json.loads((data / "identity.json").read_text())["node_id"])


def test_stop_does_not_lose_what_the_token_has_bought(data: Path) -> None:
    async def test(stage: Stage) -> None:
        task = asyncio.create_task(stage.renewal.register())
        await stage.work.has_ended.wait()  # the answer is there
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    on_stage(data, test)
    identity, _, _ = read(data)
    assert identity is not None
    assert identity.node_id == "n_new"


def test_same_node_id_may_be_given_again(data: Path) -> None:
    async def test(stage: Stage) -> None:
        await stage.renewal.register()
        assert stage.node.identity.node_key == NEW_NODE_KEY

    on_stage(data, test, registry=Registry(node_id="n_self"))
    identity, desired, _ = read(data)
    assert identity is not None
    assert (identity.node_id, identity.node_key) == ("n_self", NEW_NODE_KEY)
    assert set(desired.peers) == {"n_3", "n_4"}


# --- no token, and tokens that are refused


def test_without_a_token_nobody_is_asked_and_the_error_comes_every_ten_minutes(data: Path) -> None:
    registry = Registry()

    async def test(stage: Stage) -> None:
        for _ in range(30):
            assert not await stage.renewal.register()
            await asyncio.sleep(60)

    with capture_logs() as lines:
        on_stage(data, test, registry=registry, tokens=Tokens())
    assert registry.asked == []
    assert [line["log_level"] for line in lines if line["event"] == "no new identity"] == ["error"] * 3


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_refused_token_is_not_tried_again_and_a_new_one_is(data: Path, error: ControlError | WireError) -> None:
    registry, tokens = Registry([error]), Tokens([token("used")])

    async def test(stage: Stage) -> None:
        assert [await stage.renewal.register() for _ in range(5)] == [False] * 5
        tokens.held.append(token("fresh"))
        assert await stage.renewal.register()

    on_stage(data, test, registry=registry, tokens=tokens)
    assert [text for text, _ in registry.asked] == ["used", "fresh"]


def test_token_that_could_not_be_brought_is_tried_again_with_the_same_key(data: Path) -> None:
    registry = Registry([Transient("gone"), Transient("gone")])

    async def test(stage: Stage) -> None:
        assert [await stage.renewal.register() for _ in range(3)] == [False, False, True]

    on_stage(data, test, registry=registry)
    assert len(set(registry.asked)) == 1


def test_failed_registration_leaves_the_old_node_as_it_was(data: Path) -> None:
    before = read(data)

    async def test(stage: Stage) -> None:
        await stage.renewal.register()
        assert stage.node.identity.node_id == "n_self"
        assert not stage.node.accepted.is_set()
        assert stage.work.started == ["n_self"]

    on_stage(data, test, registry=Registry([Conflict("409", status=409)]))
    assert read(data) == before


# --- the disk


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writing a file of this name fails; the empty name lets everything pass."""
    refused = ""
    rename = Path.rename

    def guarded(path: Path, target: Path) -> Path:
        if refused and target.name == refused:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    def refuse(name: str) -> None:
        nonlocal refused
        refused = name

    monkeypatch.setattr(Path, "rename", guarded)
    return refuse


def test_answer_that_cannot_be_saved_leaves_the_old_node_and_is_asked_for_again(
    data: Path, full: Callable[[str], None]
) -> None:
    registry = Registry()
    before = read(data)

    async def test(stage: Stage) -> None:
        full("journal.json")
        assert not await stage.renewal.register()
        assert stage.node.identity.node_id == "n_self"
        full("")
        assert not await stage.renewal.adopt()
        assert stage.work.started == ["n_self", "n_self"]
        assert look_into(stage.directory) == before
        assert await stage.renewal.register()

    on_stage(data, test, registry=registry)
    assert len(set(registry.asked)) == 1


@pytest.mark.parametrize(
    "name", ["private_key", "node_secret_key", "signing_keys.json", "desired.json", "identity.json"]
)
def test_change_that_the_disk_interrupts_is_finished_when_it_can_be(
    data: Path, full: Callable[[str], None], name: str
) -> None:
    registry = Registry()

    async def test(stage: Stage) -> None:
        full(name)
        assert not await stage.renewal.register()
        assert not await stage.renewal.adopt()
        full("")
        assert await stage.renewal.adopt()
        assert stage.node.identity.node_id == "n_new"
        assert set(stage.node.desired.peers) == {"n_3", "n_4"}
        assert stage.kernel.private_key == stage.node.identity.private_key

    on_stage(data, test, registry=registry)
    assert len(registry.asked) == 1
    identity, _, _ = read(data)
    assert identity is not None
    assert identity.node_id == "n_new"


def test_disk_that_takes_no_key_asks_nobody(data: Path, full: Callable[[str], None]) -> None:
    registry = Registry()

    async def test(stage: Stage) -> None:
        full("private_key.pending")
        assert not await stage.renewal.register()

    on_stage(data, test, registry=registry)
    assert registry.asked == []


def test_killed_change_leaves_one_of_the_two_nodes(tmp_path: Path) -> None:
    """At every system call of it: identity, keys, signing keys and snapshot are all of the old node or of the new."""
    new_desired = Desired(peers={"n_4": peer(4)}, signing_keys=SigningKeys(public(NEW_KEY)))

    def change(n: int) -> None:
        directory = DataDirectory(tmp_path / str(n))
        identities, snapshots = IdentityStore(directory), SnapshotStore(directory)
        key = identities.make_registration_key()
        (tmp_path / f"{n}.sent").write_text(str(key.public()))
        granted = Granted(Identity("n_new", NEW_IP, NEW_NODE_KEY, key), new_desired, token("new"))
        Registrar(Registry(), identities, snapshots).replace(granted)

    seen = set()
    for n in crashes(change, lambda n: write_old_node(tmp_path / str(n))):
        identity, desired, keys = read(tmp_path / str(n))
        assert identity is not None
        assert identity.private_key is not None
        seen.add(identity.node_id)
        pending = tmp_path / str(n) / "private_key.pending"
        if identity.node_id == "n_self":
            assert (identity.mesh_ip, identity.node_key) == (make_identity().mesh_ip, make_identity().node_key)
            assert replace(desired, signing_keys=keys) == OLD_DESIRED
            if (tmp_path / f"{n}.sent").exists():  # the next registration offers the same key
                assert str(identity.private_key.public()) != (tmp_path / f"{n}.sent").read_text()
                assert pending.exists()
        else:
            assert (identity.mesh_ip, identity.node_key) == (NEW_IP, NEW_NODE_KEY)
            assert str(identity.private_key.public()) == (tmp_path / f"{n}.sent").read_text()
            assert replace(desired, signing_keys=keys) == new_desired
            assert not pending.exists()
        assert not (tmp_path / str(n) / "journal.json").exists()
        assert [path for path in (tmp_path / str(n)).rglob("*") if "corrupt" in path.name] == []
    assert seen == {"n_self", "n_new"}


# --- an identity that somebody else put on disk


def put_on_disk(data: Path, identity: Identity, desired: Desired) -> None:
    """As another `plexd join` does; the lock is not asked."""
    directory = DataDirectory.__new__(DataDirectory)
    directory.path = data
    store = IdentityStore(directory)
    assert identity.private_key is not None
    (data / "private_key.pending").write_text(identity.private_key.reveal())
    store.commit_registration(identity, desired.signing_keys)
    SnapshotStore(directory).save(identity.node_id, desired, 0.0)
    store.commit_mark(identity, desired.signing_keys)


def other_node() -> Identity:
    return Identity("n_other", NEW_IP, NEW_NODE_KEY, make_identity().private_key)


def test_another_identity_on_disk_is_adopted(data: Path) -> None:
    desired = Desired(peers={"n_4": peer(4)}, signing_keys=SigningKeys(public(NEW_KEY)))

    async def test(stage: Stage) -> None:
        put_on_disk(data, other_node(), desired)
        assert await stage.renewal.adopt()
        assert stage.node.identity == other_node()
        assert stage.node.desired == desired
        assert stage.node.accepted.is_set()
        assert [format_ip(address.packed) for address in stage.kernel.addresses] == ["10.100.0.77"]
        assert set(stage.kernel.peers) == {bytes(peer(4).public_key)}
        await asyncio.sleep(0.001)
        assert stage.work.started == ["n_self", "n_other"]
        assert not await stage.renewal.adopt()

    on_stage(data, test)


def test_identity_on_disk_that_is_the_nodes_own_is_nothing_new(data: Path) -> None:
    async def test(stage: Stage) -> None:
        assert not await stage.renewal.adopt()
        assert stage.work.started == ["n_self"]
        assert not stage.node.accepted.is_set()

    on_stage(data, test)


def test_new_node_key_of_the_same_node_keeps_its_snapshot(data: Path) -> None:
    async def test(stage: Stage) -> None:
        (data / "node_secret_key").write_text("another-key\n")
        (data / "private_key").unlink()
        old = stage.node.identity
        assert await stage.renewal.adopt()
        assert stage.node.identity == replace(old, node_key=SecretStr("another-key"))
        assert stage.node.desired == OLD_DESIRED

    on_stage(data, test)


def names(data: Path) -> set[str]:
    return {path.name for path in data.iterdir()}


def spoil(name: str, content: str | None) -> Callable[[Path], None]:
    def act(data: Path) -> None:
        (data / name).unlink()
        if content is None:
            return
        if content:
            (data / name).write_text(content)
        else:
            (data / name).mkdir()

    return act


@pytest.mark.parametrize(
    "damage",
    [
        spoil("identity.json", None),
        spoil("identity.json", "{"),
        spoil("identity.json", ""),
        spoil("node_secret_key", None),
        spoil("private_key", None),
        spoil("private_key", "damaged"),
    ],
)
def test_damage_on_disk_is_no_other_identity_and_stays_as_it_is(data: Path, damage: Callable[[Path], None]) -> None:
    async def test(stage: Stage) -> None:
        old = stage.node.identity
        damage(data)
        before = names(data)
        assert not await stage.renewal.adopt()
        assert stage.node.identity == old
        assert names(data) == before

    on_stage(data, test)


def test_snapshot_of_the_old_node_is_never_saved_as_the_new_ones(data: Path) -> None:
    """A change of the old snapshot is on its way to the disk when the node becomes another."""

    async def test(stage: Stage) -> None:
        stage.node.unsaved.set()
        await asyncio.sleep(0.2)  # the change gathers
        await stage.renewal.register()
        await asyncio.sleep(5)

    on_stage(data, test)
    identity, desired, _ = read(data)
    assert identity is not None
    assert identity.node_id == "n_new"
    assert set(desired.peers) == {"n_3", "n_4"}


def test_no_log_line_holds_a_secret(data: Path) -> None:
    async def test(stage: Stage) -> None:
        assert await stage.renewal.register()
        assert stage.node.identity.private_key is not None
        secrets.append(stage.node.identity.private_key.reveal())

    secrets = ["secret-token", NEW_NODE_KEY.get_secret_value()]
    with capture_logs() as lines:
        on_stage(data, test, tokens=Tokens([token("secret-token")]))
    assert lines
    assert [secret for secret in secrets if secret in str(lines)] == []
