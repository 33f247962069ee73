"""The desired snapshot and the unsent drift come back from disk as they were, or not at all, file by file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plexd.mesh.desired import (
    Candidates,
    DataEntry,
    Desired,
    EndpointSource,
    Policy,
    PolicyRule,
    Rejection,
)
from plexd.mesh.drift import Correction
from plexd.mesh.keys import PresharedKey
from plexd.store.files import DataDirectory
from plexd.store.snapshot import PIECE_ITEMS, CachedSnapshot, SnapshotStore
from tests.mesh.worlds import desired_of, desireds, peer
from tests.store.crash import crashes

SECRET = PresharedKey(bytes([0xA1] * 32))
ODD_KEYS = (
    *("../x", "..", ".", ".hidden", "a/b", "/etc/passwd", "%2E", "a b", "ключ", "\n", "\0", "-", "x.json", "h-x"),
    *("{", '"', "x" * 195, "x" * 196, "x" * 201, "é" * 100, "long" * 1000),
)  # fmt: skip
PAYLOADS = (
    "null", "1.0", "1e400", "-0", "0.10", "123456789012345678901234567890", '{"b":1,"a":2}', '{"a":1,"a":2}',
    '"}"', r'",\"payload\":1}"', '{"payload":{"payload":1}}', "[1, 2 ,3]", r'"\ud800"', '"ключ"', " 1 ",
)  # fmt: skip


def entry(key: str, payload: str = "1", version: int = 1) -> DataEntry:
    return DataEntry(key, "application/json", payload, version, "2026-01-01T00:00:00.123456789Z")


def with_data(*entries: DataEntry) -> Desired:
    return Desired(data={each.key: each for each in entries})


FULL = replace(
    desired_of(peer(3, "172.16.0.0/24", endpoint="[2001:db8::7]:51820", psk=SECRET), peer(2, "fd00:200::/64")),
    rejected=(Rejection("n_9", "bad public key"),),
    policies=(Policy("p b", (PolicyRule("*", "n_2", 443, "tcp", "allow"),)), Policy("a", ())),
    metadata={"zone": "a", "имя": '"'},
    data={"k": entry("k")},
    secret_refs={"db": 3},
    configs={"relay_config": '{"enabled":true,"sessions":[]}'},
)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[DataDirectory]:
    opened = DataDirectory(tmp_path / "plexd")
    yield opened
    opened.close()


def reload(directory: DataDirectory, node_id: str = "n_1") -> Desired:
    return SnapshotStore(directory).load(node_id).desired


def names(directory: DataDirectory) -> set[str]:
    return {str(path.relative_to(directory.path)) for path in directory.path.rglob("*") if path.is_file()}


# round trip


def test_everything_comes_back(directory: DataDirectory) -> None:
    SnapshotStore(directory).save("n_1", FULL, 1_800_000_000.25)
    loaded = SnapshotStore(directory).load("n_1")
    assert loaded == CachedSnapshot(FULL, 1_800_000_000.25)
    assert list(loaded.desired.peers) == ["n_3", "n_2"]


@pytest.mark.parametrize("peers", [PIECE_ITEMS - 1, PIECE_ITEMS, PIECE_ITEMS + 1, 3 * PIECE_ITEMS])
def test_snapshot_written_in_pieces_comes_back_whole(directory: DataDirectory, peers: int) -> None:
    one = peer(2, endpoint="192.0.2.1:1")
    desired = replace(
        desired_of(*(one._replace(id=f"n_{number}") for number in range(peers))),
        policies=tuple(Policy(f"p_{number}", ()) for number in range(peers)),
    )
    SnapshotStore(directory).save("n_1", desired, 0.0)
    assert reload(directory) == desired


def test_order_of_peers_and_of_candidates_comes_back(directory: DataDirectory) -> None:
    candidates = Candidates().offer(EndpointSource.EVENT, "192.0.2.1:1").offer(EndpointSource.PEER, "192.0.2.2:1")
    desired = replace(desired_of(peer(3), peer(2)), candidates={"n_3": candidates, "n_2": Candidates()})
    SnapshotStore(directory).save("n_1", desired, 0.0)
    assert reload(directory).candidates["n_3"].current == "192.0.2.2:1"


def test_peer_without_a_mesh_address_comes_back(directory: DataDirectory) -> None:
    desired = desired_of(peer(2)._replace(mesh_ip=b""))
    SnapshotStore(directory).save("n_1", desired, 0.0)
    assert reload(directory) == desired


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payload_comes_back_to_the_letter(directory: DataDirectory, payload: str) -> None:
    SnapshotStore(directory).save("n_1", with_data(entry("k", payload)), 0.0)
    assert reload(directory).data["k"].payload == payload


def test_no_key_leads_outside_its_directory(directory: DataDirectory) -> None:
    before = names(directory)
    desired = with_data(*(entry(key) for key in ODD_KEYS))
    SnapshotStore(directory).save("n_1", desired, 0.0)
    made = names(directory) - before - {"state/desired.json", "state/metadata.json", "state/secrets.json"}
    assert len(made) == len(ODD_KEYS)
    assert all(name.startswith("state/data/") and len(os.fsencode(Path(name).name)) <= 255 for name in made)
    assert reload(directory).data == desired.data


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=80)


@settings(max_examples=40)
@given(
    desireds(),
    st.lists(
        st.builds(DataEntry, texts, texts, json_values.map(json.dumps), st.integers(0, 2**63 - 1), texts),
        max_size=3,
        unique_by=lambda entry: entry.key,
    ),
    st.dictionaries(texts, texts, max_size=3),
    st.dictionaries(texts, st.integers(0, 2**63 - 1), max_size=3),
)
def test_any_snapshot_comes_back(
    desired: Desired, data: list[DataEntry], metadata: dict[str, str], secret_refs: dict[str, int]
) -> None:
    full = replace(desired, data={each.key: each for each in data}, metadata=metadata, secret_refs=secret_refs)
    with tempfile.TemporaryDirectory() as name:
        directory = DataDirectory(Path(name) / "plexd")
        SnapshotStore(directory).save("n_1", full, 1.0)
        assert SnapshotStore(directory).load("n_1") == CachedSnapshot(full, 1.0)
        directory.close()


# what is written


def test_only_what_differs_is_written(directory: DataDirectory) -> None:
    store = SnapshotStore(directory)
    store.save("n_1", FULL, 0.0)
    inodes = {name: (directory.path / name).stat().st_ino for name in names(directory)}
    store.save("n_1", replace(FULL, metadata={}, data={"k": FULL.data["k"], "new": entry("new")}), 0.0)
    changed = {name for name in names(directory) if (directory.path / name).stat().st_ino != inodes.get(name)}
    assert changed == {"state/desired.json", "state/metadata.json", "state/data/new.json"}


def test_withdrawn_entry_leaves_the_disk(directory: DataDirectory) -> None:
    store = SnapshotStore(directory)
    store.save("n_1", with_data(entry("a"), entry("b")), 0.0)
    store.save("n_1", with_data(entry("b")), 0.0)
    assert reload(directory) == with_data(entry("b"))


def test_files_are_for_their_owner_only(directory: DataDirectory) -> None:
    SnapshotStore(directory).save("n_1", FULL, 0.0)
    assert {(directory.path / name).stat().st_mode & 0o777 for name in names(directory)} == {0o600}


def test_save_that_failed_half_way_is_made_good_by_the_next(
    directory: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SnapshotStore(directory)
    store.save("n_1", with_data(entry("a")), 0.0)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "c.json":
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="No space"):
            store.save("n_1", with_data(entry("a", version=2), entry("b"), entry("c")), 0.0)
    store.save("n_1", with_data(entry("a")), 0.0)
    assert reload(directory) == with_data(entry("a"))


def test_kill_at_any_moment_leaves_each_file_old_or_new(tmp_path: Path) -> None:
    old = replace(FULL, data={"k": entry("k"), "gone": entry("gone")})
    new = replace(
        FULL,
        peers={"n_2": FULL.peers["n_2"]},
        metadata={},
        secret_refs={"db": 4},
        data={"k": entry("k", version=2), "new": entry("new")},
    )

    def prepare(n: int) -> None:
        directory = DataDirectory(tmp_path / str(n))
        SnapshotStore(directory).save("n_1", old, 1.0)
        directory.close()

    def save(n: int) -> None:
        store = SnapshotStore(DataDirectory(tmp_path / str(n)))
        store.load("n_1")
        store.save("n_1", new, 2.0)

    for n in crashes(save, prepare):
        directory = DataDirectory(tmp_path / str(n))
        loaded = SnapshotStore(directory).load("n_1")
        left = loaded.desired
        assert (left.peers, loaded.fetched_at) in [(old.peers, 1.0), (new.peers, 2.0)]
        assert left.metadata in [old.metadata, new.metadata]
        assert left.secret_refs in [old.secret_refs, new.secret_refs]
        assert left.data["k"] in [old.data["k"], new.data["k"]]
        assert [name for name in names(directory) if "corrupt" in name or ".tmp-" in name] == []
        directory.close()
    assert n > 20


# another node, damage


def test_snapshot_of_another_node_is_ignored_and_then_replaced(directory: DataDirectory) -> None:
    SnapshotStore(directory).save("n_1", FULL, 1.0)
    store = SnapshotStore(directory)
    assert store.load("n_2") == CachedSnapshot(Desired(), 0.0)
    store.save("n_2", Desired(), 0.0)
    assert reload(directory, "n_2") == Desired()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"7", b'"text"', b"\xff", b"[" * 100_000),
        *(b'{"version":1}', b'{"version":2,"node_id":"n_1"}'),
        b'{"version":1,"node_id":"n_1","fetched_at":0,"peers":[{}]}',
        b'{"version":1,"node_id":"n_1","fetched_at":0,"peers":7}',
    ],
)
def test_damaged_snapshot_is_moved_aside_and_the_rest_is_used(directory: DataDirectory, content: bytes) -> None:
    SnapshotStore(directory).save("n_1", FULL, 1.0)
    (directory.path / "state" / "desired.json").write_bytes(content)
    loaded = SnapshotStore(directory).load("n_1")
    assert loaded.fetched_at == 0.0
    assert loaded.desired == Desired(metadata=FULL.metadata, data=FULL.data, secret_refs=FULL.secret_refs)
    assert len([name for name in names(directory) if name.startswith("state/desired.json.corrupt-")]) == 1
    assert "state/desired.json" not in names(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"7", b"[1]", b'["x"]', b"\xff", b'[{"key":"x"}]', b"[" * 100_000])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("metadata.json", replace(FULL, metadata={})),
        ("secrets.json", replace(FULL, secret_refs={})),
        ("data/k.json", replace(FULL, data={})),
    ],
)
def test_damaged_file_costs_only_its_category(
    directory: DataDirectory, name: str, expected: Desired, content: bytes
) -> None:
    SnapshotStore(directory).save("n_1", FULL, 1.0)
    (directory.path / "state" / name).write_bytes(content)
    assert reload(directory) == expected
    assert [left for left in names(directory) if left.startswith(f"state/{name}.corrupt-")]


def test_file_that_cannot_be_read_does_not_prevent_the_start(directory: DataDirectory) -> None:
    SnapshotStore(directory).save("n_1", FULL, 1.0)
    path = directory.path / "state" / "metadata.json"
    path.unlink()
    path.mkdir()
    assert reload(directory) == replace(FULL, metadata={})


def test_snapshot_is_saved_again_after_damage(directory: DataDirectory) -> None:
    SnapshotStore(directory).save("n_1", FULL, 1.0)
    (directory.path / "state" / "data" / "k.json").write_bytes(b"{")
    store = SnapshotStore(directory)
    store.load("n_1")
    store.save("n_1", FULL, 1.0)
    assert reload(directory) == FULL


# unsent drift


def correction(n: int) -> Correction:
    return Correction("peer_added", f"peer n_{n}")


def test_unsent_drift_comes_back_until_it_is_sent(directory: DataDirectory) -> None:
    store = SnapshotStore(directory)
    assert store.load_unsent_corrections() == ()
    assert store.save_unsent_corrections([correction(1), correction(2)]) == (correction(1), correction(2))
    assert SnapshotStore(directory).load_unsent_corrections() == (correction(1), correction(2))
    assert store.save_unsent_corrections([]) == ()
    assert "state/drift.json" not in names(directory)
    assert store.load_unsent_corrections() == ()


def test_only_the_newest_500_corrections_are_kept(directory: DataDirectory) -> None:
    store = SnapshotStore(directory)
    kept = store.save_unsent_corrections(map(correction, range(600)))
    assert kept == tuple(map(correction, range(100, 600)))
    assert store.load_unsent_corrections() == kept


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"version":1,"corrections":[1]}', b'{"version":2,"corrections":[]}']
)
def test_damaged_drift_is_moved_aside(directory: DataDirectory, content: bytes) -> None:
    (directory.path / "state" / "drift.json").write_bytes(content)
    assert SnapshotStore(directory).load_unsent_corrections() == ()
    assert [name for name in names(directory) if name.startswith("state/drift.json.corrupt-")]


def test_entries_alone_can_be_saved_and_the_next_save_writes_the_rest(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path)
    store = SnapshotStore(directory)
    store.save("n_1", FULL, 7.0)
    peers = (tmp_path / "state" / "desired.json").read_bytes()
    changed = replace(FULL, peers={}, metadata={"zone": "b"}, data={"new": entry("new")}, secret_refs={})
    store.save_entries(changed)
    assert (tmp_path / "state" / "desired.json").read_bytes() == peers
    loaded = SnapshotStore(directory).load("n_1").desired
    assert (loaded.peers, loaded.metadata) == (FULL.peers, {"zone": "b"})
    assert (loaded.data, loaded.secret_refs) == ({"new": entry("new")}, {})
    store.save("n_1", changed, 8.0)
    assert SnapshotStore(directory).load("n_1") == CachedSnapshot(changed, 8.0)


def test_entry_with_an_endless_number_comes_back(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path)
    SnapshotStore(directory).save("n_1", with_data(entry("k", "9" * 5000)), 7.0)
    assert SnapshotStore(directory).load("n_1").desired.data["k"].payload == "9" * 5000
