"""Registration killed with -9 at every boundary between two writes, against a real control plane: one node comes of it.

So it is for the first one, `plexd join`, and for the one with which a running node replaces a refused identity.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from plexd.config.load import load
from plexd.identity import join_and_leave
from plexd.identity.enrolment import TokenSearch, describe, make_control_plane, make_registrar
from plexd.identity.reenrolment import Reenrolment
from plexd.mesh.keys import PrivateKey
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.store.files import DataDirectory
from plexd.store.identity import IdentityStore
from plexd.store.snapshot import SnapshotStore
from tests.faults.plane import Plane
from tests.store.crash import crashes


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as plane:
        yield plane


def flags(plane: Plane, directory: Path, name: str) -> dict[str, str]:
    return {
        "api": plane.url,
        "data_dir": str(directory / "data"),
        "hostname": name,
        "token.file": str(directory / "token"),
        "log_level": "error",
    }


def join(given: dict[str, str]) -> None:
    join_and_leave.join(load(given, {}, command="join"), token_text=None, force=False, ask=None)


def unharmed(work: Callable[[dict[str, str]], None], given: dict[str, str]) -> None:
    child = multiprocessing.get_context("fork").Process(target=work, args=(given,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def renew(given: dict[str, str]) -> None:
    """What a daemon does whose identity is refused once there is a new token in the token file."""
    config = load(given, {}, command="join").config
    directory = DataDirectory(config.data_dir)
    identities, snapshots = IdentityStore(directory), SnapshotStore(directory)
    identity = identities.load()
    assert identity is not None
    node = Node(identity, snapshots.load(identity.node_id).desired, 0.0, Health())

    @contextlib.asynccontextmanager
    async def paused() -> AsyncIterator[None]:
        yield

    async def converge() -> None:
        pass

    async def main() -> None:
        control = make_control_plane(config)
        tokens = TokenSearch(lambda: config.token, {})
        registrar = make_registrar(lambda: config, control, describe(config), identities, snapshots)
        renewal = Reenrolment(node, identities, snapshots, registrar, tokens, paused, asyncio.Lock(), converge)
        try:
            assert await renewal.register()
        finally:
            await control.close()

    asyncio.run(main())


def assert_files_are_in_order(data: Path) -> None:
    for path in data.rglob("*"):
        assert not path.name.startswith(".tmp-")
        assert "corrupt" not in path.name
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not (data / "private_key.pending").exists()


def prepare(plane: Plane, directory: Path) -> None:
    directory.mkdir()
    token = directory / "token"
    token.touch(0o600)
    token.write_text(plane.issue_token())


def own_public_key(data: Path) -> str:
    return str(PrivateKey.parse((data / "private_key").read_text()).public())


@pytest.mark.timeout(240)
def test_killed_join_leads_to_one_node_with_one_key(tmp_path: Path, plane: Plane) -> None:
    def given(n: int) -> dict[str, str]:
        return flags(plane, tmp_path / str(n), f"node-{n}")

    seen = set()
    for n in crashes(lambda n: join(given(n)), lambda n: prepare(plane, tmp_path / str(n))):
        data = tmp_path / str(n) / "data"
        was_registered = (data / "identity.json").exists()
        asked_before = [a for a in plane.arrivals("register") if a["body"]["hostname"] == f"node-{n}"]

        unharmed(join, given(n))

        asked = [a for a in plane.arrivals("register") if a["body"]["hostname"] == f"node-{n}"]
        seen.add((was_registered, len(asked_before), len(asked)))
        assert len(asked) == len(asked_before) + (not was_registered)
        (node,) = (node for node in plane.nodes() if node["hostname"] == f"node-{n}")
        assert {a["body"]["public_key"] for a in asked} == {node["public_key"]} == {own_public_key(data)}
        identity = json.loads((data / "identity.json").read_text())
        assert (identity["node_id"], identity["mesh_ip"]) == (node["id"], node["mesh_ip"])
        assert_files_are_in_order(data)
        token = tmp_path / str(n) / "token"
        assert was_registered or not token.exists()
    # before the request, after it with the answer lost, and after the commit mark
    assert seen == {(False, 0, 1), (False, 1, 2), (True, 1, 1)}


@pytest.mark.timeout(300)
def test_killed_renewal_is_the_old_node_or_the_new_one(tmp_path: Path, plane: Plane) -> None:
    old: dict[int, dict[str, object]] = {}

    def given(n: int) -> dict[str, str]:
        return flags(plane, tmp_path / str(n), f"node-{n}")

    def refuse(n: int) -> None:
        prepare(plane, tmp_path / str(n))
        unharmed(join, given(n))
        (old[n],) = (node for node in plane.nodes() if node["hostname"] == f"node-{n}")
        plane.ask("POST", f"/nodes/{old[n]['id']}/revoke")
        (tmp_path / str(n) / "token").write_text(plane.issue_token())

    seen = set()
    for n in crashes(lambda n: renew(given(n)), refuse):
        data = tmp_path / str(n) / "data"
        DataDirectory(data).close()  # the next start: what was begun is finished
        identity = json.loads((data / "identity.json").read_text())
        asked_before = len([a for a in plane.arrivals("register") if a["body"]["hostname"] == f"node-{n}"]) - 1
        was_renewed = identity["node_id"] != old[n]["id"]
        if not was_renewed:
            assert (identity["mesh_ip"], own_public_key(data)) == (old[n]["mesh_ip"], old[n]["public_key"])
            unharmed(renew, given(n))

        asked = [a for a in plane.arrivals("register") if a["body"]["hostname"] == f"node-{n}"][1:]
        seen.add((was_renewed, asked_before, len(asked)))
        (node,) = (node for node in plane.nodes() if node["hostname"] == f"node-{n}")
        assert {a["body"]["public_key"] for a in asked} == {node["public_key"]} == {own_public_key(data)}
        assert node["public_key"] != old[n]["public_key"]
        identity = json.loads((data / "identity.json").read_text())
        assert (identity["node_id"], identity["mesh_ip"]) == (node["id"], node["mesh_ip"])
        assert not (data / "journal.json").exists()
        assert_files_are_in_order(data)
    # before the request, after it with the answer lost, and after the answer was on disk
    assert seen == {(False, 0, 1), (False, 1, 2), (True, 1, 1)}
