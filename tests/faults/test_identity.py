"""A real agent that is refused and gets another identity: the new node everywhere, the old one nowhere."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import MARKS, PATIENCE, Peer, World, run, wait_until

pytestmark = MARKS


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as world:
        world.register()
        yield world


def addresses(world: World) -> list[str]:
    (shown,) = json.loads(run(*world.inside, "ip", "-json", "address", "show", world.interface))
    return [entry["local"] for entry in shown["addr_info"] if entry["scope"] == "global"]


def route_sources(world: World) -> set[str]:
    shown = json.loads(run(*world.inside, "ip", "-json", "route", "show", "dev", world.interface))
    return {route["prefsrc"] for route in shown}


def public_key(world: World) -> str:
    return run(*world.inside, "wg", "show", world.interface, "public-key").strip()


def node_of(world: World, node_id: str) -> dict[str, Any]:
    found: dict[str, Any] = world.plane.ask("GET", f"/nodes/{node_id}")
    return found


@pytest.mark.parametrize("killed", [False, True], ids=["running", "killed and started again"])
def test_refused_node_with_a_new_token_becomes_a_new_node_in_everything(world: World, killed: bool) -> None:
    old = node_of(world, world.node_id)
    agent = world.agent_pid
    after = world.plane.last_number()
    world.plane.ask("POST", f"/nodes/{old['id']}/revoke")
    if killed:
        wait_until("the refusal is confirmed", lambda: world.said("identity refused"))
        assert world.mesh_is_whole()
        world.end_agent(signal.SIGKILL)
    world.put_token(world.plane.issue_token())
    if killed:
        world.start_agent()
        agent = world.agent_pid

    world.plane.wait_for("register", after=after, timeout=100)
    (new,) = (node for node in world.plane.nodes() if node["hostname"] == "node-under-test")
    assert new["id"] != old["id"]
    wait_until("the interface has the new address", lambda: addresses(world) == [new["mesh_ip"]])
    wait_until("the stream of the new node is open", lambda: node_of(world, new["id"])["streams"] == 1)
    world.node_id = new["id"]
    world.set_peers(Peer(21), Peer(22))
    wait_until("the peers of the new node are in the kernel", world.mesh_is_whole)
    world.wait_for_ack(world.emit_action())

    assert public_key(world) == new["public_key"] != old["public_key"]
    assert route_sources(world) == {new["mesh_ip"]}
    for endpoint in ("capabilities", "state", "heartbeat"):
        world.plane.wait_for(endpoint, after=after, node=new["id"], timeout=PATIENCE)
    registered = world.plane.arrivals("register", after)[0]["number"]
    later = [arrival for arrival in world.plane.ask("GET", "/arrivals") if arrival["number"] > registered]
    assert {arrival["node_id"] for arrival in later} == {new["id"]}
    assert old["id"] not in json.dumps(later)
    assert world.said("condition cleared", condition="identity_refused") or killed
    assert not (world.directory / "token").exists()
    assert json.loads((world.data / "identity.json").read_text())["node_id"] == new["id"]
    kept = [path for directory in (world.data, world.data / "state") for path in directory.iterdir() if path.is_file()]
    assert old["id"] not in "".join(path.read_text() for path in kept)  # the audit trail beside them is history
    assert world.agent_pid == agent
    assert world.said("service failed") == []
    drift = [c for arrival in world.plane.arrivals("drift", registered) for c in arrival["body"]["corrections"]]
    repaired = " ".join(correction["detail"] for correction in drift if correction["type"] == "interface_repaired")
    assert "key" not in repaired
    assert "address" not in repaired
    assert world.end_agent() == 0


def is_acknowledged(world: World, execution: str) -> bool:
    return any(arrival["body"]["execution_id"] == execution for arrival in world.plane.arrivals("ack"))


def believes(world: World, *signers: str) -> None:
    """An event of each of these has its effect."""
    for signer in signers:
        world.wait_for_ack(world.emit_action(signer=signer))


def test_new_signing_keys_arrive_by_event_and_by_state_and_outlive_the_agent(world: World) -> None:
    world.plane.ask("POST", "/signing-keys/rotate", {"transition_seconds": 3600})
    believes(world, "current", "previous")

    world.end_agent(signal.SIGKILL)
    world.start_agent()
    wait_until("the event stream is open", world.streams)
    believes(world, "current", "previous")

    # nobody hears of this one: the state has to tell
    world.end_agent(signal.SIGKILL)
    wait_until("the event stream is closed", lambda: not world.streams())
    world.plane.ask("POST", "/signing-keys/rotate", {"transition_seconds": 3600})
    world.start_agent()
    wait_until("the event stream is open", world.streams)
    wait_until("the state has told", lambda: world.said("signing keys changed", source="state"))
    believes(world, "current", "previous")

    world.plane.ask("POST", "/signing-keys/rotate", {"transition_seconds": 1})
    wait_until("the transition is over", lambda: world.said("signing keys changed", previous=""))
    late = world.emit_action(signer="previous")
    believes(world, "current")
    assert not is_acknowledged(world, late)
    assert world.mesh_is_whole()
    assert world.end_agent() == 0
