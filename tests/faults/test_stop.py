"""A real agent is stopped: what it leaves behind, what it gives up only if told to, and what cannot keep it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import MARKS, PATIENCE, World, run, wait_until

pytestmark = MARKS
KEYS = ("identity.json", "private_key", "node_secret_key")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as world:
        world.register()
        yield world


@pytest.fixture
def short_lived(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path, extra="deregister_on_shutdown: true\n") as world:
        world.register()
        yield world


def has_interface(world: World) -> bool:
    shown = subprocess.run([*world.inside, "ip", "link", "show", world.interface], capture_output=True, check=False)
    return shown.returncode == 0


def held(world: World) -> set[str]:
    return {name for name in KEYS if (world.data / name).exists()}


def unsent(world: World) -> list[dict[str, str]]:
    path = world.data / "state/drift.json"
    corrections: list[dict[str, str]] = json.loads(path.read_text())["corrections"] if path.exists() else []
    return corrections


def test_ordinary_stop_leaves_mesh_and_registration(world: World) -> None:
    assert world.end_agent() == 0
    assert world.mesh_is_whole()
    assert held(world) == set(KEYS)
    assert world.plane.arrivals("deregister") == []


@pytest.mark.parametrize("signals", [1, 2])
def test_control_plane_that_hangs_keeps_no_agent_and_nothing_is_lost(world: World, signals: int) -> None:
    """A repair has just been made, and its report is under way, when the signal comes."""
    route = world.peers[0].wire["allowed_ips"][0]
    repair = {"type": "route_added", "detail": route}
    after = world.plane.last_number()
    world.plane.inject(count=None, delay_seconds=60.0)
    run(*world.inside, "ip", "route", "delete", route, "dev", world.interface)
    wait_until("the repair is to be reported", lambda: repair in unsent(world))
    world.signal_agent()
    if signals == 2:
        wait_until("the first is heard", lambda: world.said("plexd stops"))
        world.signal_agent()
    assert world.wait_for_agent() == 0
    assert world.said("step of the stop took too long") == []
    assert len(world.said("second stop signal, deliveries wait for the next start")) == signals - 1
    # with the second nothing hangs until its own time is over
    assert bool(world.said("delivery ended before all was sent")) is (signals == 1)
    assert repair in unsent(world)
    assert world.mesh_is_whole()
    assert held(world) == set(KEYS)
    # what was not delivered is, after the next start
    world.plane.ask("DELETE", "/faults")
    world.start_agent()
    world.plane.wait_for("drift", contains={"corrections": [repair]}, after=after, timeout=PATIENCE)


@pytest.mark.parametrize(
    "answer", [{}, {"effect": "status", "status": 404}, {"effect": "status", "status": 401}], ids=["2xx", "404", "401"]
)
def test_short_lived_node_gives_its_place_up(short_lived: World, answer: dict[str, Any]) -> None:
    world = short_lived
    if answer:
        world.plane.inject(endpoint="deregister", count=None, **answer)
    assert world.end_agent() == 0
    assert len(world.plane.arrivals("deregister")) == 1
    assert not has_interface(world)
    assert held(world) == set()
    assert (world.data / "identity.json.deregistered").exists()
    assert (world.data / "state/desired.json").exists()
    # the next start is a first one
    world.plane.ask("DELETE", "/faults")
    if not answer:
        assert world.plane.nodes() == []
        world.put_token(world.plane.issue_token())
        world.start_agent()
        world.plane.wait_for("register", count=2, timeout=PATIENCE)
        wait_until("there is an identity again", lambda: held(world) == set(KEYS))


@pytest.mark.parametrize(
    "fault", [{"effect": "status", "status": 500}, {"effect": "disconnect"}, {"delay_seconds": 60.0}], ids=str
)
def test_node_that_cannot_give_its_place_up_keeps_everything(short_lived: World, fault: dict[str, Any]) -> None:
    world = short_lived
    world.plane.inject(endpoint="deregister", count=None, **fault)
    assert world.end_agent() == 0
    assert len(world.plane.arrivals("deregister")) <= 1
    assert world.mesh_is_whole()
    assert held(world) == set(KEYS)
    (line,) = [*world.said("step of the stop failed"), *world.said("step of the stop took too long")]
    assert line["step"] == "deregister"


def test_killed_short_lived_node_keeps_its_place(short_lived: World) -> None:
    short_lived.kill_agent()
    assert short_lived.plane.arrivals("deregister") == []
    assert short_lived.mesh_is_whole()
    assert held(short_lived) == set(KEYS)
