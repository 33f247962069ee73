"""`join` killed with -9 at every boundary between two writes, against a real control plane: one node comes of it."""

from __future__ import annotations

import json
import multiprocessing
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from plexd import membership
from plexd.config.load import load
from plexd.mesh.keys import PrivateKey
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
    membership.join(load(given, {}, command="join"), token_text=None, force=False, ask=None)


def join_unharmed(given: dict[str, str]) -> None:
    child = multiprocessing.get_context("fork").Process(target=join, args=(given,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


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

        join_unharmed(given(n))

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
