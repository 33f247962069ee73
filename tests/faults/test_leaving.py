"""`plexd down` and `plexd deregister` after a real agent, with the mesh it left in the kernel."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.world import MARKS, PATIENCE, PLEXD, World, run, wait_until

pytestmark = MARKS
KEYS = {"identity.json", "private_key", "node_secret_key"}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as world:
        world.register()
        yield world


@pytest.fixture
def world(running: World) -> World:
    """The agent has been stopped; its mesh is there."""
    assert running.end_agent() == 0
    assert running.mesh_is_whole()
    return running


def plexd(world: World, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*world.inside, *PLEXD, *arguments, "--config", str(world.directory / "config.yaml")],
        capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def is_gone(world: World) -> bool:
    """No interface, and no WireGuard program of it."""
    links = json.loads(run(*world.inside, "ip", "-json", "link"))
    return all(link["ifname"] != world.interface for link in links) and world.pids() == {world.plane.pid}


def held(world: World) -> set[str]:
    return {name for name in KEYS if (world.data / name).exists()}


@pytest.mark.parametrize("command", ["down", "deregister"])
def test_nothing_is_taken_from_a_running_agent(running: World, command: str) -> None:
    code, stdout, stderr = plexd(running, command)
    assert (code, stdout) == (1, "")
    assert "stop the daemon first" in stderr
    assert running.mesh_is_whole()
    assert held(running) == KEYS
    assert running.plane.arrivals("deregister") == []


def test_mesh_taken_down_comes_back_with_the_same_identity(world: World) -> None:
    code, stdout, stderr = plexd(world, "down")
    assert (code, stdout) == (0, "mesh down\n"), stderr
    assert is_gone(world)
    assert held(world) == KEYS
    world.start_agent()
    wait_until("the mesh is back", world.mesh_is_whole)
    wait_until("the event stream is open", world.streams)
    assert [node["id"] for node in world.plane.nodes()] == [world.node_id]
    assert len(world.plane.arrivals("register")) == 1
    assert world.plane.arrivals("deregister") == []


def test_deregistered_node_leaves_nothing_in_the_kernel_and_starts_anew_with_a_token(world: World) -> None:
    code, stdout, stderr = plexd(world, "deregister")
    assert (code, stdout) == (0, f"node {world.node_id} deregistered\n"), stderr
    assert world.plane.nodes() == []
    assert is_gone(world)
    assert held(world) == set()
    assert (world.data / "identity.json.deregistered").exists()
    assert plexd(world, "up")[0] == 6  # there is no token
    world.put_token(world.plane.issue_token())
    world.start_agent()
    world.plane.wait_for("register", count=2, timeout=PATIENCE)


def test_control_plane_that_is_away_keeps_the_node_unless_forced(world: World) -> None:
    world.plane.ask("POST", "/listener/stop")
    code, stdout, stderr = plexd(world, "deregister")
    assert (code, stdout) == (1, "")
    assert "--force" in stderr
    assert world.mesh_is_whole()
    assert held(world) == KEYS
    code, stdout, _ = plexd(world, "deregister", "--force")
    assert (code, stdout) == (0, f"node {world.node_id} deregistered\n")
    assert is_gone(world)
    assert held(world) == set()


def test_node_whose_key_is_refused_counts_as_deregistered(world: World) -> None:
    world.plane.ask("POST", f"/nodes/{world.node_id}/revoke")
    code, stdout, stderr = plexd(world, "deregister")
    assert (code, stdout) == (0, f"node {world.node_id} deregistered\n")
    assert "refuses the node's key" in stderr
    assert is_gone(world)
    assert held(world) == set()


def test_purge_leaves_neither_data_nor_token(world: World) -> None:
    world.put_token("another")
    code, stdout, stderr = plexd(world, "deregister", "--purge", "--yes")
    assert (code, stdout) == (0, f"node {world.node_id} deregistered\nlocal data purged\n"), stderr
    assert is_gone(world)
    assert list(world.data.iterdir()) == []
    assert not (world.directory / "token").exists()
