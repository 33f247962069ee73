"""The identity survives crashes, and every kind of damage has its own answer (docs/contract/lifecycle.md §2.9)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from plexd.errors import LocalStateError
from plexd.mesh.address import parse_ip
from plexd.mesh.desired import SigningKeys
from plexd.mesh.keys import PrivateKey
from plexd.store.files import DataDirectory
from plexd.store.identity import Identity, IdentityDamaged, IdentityStore, data_dir_is_purgeable
from plexd.store.snapshot import SnapshotStore
from tests.mesh.worlds import desired_of, peer
from tests.store.crash import crashes

MESH_IP = parse_ip("10.100.0.1")
NODE_KEY = SecretStr("bm9kZSBrZXkgb2YgdGhpcnR5LXR3byBieXRlcyEhISE=")
SIGNING = SigningKeys(bytes([7] * 32))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[DataDirectory]:
    opened = DataDirectory(tmp_path / "plexd")
    yield opened
    opened.close()


@pytest.fixture
def store(directory: DataDirectory) -> IdentityStore:
    return IdentityStore(directory)


def register(store: IdentityStore, node_id: str = "n_1", signing: SigningKeys | None = SIGNING) -> Identity:
    identity = Identity(node_id, MESH_IP, NODE_KEY, store.make_registration_key())
    store.commit_registration(identity, signing)
    store.commit_mark(identity, signing)
    return identity


def files(directory: DataDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.path.iterdir() if path.is_file()}


# the way in


def test_empty_directory_is_not_registered(store: IdentityStore) -> None:
    assert store.load() is None
    assert store.load_signing_keys() is None
    assert store.pending_key() is None


def test_registration_is_read_back_whole(directory: DataDirectory, store: IdentityStore) -> None:
    identity = register(store)
    assert IdentityStore(directory).load() == identity
    assert IdentityStore(directory).load_signing_keys() == SIGNING
    assert store.pending_key() is None


def test_identity_file_holds_no_secret_and_every_file_is_for_its_owner(
    directory: DataDirectory, store: IdentityStore
) -> None:
    identity = register(store)
    assert identity.private_key is not None
    document = json.loads(files(directory)["identity.json"])
    assert document.keys() == {"node_id", "mesh_ip", "signing_public_key"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.path.iterdir() if path.is_file())
    assert NODE_KEY.get_secret_value() not in repr(identity)
    assert identity.private_key.reveal() not in repr(identity)


def test_pending_key_is_the_same_in_every_retry(directory: DataDirectory, store: IdentityStore) -> None:
    key = store.make_registration_key()
    assert store.make_registration_key() == key
    assert IdentityStore(directory).make_registration_key() == key


def test_killed_registration_is_either_complete_or_registers_with_the_same_key(tmp_path: Path) -> None:
    """From the first file of a registration to its commit mark, at every system call."""

    def registration(n: int) -> None:
        directory = DataDirectory(tmp_path / str(n))
        store = IdentityStore(directory)
        identity = Identity("n_1", MESH_IP, NODE_KEY, store.make_registration_key())
        write_public_key(n, identity)
        store.commit_registration(identity, SIGNING)
        SnapshotStore(directory).save("n_1", desired_of(peer(2)), 0.0)
        store.commit_mark(identity, SIGNING)

    def write_public_key(n: int, identity: Identity) -> None:
        # what the control plane was told; it outlives the node
        assert identity.private_key is not None
        (tmp_path / f"{n}.sent").write_text(str(identity.private_key.public()))

    outcomes = set()
    for n in crashes(registration):
        directory = DataDirectory(tmp_path / str(n))
        store = IdentityStore(directory)
        identity = store.load()
        sent = tmp_path / f"{n}.sent"
        if identity is None:
            outcomes.add("not registered")
            key = store.make_registration_key()
            assert not sent.exists() or str(key.public()) == sent.read_text()
        else:
            outcomes.add("registered")
            assert identity.private_key is not None
            assert str(identity.private_key.public()) == sent.read_text()
            assert store.load_signing_keys() == SIGNING
            assert SnapshotStore(directory).load("n_1").desired == desired_of(peer(2))
        assert [path for path in directory.path.rglob("*") if "corrupt" in path.name] == []
        directory.close()
    assert outcomes == {"not registered", "registered"}


def test_killed_rotation_keeps_one_of_the_two_keys(tmp_path: Path) -> None:
    old, new = PrivateKey.generate(), PrivateKey.generate()

    def rotation(n: int) -> None:
        IdentityStore(DataDirectory(tmp_path / str(n))).commit_pending_key()

    def prepare(n: int) -> None:
        directory = DataDirectory(tmp_path / str(n))
        identity = register(IdentityStore(directory))
        assert identity.private_key is not None
        (directory.path / "private_key").write_text(old.reveal())
        (directory.path / "private_key.pending").write_text(new.reveal())
        directory.close()

    for n in crashes(rotation, prepare):
        directory = DataDirectory(tmp_path / str(n))
        identity = IdentityStore(directory).load()
        assert identity is not None
        held = (identity.private_key, IdentityStore(directory).pending_key())
        assert held in {(old, new), (new, None)}
        directory.close()


def test_rotation_makes_a_key_of_its_own(store: IdentityStore) -> None:
    identity = register(store)
    assert store.make_pending_key() != identity.private_key
    store.drop_pending_key()
    assert store.pending_key() is None


# damage


def spoil(name: str, content: bytes | None) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)

    return act


@pytest.mark.parametrize(
    "damage",
    [
        spoil("identity.json", b""),
        spoil("identity.json", b"{"),
        spoil("identity.json", b"\xff\xfe"),
        spoil("identity.json", b"[]"),
        spoil("identity.json", b"null"),
        spoil("identity.json", b"[" * 100_000),
        spoil("identity.json", b'{"mesh_ip":"10.100.0.1"}'),
        spoil("identity.json", b'{"node_id":"","mesh_ip":"10.100.0.1"}'),
        spoil("identity.json", b'{"node_id":7,"mesh_ip":"10.100.0.1"}'),
        spoil("identity.json", b'{"node_id":"n_1"}'),
        spoil("identity.json", b'{"node_id":"n_1","mesh_ip":"10.100.0"}'),
        spoil("identity.json", b'{"node_id":"n_1","mesh_ip":4}'),
        spoil("node_secret_key", None),
        spoil("node_secret_key", b""),
        spoil("node_secret_key", b" \n"),
    ],
)
def test_damaged_identity_is_moved_aside_and_says_so(
    directory: DataDirectory, store: IdentityStore, damage: Callable[[Path], None]
) -> None:
    register(store)
    damage(directory.path)
    before = files(directory)
    with pytest.raises(IdentityDamaged):
        store.load()
    after = files(directory)
    assert all(name == "plexd.lock" or ".corrupt-" in name for name in after)
    assert sorted(after.values()) == sorted(before.values())
    assert store.load() is None


@pytest.mark.parametrize("missing", ["private_key", "private_key.pending", "node_secret_key", "signing_keys.json"])
def test_without_the_commit_mark_nothing_else_counts(
    directory: DataDirectory, store: IdentityStore, missing: str
) -> None:
    register(store)
    (directory.path / "identity.json").unlink()
    (directory.path / missing).unlink(missing_ok=True)
    before = files(directory)
    assert store.load() is None
    assert files(directory) == before


@pytest.mark.parametrize("name", ["identity.json", "node_secret_key", "private_key"])
def test_file_that_cannot_be_read_is_fatal_and_changes_nothing(
    directory: DataDirectory, store: IdentityStore, name: str
) -> None:
    register(store)
    (directory.path / name).unlink()
    (directory.path / name).mkdir()  # as root, permissions keep nobody out
    before = files(directory)
    with pytest.raises(LocalStateError) as caught:
        store.load()
    assert caught.value.exit_code == 7
    assert name in str(caught.value)
    assert files(directory) == before


def test_identity_of_a_newer_version_is_fatal_and_untouched(directory: DataDirectory, store: IdentityStore) -> None:
    register(store)
    document = {**json.loads(files(directory)["identity.json"]), "version": 2}
    (directory.path / "identity.json").write_text(json.dumps(document))
    before = files(directory)
    with pytest.raises(LocalStateError, match="newer plexd"):
        store.load()
    assert files(directory) == before


@pytest.mark.parametrize("content", [None, b"", b"AAAA", b"\xff", b"not base64 but forty-four characters long!!!"])
def test_lost_private_key_keeps_the_identity(
    directory: DataDirectory, store: IdentityStore, content: bytes | None
) -> None:
    register(store)
    spoil("private_key", content)(directory.path)
    identity = store.load()
    assert identity is not None
    assert (identity.node_id, identity.private_key) == ("n_1", None)


def test_interrupted_rotation_is_seen(store: IdentityStore) -> None:
    identity = register(store)
    pending = store.make_pending_key()
    assert store.load() == identity
    assert store.pending_key() == pending


def test_white_space_around_stored_text_is_stripped(directory: DataDirectory, store: IdentityStore) -> None:
    identity = register(store)
    for name in ("private_key", "node_secret_key", "signing_public_key"):
        path = directory.path / name
        path.write_bytes(path.read_bytes() + b"\n")
    assert store.load() == identity
    (directory.path / "signing_keys.json").unlink()
    assert store.load_signing_keys() == SIGNING


def test_further_members_and_a_prefix_length_are_ignored(directory: DataDirectory, store: IdentityStore) -> None:
    identity = register(store)
    (directory.path / "identity.json").write_text('{"node_id":"n_1","mesh_ip":"10.100.0.1/16","colour":"red"}')
    assert store.load() == identity


# signing keys

OTHER = bytes([9] * 32)
B64 = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="
OTHER_B64 = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk="


@pytest.mark.parametrize(
    "keys", [SIGNING, SigningKeys(OTHER, bytes([7] * 32), 1_800_000_000.0), SigningKeys(OTHER, bytes([7] * 32), 1.5)]
)
def test_signing_keys_are_read_back(store: IdentityStore, keys: SigningKeys) -> None:
    register(store)
    store.save_signing_keys(keys)
    assert store.load_signing_keys() == keys


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{}", b'{"current":"short"}', b'{"current":7}', b"[" * 100_000),
        f'{{"current":"{B64}","previous":"x"}}'.encode(),
    ],
)
def test_damaged_signing_keys_fall_back_to_the_mirror(
    directory: DataDirectory, store: IdentityStore, content: bytes
) -> None:
    register(store)
    (directory.path / "signing_keys.json").write_bytes(content)
    assert store.load_signing_keys() == SIGNING
    assert [name for name in files(directory) if name.startswith("signing_keys.json")] == [
        name for name in files(directory) if name.startswith("signing_keys.json.corrupt-")
    ]


def test_signing_key_comes_from_the_best_place_that_is_left(directory: DataDirectory, store: IdentityStore) -> None:
    register(store)
    (directory.path / "signing_public_key").write_text(OTHER_B64)
    assert store.load_signing_keys() == SIGNING
    (directory.path / "signing_keys.json").unlink()
    assert store.load_signing_keys() == SigningKeys(OTHER)
    (directory.path / "signing_public_key").write_text("damaged")
    assert store.load_signing_keys() == SIGNING
    (directory.path / "identity.json").write_text('{"node_id":"n_1","mesh_ip":"10.100.0.1"}')
    assert store.load_signing_keys() is None
    assert store.load() is not None


def test_registration_without_a_usable_signing_key_forgets_older_ones(store: IdentityStore) -> None:
    register(store)
    register(store, "n_2", signing=None)
    assert store.load_signing_keys() is None


# the way out


def test_retired_identity_leaves_no_key_behind(directory: DataDirectory, store: IdentityStore) -> None:
    register(store)
    store.make_pending_key()
    store.retire(".deregistered")
    assert store.load() is None
    left = files(directory)
    assert "identity.json.deregistered" in left
    assert not left.keys() & {"identity.json", "private_key", "private_key.pending", "node_secret_key"}


def test_replaced_identity_is_kept_aside_and_a_new_one_has_a_new_key(
    directory: DataDirectory, store: IdentityStore
) -> None:
    first = register(store)
    store.replace_aside(".replaced-1")
    assert store.load() is None
    second = register(store, "n_2")
    assert second.private_key != first.private_key
    assert store.load() == second
    assert "identity.json.replaced-1" in files(directory)


def test_no_log_line_holds_a_secret(directory: DataDirectory, store: IdentityStore) -> None:
    with capture_logs() as records:
        identity = register(store)
        assert identity.private_key is not None
        (directory.path / "identity.json").write_text("{")
        with pytest.raises(IdentityDamaged) as caught:
            store.load()
    said = f"{records} {caught.value}"
    assert records
    assert identity.private_key.reveal() not in said
    assert NODE_KEY.get_secret_value() not in said


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("relative/dir", "absolute"),
        ("/", "root"),
        ("/var", "root"),
        ("{tmp}/link", "symbolic link"),
        ("{tmp}/empty", "does not look like"),
        ("{tmp}/absent", "does not look like"),
        ("{tmp}/real", None),
        ("{tmp}/state-only", "does not look like"),
        ("{tmp}/retired", None),
    ],
)
def test_only_a_data_directory_is_purged(tmp_path: Path, path: str, reason: str | None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "real" / "state").mkdir(parents=True)
    (tmp_path / "real" / "state" / "desired.json").touch()
    (tmp_path / "state-only" / "state").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "retired").mkdir()
    (tmp_path / "retired" / "identity.json.deregistered").touch()
    answer = data_dir_is_purgeable(Path(path.replace("{tmp}", os.fspath(tmp_path))))
    assert answer is None if reason is None else reason in str(answer)
